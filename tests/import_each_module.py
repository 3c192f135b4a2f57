"""Imports every module of the package in a process of its own, to show that none leans on another one's imports.

The processes are forks of one that has torch and Transformers loaded, and nothing of the package: loading those takes
seconds, a module of ours a fraction of one.
"""

import importlib.util
import multiprocessing
import pkgutil
import sys

import torch  # noqa: F401
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel  # noqa: F401


FORKS = multiprocessing.get_context("fork")


def send_names(to) -> None:
    """Every module of the package, sub-packages that live in other top-level folders included."""
    packages = [importlib.import_module("egmla")]
    # Walking `egmla`'s own folder does not find these.
    packages += [importlib.import_module(f"egmla.{name}") for name in ("configuration", "conversion", "model_cards")]
    names = {package.__name__ for package in packages}
    for package in packages:
        names |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    names = {name for name in names if not name.endswith("__main__")}
    if importlib.util.find_spec("vllm") is None:  # it has an environment of its own, and tests there
        names = {name for name in names if not name.startswith("egmla.serving.vllm_")}
    to.send(sorted(names))


def fork(target, *arguments):
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def main() -> int:
    receiver, sender = FORKS.Pipe(duplex=False)
    listing = fork(send_names, sender)
    sender.close()  # so that receiving ends if the process does
    names = receiver.recv()
    listing.join()
    failures = []
    for start in range(0, len(names), 2):
        pair = [(name, fork(importlib.import_module, name)) for name in names[start : start + 2]]
        for name, process in pair:
            process.join()  # which prints what went wrong
            if process.exitcode:
                failures.append(f"{name} cannot be imported alone: exit code {process.exitcode}")
    print("\n".join(failures) or f"{len(names)} modules import alone")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
