"""Imports every module of the package alone, in a process of its own, to show that none leans on another's imports."""

import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import egmla


def main() -> int:
    names = ["egmla", *(module.name for module in pkgutil.walk_packages(egmla.__path__, "egmla."))]
    # Sub-packages that live in other top-level folders are not found by walking `egmla`'s own folder.
    for folder in ("configuration", "conversion"):
        package = __import__(f"egmla.{folder}", fromlist=["__path__"])
        prefix = f"egmla.{folder}."
        names += [prefix.rstrip("."), *(module.name for module in pkgutil.walk_packages(package.__path__, prefix))]
    names = sorted({name for name in names if not name.endswith("__main__")})

    def import_alone(name: str) -> str | None:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True)
        return f"{name}:\n{done.stderr}" if done.returncode else None

    with ThreadPoolExecutor(2) as pool:
        failures = [failure for failure in pool.map(import_alone, names) if failure]
    print("\n".join(failures) or f"{len(names)} modules import alone")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
