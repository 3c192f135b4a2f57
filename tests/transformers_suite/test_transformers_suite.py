"""Transformers' own common model tests, run on EG-MLA (see `model_suite.py`)."""

import pytest
from upstream_sources import UpstreamTestsUnavailable


pytestmark = pytest.mark.long  # in front, see conftest.py


try:
    from model_suite import EGMLAGateTableModelTest, EGMLAModelTest  # noqa: F401
except UpstreamTestsUnavailable as error:
    message = str(error)

    # A failing test, not a failing import: an error of collection would keep all other tests from running.
    def test_upstream_tests_are_available():
        pytest.fail(message, pytrace=False)
