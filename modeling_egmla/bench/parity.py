"""The parity check before any timing: each contestant must give the logits that its model gives without a cache.

For EG-MLA this compares the absorbed path with the expanded one. EG-MLA with its gates at identity must also give the
logits of DeepSeek-V3 with the same weights.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .contestants import Contestant, Models, compiling


# Tokens of the prompt, and tokens decoded one by one after it. The prompt fills two token groups of an int4 cache.
PROMPT, STEPS = 140, 4
# Allowed difference per dtype, from sums in another order; relative to the largest logit if that is above 1.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class ParityError(ValueError):
    """Two ways to compute the same logits disagree, so results of neither may be published."""


@torch.no_grad()
def check_parity(models: Models, contestants: Mapping[str, Contestant], most: int | None = None) -> list[dict]:
    """Compare logits of contestants over a prompt and decode steps, one model after another.

    Args:
        models (`Models`): the models, in the dtype that will be timed.
        contestants (`Mapping[str, Contestant]`): the contestants to check.
        most (`int`, *optional*): the most tokens that the models can read.

    Returns:
        `list[dict]`: contestant, what it was compared with, largest difference, and the difference allowed.

    Raises:
        ParityError: at the first difference above the tolerance.
    """
    length = min(PROMPT + STEPS, most or PROMPT + STEPS)
    rows = []
    expected: dict[str, torch.Tensor] = {}
    for name, contestant in contestants.items():
        model = models.get(contestant.role)
        ids = _ids(model, length)
        if contestant.role not in expected:
            expected = {contestant.role: model(ids, use_cache=False).logits}
        given = _cached_logits(models, contestant, ids)
        against = "its expanded path" if model.config.model_type == "egmla" else "its logits without a cache"
        rows.append(_row(name, against, given, expected[contestant.role], models.dtype, contestant.tolerance))
        if contestant.role == "deepseek" and not any(row["against"] == "EG-MLA, gates at identity" for row in rows):
            egmla = models.get("egmla")
            with gates_at_identity(egmla):
                ours = _cached_logits(models, Contestant("", "egmla"), ids)
            rows.append(_row(name, "EG-MLA, gates at identity", ours, expected[contestant.role], models.dtype))
        models.keep({contestant.role})
    return rows


def _ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def _cached_logits(models: Models, contestant: Contestant, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits `[1, T, vocab_size]` with a cache: a prompt, then single steps as they are timed."""
    model = models.get(contestant.role)
    prompt = max(1, ids.shape[1] - STEPS)
    cache = None if contestant.cache is None else contestant.cache(model, ids.shape[1])
    with contextlib.ExitStack() as stack:
        step: Any = model
        if contestant.compiled:
            step = stack.enter_context(compiling())(model)
        first = model(ids[:, :prompt], past_key_values=cache, use_cache=True)
        logits, cache = [first.logits], first.past_key_values
        for position in range(prompt, ids.shape[1]):
            logits.append(step(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


def _row(
    name: str, against: str, given: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, tolerance=None
) -> dict[str, Any]:
    difference = float((given.float() - expected.float()).abs().max())
    allowed = (tolerance or TOLERANCES[dtype]) * max(1.0, float(expected.float().abs().max()))
    if not difference <= allowed:  # NaN as well
        raise ParityError(
            f"Parity check: {name} differs from {against} by {difference:.1e} in "
            f"{str(dtype).removeprefix('torch.')}, and {allowed:.1e} is allowed; nothing is timed. Its logits are "
            "wrong, so find out why before measuring (tests/model/test_deepseek_parity.py, tests/cache/test_cache.py)."
        )
    return {"contestant": name, "against": against, "difference": difference, "allowed": allowed}


@contextlib.contextmanager
def gates_at_identity(model: PreTrainedModel) -> Iterator[None]:
    """Set every gate of an EG-MLA model to exactly 1 inside the block."""
    norms = [module for name, module in model.named_modules() if name.endswith("kv_gate_norm")]
    kept = [(norm.weight.clone(), norm.bias.clone()) for norm in norms]
    try:
        with torch.no_grad():
            for norm in norms:
                norm.weight.zero_()
                norm.bias.fill_(1)
        yield
    finally:
        with torch.no_grad():
            for norm, (weight, bias) in zip(norms, kept, strict=True):
                norm.weight.copy_(weight)
                norm.bias.copy_(bias)
