"""Keep git quiet while lm-eval asks it for the current commit."""

import contextlib
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_git() -> Iterator[None]:
    """Keep git from printing "fatal: not a git repository" when lm-eval asks it for the current commit."""
    from lm_eval import evaluator

    ask = evaluator.get_git_commit_hash

    def ask_in_a_repository() -> str | None:
        try:
            found = subprocess.run(["git", "describe", "--always"], capture_output=True).returncode == 0
        except OSError:  # git is not installed
            found = False
        return ask() if found else None

    evaluator.get_git_commit_hash = ask_in_a_repository
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask
