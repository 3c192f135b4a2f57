"""Calibration: what a source model's attention does on real text, layer by layer.

Only one layer's weights are in memory at a time; the hidden states of all calibration sequences go from layer to
layer. Sums are kept in fp64. What is measured follows from what the closed form (`closed_form.py`) minimises.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb  # as Llama's, for parts of a head too

from .family import AttentionShape, Family
from .sources import Source


# Attention maps of this many sequences measure the mean rotations: averages over millions of pairs.
ROTATION_SEQUENCES = 24


@dataclass
class LayerStatistics:
    """Second-order statistics of one layer's attention on the calibration text.

    Attributes:
        key_moment: `E[k k^T]` `[g d, g d]` of keys before rotation, bias included.
        query_moment: `E[q q^T]` `[H, d, d]` of each head's queries before rotation.
        mean: mean `[D]` of the attention's input, tokens weighted by the attention they receive (or equally).
        raw_moment: second moment `[D, D]` of the attention's input under the same weights, not centred.
        rotation: mean rotation `[H, d / 2]`, complex: `E[e^{i theta (t - s)}]` over positions attended to.
    """

    key_moment: torch.Tensor
    query_moment: torch.Tensor
    mean: torch.Tensor
    raw_moment: torch.Tensor
    rotation: torch.Tensor

    @property
    def covariance(self) -> torch.Tensor:
        """Centred second moment `[D, D]` of the attention's input."""
        return self.raw_moment - torch.outer(self.mean, self.mean)


class _Linear(NamedTuple):
    """A linear map in fp32, `bias` is `None` where the source has none."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, self.weight, self.bias)


class _Sums:
    """Running sums behind `LayerStatistics`."""

    def __init__(self, shape: AttentionShape, weighting: str):
        H, d, D = shape.heads, shape.head_dim, shape.hidden_size
        self.shape, self.weighting = shape, weighting
        self.tokens = 0
        self.key_moment = torch.zeros(shape.kv_width, shape.kv_width, dtype=torch.float64)
        self.query_moment = torch.zeros(H, d, d, dtype=torch.float64)
        self.weight = 0.0
        self.weighted_input = torch.zeros(D, dtype=torch.float64)
        self.weighted_moment = torch.zeros(D, D, dtype=torch.float64)
        self.rotated_tokens = 0
        self.rotation = torch.zeros(H, shape.frequencies, dtype=torch.complex128)

    def add(self, inputs, queries, keys, attention, phases):
        """Adds a sequence: inputs `[T, D]`, queries `[H, T, d]`, keys `[g, T, d]`, attention `[H, T, T]`, phases."""
        T = inputs.shape[0]
        self.tokens += T
        flat_keys = keys.transpose(0, 1).reshape(T, -1)
        self.key_moment += (flat_keys.T @ flat_keys).double()
        self.query_moment += (queries.transpose(1, 2) @ queries).double()
        # A token counts as much as it is looked at. Without this the first token of a text, which holds much of all
        # attention and whose input is far from every other, is one in a thousand and its error ruins the model.
        if self.weighting == "attention":
            weights = attention.sum(dim=(0, 1)) / attention.shape[0]
        else:
            weights = torch.ones(T)
        self.weight += float(weights.sum())
        self.weighted_input += (weights @ inputs).double()
        self.weighted_moment += ((inputs * weights[:, None]).T @ inputs).double()
        if phases is not None:
            seen = (attention.to(phases.dtype).reshape(-1, T) @ phases.conj()).view(-1, T, phases.shape[1])
            self.rotation += (phases * seen).sum(dim=1)
            self.rotated_tokens += T

    def finish(self) -> LayerStatistics:
        return LayerStatistics(
            key_moment=self.key_moment / self.tokens,
            query_moment=self.query_moment / self.tokens,
            mean=self.weighted_input / self.weight,
            raw_moment=self.weighted_moment / self.weight,
            rotation=self.rotation / self.rotated_tokens,
        )


@torch.no_grad()
def collect_statistics(
    source: Source,
    family: Family,
    sequences: torch.Tensor,
    weighting: str = "attention",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LayerStatistics]:
    """Runs the source over calibration sequences and yields each layer's statistics in order.

    Args:
        source (`Source`): the checkpoint.
        family (`Family`): its family.
        sequences (`torch.Tensor`): token ids `[sequences, T]`.
        weighting (`str`): `"attention"` weighs tokens by the attention they receive, `"uniform"` equally.
        progress (*optional*): called with (sequences done in this layer, sequences in all).
    """
    config, shape = source.config, family.shape(source.config)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    rotary = type(skeleton.model.rotary_emb)(config)
    T = sequences.shape[1]
    positions = torch.arange(T)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    phases = torch.polar(torch.ones(()), torch.outer(torch.arange(T).float(), rotary.inv_freq))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    embedding = source.tensor("model.embed_tokens.weight")
    hidden = [embedding[ids].float()[None] for ids in sequences]

    for layer_idx, layer in enumerate(skeleton.model.layers):
        rotates = family.rotates(config, layer_idx)
        layer_phases = phases if rotates else torch.ones_like(phases)
        q, k, v, o = _load_layer(layer, source, family, layer_idx)
        sums = _Sums(shape, weighting)
        for index, states in enumerate(hidden):
            inputs = layer.input_layernorm(states)
            queries = q(inputs).view(1, T, shape.heads, shape.head_dim).transpose(1, 2)
            keys = k(inputs).view(1, T, shape.kv_heads, shape.head_dim).transpose(1, 2)
            turned = apply_rotary_pos_emb(queries, keys, cos, sin) if rotates else (queries, keys)
            scores = turned[0][0] @ turned[1][0].repeat_interleave(shape.group, dim=0).transpose(1, 2)
            weights = (scores * shape.head_dim**-0.5).masked_fill_(future, -torch.inf).softmax(dim=-1)
            sums.add(inputs[0], queries[0], keys[0], weights, layer_phases if index < ROTATION_SEQUENCES else None)
            values = v(inputs).view(T, shape.kv_heads, shape.head_dim).transpose(0, 1)
            output = weights @ values.repeat_interleave(shape.group, dim=0)
            states = states + o(output.transpose(0, 1).reshape(1, T, -1))
            hidden[index] = states + layer.mlp(layer.post_attention_layernorm(states))
            if progress is not None:
                progress(index + 1, len(hidden))
        layer.to("meta")
        yield sums.finish()


def _load_layer(layer: torch.nn.Module, source: Source, family: Family, layer_idx: int) -> list[_Linear]:
    """Puts a layer's norms and MLP in the place of its meta tensors, in fp32; returns its maps `q`, `k`, `v`, `o`."""
    attention = family.read_attention(source, layer_idx)
    del layer.self_attn
    tensors = {name: source.tensor(f"model.layers.{layer_idx}.{name}").float() for name in layer.state_dict()}
    layer.load_state_dict(tensors, assign=True)
    maps = []
    for role in "qkvo":
        bias = getattr(attention, f"{role}_bias").float() if role in family.bias_roles(source.config) else None
        maps.append(_Linear(getattr(attention, role).float(), bias))
    return maps
