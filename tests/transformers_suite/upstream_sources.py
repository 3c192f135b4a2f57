"""Transformers' own test modules, fetched from the source distribution of the installed version.

The wheel has no tests, but the source distribution on the package index holds the common ones. It is downloaded once
per version, with pip, and kept in `.cache` at the root of this repository, its `tests` folder unpacked beside it.
Nothing of it is committed.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


CACHE = Path(__file__).resolve().parents[2] / ".cache" / "transformers_suite"
DOWNLOAD_TIMEOUT = 300  # seconds; it takes about five


class UpstreamTestsUnavailable(RuntimeError):
    """The source distribution could not be had, so Transformers' own tests cannot run."""


def unpacked_tests() -> Path:
    """The folder with the test modules of the installed version of Transformers, fetched when it is not there yet.

    Raises:
        UpstreamTestsUnavailable: when neither a kept copy nor a download is to be had.
    """
    name = f"transformers-{transformers.__version__}"
    folder, archive = CACHE / f"{name}-tests", CACHE / f"{name}.tar.gz"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Made in a scratch folder and renamed at the end: an interrupted or a concurrent run sees all or nothing.
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            if not archive.is_file():
                os.replace(download(Path(scratch), archive), archive)
            tests = unpack(archive, Path(scratch))
            try:
                os.rename(tests, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, with the same content
                    raise
    return folder


def download(scratch: Path, archive: Path) -> Path:
    """Downloads the source distribution that is to become `archive` into `scratch` and returns its path."""
    requirement = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", requirement]
    command += ["--dest", str(scratch), "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
        return next(scratch.glob("transformers-*.tar.gz"))
    except (subprocess.SubprocessError, OSError, StopIteration) as error:
        output = getattr(error, "stderr", None) or str(error) or "pip left no archive behind"
        raise UpstreamTestsUnavailable(
            f"Transformers' own tests need the source distribution of {requirement}, which pip could not download; "
            f"give it access to a package index, or put the archive at {archive}.\n{output}"
        ) from error


def unpack(archive: Path, scratch: Path) -> Path:
    """Unpacks the `tests` folder of `archive` below `scratch` and returns its path."""
    root = archive.name.removesuffix(".tar.gz")
    try:
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.startswith(f"{root}/tests/")]
            tar.extractall(scratch, members=members, filter="data")
        tests = scratch / root / "tests"
        (tests / "__init__.py").touch()  # the configuration tests read it; the archive has none
        return tests
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(scratch / root, ignore_errors=True)
        raise UpstreamTestsUnavailable(
            f"{archive} is not a source distribution of {root} with a tests folder ({error}); delete it to have it "
            "downloaded again."
        ) from error
