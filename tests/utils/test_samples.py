"""The sample texts that ship with the package."""

import pytest

from egmla.samples import sample_path, sample_text


def test_samples_are_there():
    evaluation, calibration = sample_text("evaluation"), sample_text("calibration")
    assert evaluation.startswith("ALICE")
    assert 50_000 < len(evaluation.encode()) < 70_000
    assert 200_000 < len(calibration.encode()) < 300_000
    # Perplexity on text that was calibrated on would flatter.
    assert not {line for line in evaluation.splitlines() if len(line) > 40} & set(calibration.splitlines())
    assert (sample_path("evaluation").parent / "README.md").is_file()
    with pytest.raises(ValueError, match="'nix' is no sample: use one of calibration, evaluation"):
        sample_path("nix")
