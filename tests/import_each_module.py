"""Imports every module of the package in a process of its own, to show that none leans on another's imports.

The processes are forks of one that has torch and Transformers loaded, and nothing of the package: loading those takes
seconds, a module of ours a fraction of one.
"""

import importlib
import multiprocessing
import pkgutil
import sys
import traceback

import torch  # noqa: F401
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, Trainer  # noqa: F401


def module_names(_=None) -> list[str]:
    """Every module of the package, sub-packages that live in other top-level folders included."""
    packages = [importlib.import_module("egmla")]
    # Walking `egmla`'s own folder does not find these.
    packages += [importlib.import_module(f"egmla.{name}") for name in ("configuration", "conversion", "model_cards")]
    names = {package.__name__ for package in packages}
    for package in packages:
        names |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    return sorted(name for name in names if not name.endswith("__main__"))


def failure_to_import(name: str) -> str | None:
    """Its traceback if the module cannot be imported alone."""
    try:
        importlib.import_module(name)
    except BaseException:  # one that exits on import is a failure as well
        return f"{name}:\n{traceback.format_exc()}"
    return None


def main() -> int:
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "egmla")
    if loaded:
        raise AssertionError(f"{loaded} must not be loaded before the processes are made")
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        [names] = pool.map(module_names, [None], chunksize=1)
        failures = [failure for failure in pool.imap(failure_to_import, names, chunksize=1) if failure]
    print("\n".join(failures) or f"{len(names)} modules import alone")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
