"""Calibration: what a source model's attention does on real text, layer by layer.

Only one layer's weights are in memory at a time; the hidden states of all calibration sequences go from layer to
layer. Sums are kept in fp64. What is measured follows from what the closed form (`closed_form.py`) minimises.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families.base import Family
from .source import Source


# Attention maps of the first so many tokens measure the mean rotations: averages over millions of pairs.
ROTATION_TOKENS = 24576
# Second moments are of the first so many tokens where a refinement follows: it needs more text than they do.
MEASURED_TOKENS = 65536
ROWS = 256  # of an attention map that are computed at a time


def measured_sequences(sequences: torch.Tensor, refined: bool) -> int:
    """Of how many of the calibration sequences `[sequences, T]`, the first ones, second moments are taken."""
    count, length = sequences.shape
    return min(count, -(-MEASURED_TOKENS // length)) if refined else count


@dataclass
class LayerStatistics:
    """Second-order statistics of one layer's attention on the calibration text.

    Attributes:
        key_moment: `E[k k^T]` `[g d, g d]` of keys before rotation, biases and norms included; empty for MLA.
        query_moment: `E[q q^T]` `[H, d, d]` of each head's queries before rotation.
        mean: mean `[F]` of the features that a latent is linear in, tokens weighted by the attention they receive (or
            equally). The features are `[k; v]` with keys before rotation, or the latent of an MLA source.
        raw_moment: second moment `[F, F]` of the features under the same weights, not centred.
        rotation: mean rotation `[H, d / 2]`, complex: `E[e^{i theta (t - s)}]` over positions attended to.
    """

    key_moment: torch.Tensor
    query_moment: torch.Tensor
    mean: torch.Tensor
    raw_moment: torch.Tensor
    rotation: torch.Tensor

    @property
    def covariance(self) -> torch.Tensor:
        """Centred second moment `[F, F]` of the features."""
        return self.raw_moment - torch.outer(self.mean, self.mean)


class AttentionSums(NamedTuple):
    """What is kept of the attention maps of a sequence.

    Attributes:
        received: attention that each token receives from all heads and positions, `[T]`.
        rotation: sum over positions of `e^{i theta (t - s)}`, weighted by attention, `[H, d / 2]`, complex; or `None`.
    """

    received: torch.Tensor
    rotation: torch.Tensor | None


def summing_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, AttentionSums]:
    """Attention of one sequence that gives sums over its maps in their place.

    For Transformers' attention interface; a token sees none behind itself. One head at a time, so that a map stays in
    the processor's cache until it is summed up. The stock eager attention carries all heads' maps through memory
    several times, at half the speed.

    Args:
        module (`torch.nn.Module`): the attention; its `phases` are `e^{i theta t}` `[T, d / 2]` or `None`.
        query (`torch.Tensor`): `[1, H, T, d]`; key `[1, g, T, d]`, value `[1, g, T, V]`.
        attention_mask (`torch.Tensor`): `[1, 1, T, T]`, added to the scores.
        scaling (`float`): factor of the scores.
    """
    queries, keys, values = query[0] * scaling, key[0].mT, value[0]
    group, T = len(queries) // len(values), queries.shape[1]
    output = torch.empty(1, T, len(queries), values.shape[-1], device=query.device)
    received = torch.zeros(T, device=query.device)
    rotation: list[torch.Tensor] = []
    phases: Any = module.phases
    angles = None if phases is None else torch.view_as_real(phases).flatten(1)
    for head, head_queries in enumerate(queries):
        turned: Any = 0.0
        for start in range(0, T, ROWS):  # later tokens are masked: their scores need not be computed
            rows, seen = slice(start, start + ROWS), slice(min(start + ROWS, T))
            scores = torch.addmm(attention_mask[0, 0, rows, seen], head_queries[rows], keys[head // group, :, seen])
            weights = torch.softmax(scores, dim=-1)
            output[0, rows, head] = weights @ values[head // group, seen]
            received[seen] += weights.sum(dim=0)
            if angles is not None:
                attended = torch.view_as_complex((weights @ angles[seen]).view(len(weights), *phases.shape[1:], 2))
                turned = turned + (phases[rows] * attended.conj()).sum(dim=0)
        if angles is not None:
            rotation.append(turned)
    return output, AttentionSums(received, torch.stack(rotation) if rotation else None)


ALL_ATTENTION_FUNCTIONS.register("egmla_summing", summing_attention)


class _Sums:
    """Running sums behind `LayerStatistics`."""

    def __init__(self, key_width: int, weighting: str):
        self.key_width, self.weighting = key_width, weighting
        self.tokens = self.rotated_tokens = 0
        self.weight = 0.0
        # Tensors from the first sequence on, which brings their shapes.
        self.key_moment: Any = 0.0
        self.query_moment: Any = 0.0
        self.mean: Any = 0.0
        self.moment: Any = 0.0
        self.rotation: Any = 0.0

    def add(self, queries: torch.Tensor, features: torch.Tensor, seen: AttentionSums) -> None:
        """Adds a sequence: queries `[H, T, d]`, features `[T, F]`, sums over its attention maps."""
        T = features.shape[0]
        self.tokens += T
        keys = features[:, : self.key_width]
        self.key_moment += (keys.T @ keys).double()
        self.query_moment += (queries.transpose(1, 2) @ queries).double()
        # A token counts as much as it is looked at. Without this the first token of a text, which holds much of all
        # attention and whose input is far from every other, is one in a thousand and its error ruins the model.
        if self.weighting == "attention":
            weights = seen.received / len(queries)
        else:
            weights = torch.ones_like(seen.received)
        self.weight += float(weights.sum())
        self.mean += (weights @ features).double()
        self.moment += ((features * weights[:, None]).T @ features).double()
        if seen.rotation is not None:
            self.rotation += seen.rotation.to(torch.complex128)
            self.rotated_tokens += T

    def finish(self) -> LayerStatistics:
        return LayerStatistics(
            key_moment=self.key_moment.cpu() / self.tokens,
            query_moment=self.query_moment.cpu() / self.tokens,
            mean=self.mean.cpu() / self.weight,
            raw_moment=self.moment.cpu() / self.weight,
            rotation=self.rotation.cpu() / self.rotated_tokens,
        )


@dataclass
class LayerCalibration:
    """What the source's attention of one layer did on the calibration text.

    Attributes:
        statistics: its second moments.
        outputs: what it added to the hidden states, `[sequences, T, D]`.
    """

    statistics: LayerStatistics
    outputs: torch.Tensor


class SourceRun:
    """The source on calibration text: hidden states that go from layer to layer, with one layer in memory at a time.

    Args:
        source (`Source`): the checkpoint.
        family (`Family`): its family.
        sequences (`torch.Tensor`): token ids `[sequences, T]`.
        weighting (`str`): `"attention"` weighs tokens by the attention they receive, `"uniform"` equally.
        dtype (`str`): of the matrix products in sequences that are not measured, only run through.
        measured (`int`, *optional*): the first so many sequences are measured; all by default.
        device (`str`, *optional*): where it runs; by default the GPU if there is one.

    Attributes:
        embeddings: embeddings `[sequences, T, D]` of the calibration tokens, what the gates read.
        states: hidden states `[sequences, T, D]` in front of the next layer.
    """

    def __init__(
        self,
        source: Source,
        family: Family,
        sequences: torch.Tensor,
        weighting: str = "attention",
        dtype: str = "float32",
        measured: int | None = None,
        device: str | None = None,
    ):
        config, T = source.config, sequences.shape[1]
        self.measured = len(sequences) if measured is None else measured
        self.source, self.family, self.weighting, self.dtype = source, family, weighting, getattr(torch, dtype)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = family.meta_model(config).model
        self.layers = model.layers
        rotary = type(model.rotary_emb)(config).to(self.device)
        self.embeddings = source.read(family.passthrough_tensors(config, None)["model.embed_tokens.weight"])[
            sequences
        ].float()
        self.states = self.embeddings
        positions = torch.arange(T, device=self.device)[None]
        tables = rotary(self.embeddings[:1].to(self.device), positions)
        self.layer_kwargs = {"position_ids": positions, **family.layer_kwargs(tables)}
        frequencies = rotary.inv_freq[: family.shape(config).frequencies]
        self.phases = torch.polar(torch.ones_like(frequencies), torch.outer(positions[0].float(), frequencies))
        self.mask = torch.full((1, 1, T, T), -torch.inf, device=self.device).triu(1)

    @torch.no_grad()
    def measure(self, layer_idx: int, progress: Callable[[int, int], None] | None = None) -> LayerCalibration:
        """Runs the next layer, whose number is `layer_idx`; `progress` is called with (sequences done, all)."""
        source, family, layer = self.source, self.family, self.layers[layer_idx]
        shape, T = family.shape(source.config), self.states.shape[1]
        rotates = family.rotates(source.config, layer_idx)
        phases = self.phases if rotates else torch.ones_like(self.phases)
        tensors = {
            name: source.tensor(f"{family.layer_prefix(layer_idx)}{name}").float() for name in layer.state_dict()
        }
        layer.load_state_dict(tensors, assign=True)
        layer.to(self.device)
        seen = _watch(layer, family.hooked_modules(source.config))
        sums = _Sums(shape.kv_width, self.weighting)
        states, outputs = torch.empty_like(self.states), torch.empty_like(self.states)
        for index, states_before in enumerate(self.states):
            seen.clear()
            before = states_before.to(self.device)
            measured = index < self.measured
            layer.self_attn.config._attn_implementation = "egmla_summing" if measured else "sdpa"
            layer.self_attn.phases = phases if index * T < ROTATION_TOKENS else None
            mask = self.mask if measured else None
            reduced = self.dtype != torch.float32 and not measured
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=reduced):
                states[index] = layer(before[None], attention_mask=mask, **self.layer_kwargs)[0]
            *probed, attention, attended = seen
            # Where norms stand behind attention, they take its output, else the sum with what was before.
            outputs[index] = attended[0] - before if hasattr(layer, "input_layernorm") else attended[0]
            if measured:
                joined = torch.cat([output.reshape(T, -1) for output in probed], dim=-1)
                queries, features = joined.tensor_split([shape.heads * shape.head_dim], dim=-1)
                queries = queries.view(T, shape.heads, -1).transpose(0, 1)
                sums.add(queries, features, attention)
            if progress is not None:
                progress(index + 1, len(states))
        layer.to("meta")
        self.states = states
        return LayerCalibration(sums.finish(), outputs)


def _watch(layer: torch.nn.Module, probes: tuple[str, ...]) -> list[Any]:
    """A list that each forward of a layer fills.

    With what these modules of its attention give, the attention's weights, and what the norm behind it takes.
    """
    seen: list[Any] = []
    attention, norm = layer.get_submodule("self_attn"), layer.get_submodule("post_attention_layernorm")
    for name in probes:
        attention.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    attention.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen
