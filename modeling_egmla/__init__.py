"""EG-MLA for Hugging Face Transformers: importing this package registers the model with the Auto classes."""

import importlib
import sys
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

__all__ = [
    "EGMLACache",
    "EGMLAConfig",
    "EGMLAForCausalLM",
    "EGMLAForSequenceClassification",
    "EGMLAForTokenClassification",
    "EGMLAModel",
    "EGMLAPreTrainedModel",
    "load_cpu_kernel",
]


def _command_line_starts() -> bool:
    """Whether this import is the start of the `egmla` command or of `python -m egmla`.

    The command line registers the model when a command runs. Help and completion then need no PyTorch.
    """
    if sys.argv[:1] == ["-m"]:  # Python looks up the module that it is going to run
        # What stands before the module's own arguments names it: `-m egmla`, `-megmla` or `-Im egmla`.
        given = sys.orig_argv[-len(sys.argv)] if len(sys.argv) <= len(sys.orig_argv) else ""
        return (given.partition("m")[2] if given.startswith("-") else given) == "egmla"
    return getattr(sys.modules.get("egmla_command"), "starting", False)


if TYPE_CHECKING or not _command_line_starts():
    from .auto_classes import (
        EGMLACache,
        EGMLAConfig,
        EGMLAForCausalLM,
        EGMLAForSequenceClassification,
        EGMLAForTokenClassification,
        EGMLAModel,
        EGMLAPreTrainedModel,
        load_cpu_kernel,
    )
else:

    def __getattr__(name: str) -> Any:
        """Import a public name on first use."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(".auto_classes", __name__), name)
