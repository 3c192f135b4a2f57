"""Scores: lm-eval-harness on EG-MLA models, and comparisons with their source."""

from egmla.samples import sample_path, sample_text


__all__ = ["sample_path", "sample_text"]
