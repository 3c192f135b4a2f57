"""The model name `egmla` for lm-eval, registered on import. Needs `egmla[eval]`.

`python -m egmla.evaluation.lm_eval ...` is lm-eval's own command line with the name known to it.
"""

from collections.abc import Sequence

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import egmla  # noqa: F401  registers the architecture with the Auto classes
from egmla.utils.machine import available_bytes


# More rows at once are no faster on a CPU, so memory beyond this buys nothing.
CPU_BATCH_BYTES = 2**30


def rows_in_budget(model, length: int, most: int, budget: int) -> int:
    """Rows of `length` tokens whose forward pass fits into a number of bytes; from 1 to `most`.

    Counts the logits in the model's format and twice in float32 (their log-softmax), and a dozen hidden states and
    four widths of the MLP for one layer at a time. Source: derived from what lm-eval's `_loglikelihood_tokens` keeps.
    """
    config = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    hidden = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    per_token = config.vocab_size * (itemsize + 8) + (12 * hidden + 4 * inner) * itemsize
    return max(1, min(most, budget // (per_token * max(1, length))))


@register_model("egmla")
class EGMLAHarnessModel(HFLM):
    """lm-eval's `hf` model, knowing EG-MLA without `trust_remote_code`, and with `batch_size=auto` safe on a CPU.

    lm-eval finds its largest batch by running out of memory and catching the error, which a CPU does not raise: the
    process is killed instead. Here the batch on a CPU is what fits into a quarter of the memory left, 1 GiB at most.

    Args:
        pretrained (`str` or `PreTrainedModel`): folder, hub id or model.
        device (`str`, *optional*): an accelerator when there is one by default, else the CPU (lm-eval's own default,
            "cuda", fails where PyTorch has none).
        **arguments: as of lm-eval's `hf` model.
    """

    def __init__(self, pretrained, device: str | None = None, **arguments) -> None:
        super().__init__(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **arguments)

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return super()._detect_batch_size(requests, pos)
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len(context) + len(continuation))
        budget = min(CPU_BATCH_BYTES, available_bytes() // 4)
        return rows_in_budget(self.model, length, self.max_batch_size or 64, budget)


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
