"""Public-domain texts that ship with the package, for calibration and evaluation."""

from importlib.resources import files
from pathlib import Path


SAMPLES = ("calibration", "evaluation")


def sample_path(name: str) -> Path:
    """File of a public-domain text that ships with the package, `"evaluation"` or `"calibration"`.

    Raises:
        ValueError: for another name.
    """
    if name not in SAMPLES:
        raise ValueError(f"{name!r} is no sample: use one of {', '.join(SAMPLES)}.")
    return Path(str(files(__name__) / f"{name}.txt"))


def sample_text(name: str) -> str:
    """Text of a sample (see `sample_path`)."""
    return sample_path(name).read_text(encoding="utf-8")
