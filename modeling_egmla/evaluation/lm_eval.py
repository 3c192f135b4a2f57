"""Register the model name `egmla` with lm-eval, on import. Needs `egmla[eval]`.

`python -m egmla.evaluation.lm_eval ...` is lm-eval's own command line, which then knows that name.
"""

from collections.abc import Sequence

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import egmla  # noqa: F401  registers the architecture with the Auto classes
from egmla.evaluation.quiet import quiet_git
from egmla.utils.machine import available_bytes


# Larger batches are no faster on a CPU.
CPU_BATCH_BYTES = 2**30


def rows_in_budget(model, length: int, most: int, budget: int) -> int:
    """Count the rows of `length` tokens whose forward pass fits into a number of bytes.

    The estimate holds the logits in the model's dtype and twice in float32 (for their log-softmax). For one layer at a
    time it adds twelve hidden states and four MLP activations.

    Args:
        model: the model.
        length (`int`): tokens of a row.
        most (`int`): the largest number of rows to return.
        budget (`int`): bytes.

    Returns:
        `int`: from 1 to `most`.

    Source: derived from what lm-eval's `_loglikelihood_tokens` keeps.
    """
    config = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    hidden = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    per_token = config.vocab_size * (itemsize + 8) + (12 * hidden + 4 * inner) * itemsize
    return max(1, min(most, budget // (per_token * max(1, length))))


@register_model("egmla")
class EGMLAHarnessModel(HFLM):
    """lm-eval's `hf` model that loads EG-MLA without `trust_remote_code`, and has a safe `batch_size=auto` on a CPU.

    lm-eval finds its largest batch by catching out-of-memory errors. A CPU raises none: the system kills the process.
    Here a batch on a CPU takes at most a quarter of the free memory, and at most 1 GiB.

    Args:
        pretrained (`str` or `PreTrainedModel`): folder, Hub id or model.
        device (`str`, *optional*): by default the GPU if there is one, else the CPU. (lm-eval's own default, "cuda",
            fails without a GPU.)
        **arguments: arguments of lm-eval's `hf` model.
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
    """Run lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    with quiet_git():
        cli_evaluate()


if __name__ == "__main__":
    main()
