"""Models without weights, and what the name of a model means."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig


def meta_model(
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    *,
    counts_experts: bool = False,
) -> Any:
    """Builds a configuration's causal language model on the meta device: shapes without memory.

    Args:
        config (`PreTrainedConfig`): a configuration whose model class is registered; it is not changed.
        dtype (`torch.dtype`, *optional*): dtype of the parameters; the configuration's by default.
        attn_implementation (`str`, *optional*): Transformers' name of an attention function.
        counts_experts (`bool`): run mixtures of experts as batched products. The other implementations look at values
            or want certain widths, so they do not run on the meta device.
    """
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    given = {name: value for name, value in options.items() if value is not None}
    with torch.device("meta"):
        # `from_config` notes these options in the configuration, so it gets a copy.
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), **given)
    if counts_experts:
        for module in model.modules():
            own: Any = getattr(module, "config", None)
            if getattr(own, "_experts_implementation", None) in ("eager", "grouped_mm"):
                own._experts_implementation = "batched_mm"
    return model


def config_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Returns the dtype that a configuration names; float32 where it names none."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def local_folder(name: str | Path) -> Path | None:
    """Returns the folder of this name, or `None` where the name can only be a Hub id (`model` or `owner/model`).

    Raises:
        FileNotFoundError: when the name is a file, or a path to a folder that does not exist.
    """
    path, text = Path(name), str(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{text} is a file; give the folder of a checkpoint or a Hub id.")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {text}; give the folder of a checkpoint or a Hub id.")
    return None
