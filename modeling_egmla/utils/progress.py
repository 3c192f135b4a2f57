"""Types of the functions by which long work says how far it is."""

from collections.abc import Callable


# Called with (stage, done, total), such as ("layer 3", 120, 250).
Progress = Callable[[str, float, int], None]
# Called with (done, total), inside one stage.
StageProgress = Callable[[int, int], None]
# Called with one line of text on what was found.
Say = Callable[[str], None]


def stage_progress(name: str, progress: Progress | None) -> StageProgress | None:
    """Return the progress of one stage, or `None` where nobody listens."""
    return None if progress is None else lambda done, total: progress(name, done, total)


def with_name(name: str, progress: Progress | None) -> Progress | None:
    """Return a progress whose stages are named after a piece of work, too, or `None` where nobody listens."""
    return None if progress is None else lambda stage, done, total: progress(f"{name}: {stage}", done, total)
