"""Local refinement: each converted attention trained to give what the source's gave, before anything end to end.

Layers are refined in order. A layer's input is what the converted layers before it made of the calibration text. Its
target is the output of the source's attention. So it also learns to work on the deviations it will meet. Only one
layer is in memory, and no gradient leaves it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from egmla import EGMLAConfig
from egmla.modeling_egmla import EGMLADecoderLayer, EGMLARotaryEmbedding
from egmla.utils.machine import multiplies_bf16

from .calibration import SourceRun


# Sequences the refinement does not train on: the errors in the report are theirs.
HELD_OUT_SHARE = 16
# Without refinement, the errors in the report are those of so many sequences, the last: 2 made it 5 % slower.
ERROR_SEQUENCES = 1
WARMUP_STEPS = 10
# Queries that `causal_attention_in_blocks` takes together.
BLOCK = 256


def causal_attention_in_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal attention from plain matrix products, each block of queries on the keys up to its end.

    For Transformers' attention interface, and for training on a CPU. Forward and backward take 0.55 of the time of
    SDPA's fused kernel there (1,024 tokens, bfloat16; 0.65 in fp32). The attention maps take memory in return.

    Args:
        module (`torch.nn.Module`): the attention, not looked at.
        query (`torch.Tensor`): `[B, H, T, d]`; key `[B, H, T, d]`, value `[B, H, T, V]`.
        attention_mask (`torch.Tensor`, *optional*): must be `None`: all tokens in front are seen.
        scaling (`float`): factor of the scores.

    Returns:
        Output `[B, T, H, V]`, and `None` for the maps.
    """
    if attention_mask is not None:
        raise ValueError("attention_mask: attention in blocks is causal and takes no other mask.")
    (B, H, T, _), dtype = query.shape, value.dtype
    queries = (query * scaling).to(dtype).flatten(0, 1).split(BLOCK, dim=1)
    # In pieces, so that the backward pass adds gradients up where they are, not in zeros of full length.
    keys = key.to(dtype).flatten(0, 1).split(BLOCK, dim=1)
    values = value.flatten(0, 1).split(BLOCK, dim=1)
    mask = torch.full((T, T), -torch.inf, dtype=dtype, device=query.device).triu(1).split(BLOCK)
    outputs = []
    for block, rows in enumerate(mask):
        seen, seen_values = (torch.cat(pieces[: block + 1], dim=1) for pieces in (keys, values))
        scores = torch.baddbmm(rows[:, : seen.shape[1]], queries[block], seen.mT)
        outputs.append(torch.softmax(scores, dim=-1) @ seen_values)
    return torch.cat(outputs, dim=1).view(B, H, T, -1).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("egmla_blocks", causal_attention_in_blocks)


@dataclass(frozen=True)
class Refinement:
    """Choices of the local refinement; the defaults are the best of those in tests/benchmarks/LOG.md.

    Attributes:
        steps: Adam steps for each layer; 0 leaves the closed form as it is.
        learning_rate: its peak, reached after 10 steps and brought to 0 along a cosine.
        batch_size: calibration sequences in a step.
        carry: share of the deviation of the hidden states so far that a layer is asked to take back.
        gate: train the gate with the rest, from identity.
        dtype: of the matrix products, `"float32"` or `"bfloat16"`; `"auto"` becomes bfloat16 where the machine has
            instructions for it. Weights and sums are in fp32 either way.
    """

    steps: int = 250
    learning_rate: float = 1e-3
    batch_size: int = 2
    carry: float = 0.0
    gate: bool = False
    dtype: str = "auto"

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"refine_steps={self.steps}: must be 0 (no refinement) or more.")
        if not (self.learning_rate > 0 and self.batch_size >= 1 and 0 <= self.carry <= 1):
            raise ValueError(
                f"learning_rate={self.learning_rate}, batch_size={self.batch_size}, carry={self.carry} of the "
                "refinement: the rate must be above 0, the batch at least 1 sequence, and carry from 0 to 1."
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} of the refinement: must be auto, float32 or bfloat16.")
        if self.dtype == "auto":
            fast = torch.cuda.is_available() or multiplies_bf16()
            object.__setattr__(self, "dtype", "bfloat16" if fast else "float32")


class ConvertedRun:
    """The converted layers on calibration text, beside the source's.

    Args:
        source_run (`SourceRun`): the source in front of its first layer.
        settings (`Refinement`): choices; without steps only errors are measured, on the last sequence.

    Attributes:
        states: hidden states `[sequences, T, D]` in front of the next converted layer.
    """

    def __init__(self, source_run: SourceRun, settings: Refinement):
        self.sequences = slice(None) if settings.steps else slice(-ERROR_SEQUENCES, None)
        self.embeddings = source_run.embeddings[self.sequences]
        self.states = source_run.states[self.sequences]
        self.settings, self.device = settings, source_run.device
        self.held_out = math.ceil(len(self.states) / HELD_OUT_SHARE) if settings.steps else len(self.states)

    def refine(
        self,
        config: EGMLAConfig,
        layer_idx: int,
        tensors: dict[str, torch.Tensor],
        source_states: torch.Tensor,
        wanted: torch.Tensor,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Refines the next layer and runs it.

        Args:
            config (`EGMLAConfig`): of the converted model; of its layers only this one is looked at.
            layer_idx (`int`): the layer's number.
            tensors (`dict[str, torch.Tensor]`): the layer's tensors by their names in `EGMLADecoderLayer`.
            source_states (`torch.Tensor`): the source's hidden states in front of the layer.
            wanted (`torch.Tensor`): output `[sequences, T, D]` of the source's attention.
            progress (*optional*): called with (steps done, all).

        Returns:
            The refined attention's tensors by their names in it, fp32, and the relative squared error of its output.
            The error is of the calibration sequences held out, `before` and, where there are steps, `after`. Where
            training did not help there, the closed form stays.
        """
        config._attn_implementation = "egmla_blocks" if self.device.type == "cpu" else "sdpa"
        layer = EGMLADecoderLayer(config, layer_idx)
        layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        layer.to(self.device).requires_grad_(False).eval()  # without dropout: what is trained is a fit
        positions = torch.arange(self.states.shape[1], device=self.device)[None]
        rotary = EGMLARotaryEmbedding(config)  # type: ignore[arg-type]  # its hint says Llama's, it takes any
        tables = rotary.to(self.device)(self.states.new_zeros(1, device=self.device), positions)
        # As in `EGMLAModel.forward`: each angle once.
        self.angles = tuple(table[..., : table.shape[-1] // 2].unsqueeze(1) for table in tables)
        self.wanted = wanted[self.sequences]
        if self.settings.carry:
            self.wanted = self.wanted + self.settings.carry * (source_states[self.sequences] - self.states)
        closed_form = {name: tensor.clone() for name, tensor in layer.self_attn.state_dict().items()}
        errors = {"before": self._error(layer)}
        if self.settings.steps:
            self._train(layer, layer_idx, progress)
            errors["after"] = self._error(layer)
            if not errors["after"] < errors["before"]:
                layer.self_attn.load_state_dict(closed_form)
                errors["after"] = errors["before"]
        self._advance(layer)
        return {name: tensor.detach().cpu() for name, tensor in layer.self_attn.state_dict().items()}, errors

    def _train(self, layer: EGMLADecoderLayer, layer_idx: int, progress: Callable[[int, int], None] | None) -> None:
        settings, steps = self.settings, self.settings.steps
        parameters = [
            parameter.requires_grad_()
            for name, parameter in layer.self_attn.named_parameters()
            if settings.gate or not name.startswith("kv_gate")
        ]
        optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        generator = torch.Generator().manual_seed(layer_idx)
        training = len(self.states) - self.held_out
        scale = self.wanted[:training].square().mean().to(self.device)
        with torch.enable_grad():
            for step in range(steps):
                chosen = torch.randint(training, (settings.batch_size,), generator=generator)
                with self._autocast():
                    output = self._attend(layer, chosen)
                loss = (output - self.wanted[chosen].to(self.device)).square().mean() / scale
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                if progress is not None:
                    progress(step + 1, steps)
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _attend(self, layer: EGMLADecoderLayer, sequences: torch.Tensor | slice) -> torch.Tensor:
        """Output `[B, T, D]` of the converted attention, fp32."""
        states, embeddings = (x[sequences].to(self.device) for x in (self.states, self.embeddings))
        inputs = states if layer.post_norm else layer.input_layernorm(states)
        output, _ = layer.self_attn(inputs, embeddings, position_embeddings=self.angles)
        return output.float()

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.settings.dtype)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def _error(self, layer: EGMLADecoderLayer) -> float:
        """Squared error of the attention's output on the sequences held out, relative to what is wanted."""
        error = energy = 0.0
        for index in range(len(self.states) - self.held_out, len(self.states)):
            wanted = self.wanted[index : index + 1].to(self.device)
            error += float((self._attend(layer, slice(index, index + 1)) - wanted).square().sum())
            energy += float(wanted.square().sum())
        return error / energy

    @torch.no_grad()
    def _advance(self, layer: EGMLADecoderLayer) -> None:
        states = torch.empty_like(self.states)
        for index, before in enumerate(self.states):
            with self._autocast():
                embeddings = self.embeddings[index : index + 1].to(self.device)
                states[index] = layer(before[None].to(self.device), embeddings, position_embeddings=self.angles)[0]
        self.states = states
