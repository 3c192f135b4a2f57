"""The closed form of a conversion: attention weights and statistics in, EG-MLA attention weights out.

Pure functions on fp64 tensors, one layer at a time. Notation as in the model: `H` heads, `g` key/value heads, `d`
head width, `D` hidden size, `P` rotary width, `R` latent width; `j(h)` is head `h`'s key/value head.

1. **Rotary decoupling.** RoPE turns the pair `(l, l + d/2)` of every key head by the same angle: as a complex number
   times `e^{i theta_l t}`. Any invertible real mixing `M_l` of the heads' components at one frequency commutes with
   that, if the
   queries get `M_l^-T`. The mixing here makes components independent in the energy that the logits would lose without
   rotation, so that the `P / 2` rotary slots go to the components that lose most.
2. **Mean rotation.** A component without a slot turns no more; its best constant stand-in is the mean rotation
   `rho = E[e^{i theta (t - s)}]` over the positions attended to, put into the query: free at run time.
3. **Joint low rank.** What is left of the keys and all values become `R` numbers: the leading directions of their
   second moment on calibration text. Means are folded away: a constant in a key changes no softmax, and one in a value
   is a constant in the output.
"""

from dataclasses import dataclass

import torch

from .families import AttentionShape, AttentionWeights
from .statistics import LayerStatistics


@dataclass(frozen=True)
class Recipe:
    """Choices of the closed form; the defaults are the best of those in conversion/README.md.

    Attributes:
        rope_metric: `"query"` mixes and picks rotary components by the logit energy lost, `"key"` by key energy alone.
        mean_rotation: stand-in for lost rotation: `"head"` one per head, `"layer"` one for all, `"none"` uses 1.
        metric: measures the low-rank error on keys and values (`"input"`) or on logits and output (`"output"`).
        weighting: `"attention"` weighs calibration tokens by the attention they receive, `"uniform"` equally.
        centred: fold the means of keys and values away before the low rank.
        balance: weight of the keys' error against the values' (1 is equal energy).
        damping: share of the mean eigenvalue added to the output metric, against directions it saw too little of.
    """

    rope_metric: str = "query"
    mean_rotation: str = "head"
    metric: str = "input"
    weighting: str = "attention"
    centred: bool = True
    balance: float = 1.0
    damping: float = 0.01


@dataclass(frozen=True)
class LatentAttention:
    """EG-MLA attention weights of one layer, fp64, and the frequency number of each rotary slot.

    Attributes:
        q: `[H (N + P), D]`, per head first `N` rows without position, then `P` rotary rows.
        q_bias: the same rows' biases.
        kv_a: `[R + P, D]`; kv_a_bias `[R + P]`.
        kv_b: `[H (N + V), R]`.
        o: `[D, H V]`; o_bias `[D]`.
        slots: frequency numbers, `P / 2`.
        spectrum: eigenvalues of the latent's second moment, largest first (empty in exact mode).
    """

    q: torch.Tensor
    q_bias: torch.Tensor
    kv_a: torch.Tensor
    kv_a_bias: torch.Tensor
    kv_b: torch.Tensor
    o: torch.Tensor
    o_bias: torch.Tensor
    slots: list[int]
    spectrum: torch.Tensor


def exact_attention(weights: AttentionWeights, shape: AttentionShape) -> LatentAttention:
    """The same function in EG-MLA's form: every key component keeps its rotation, the values are the latent.

    `N = 0`, `P = R = g d`; each query head sits on the rotary block of its own key head and is zero elsewhere.
    """
    H, g, d, F = shape.heads, shape.kv_heads, shape.head_dim, shape.frequencies
    # Rotary rows in half-split layout: all first members of pairs, key head by key head, then all second members.
    order = torch.arange(g * d).view(g, 2, F).transpose(0, 1).reshape(-1)
    block = torch.eye(g, dtype=torch.float64).repeat_interleave(shape.group, dim=0)  # [H, g]

    def place(rows: torch.Tensor) -> torch.Tensor:
        """Rows of queries `[H d, ...]` on the blocks of their key heads `[H g d, ...]`."""
        placed = block.view(H, g, 1, 1) * rows.view(H, 1, d, -1)
        return placed.reshape(H, g * d, -1)[:, order].reshape(H * g * d, -1)

    select = torch.eye(g * d, dtype=torch.float64).view(g, d, g * d).repeat_interleave(shape.group, dim=0)
    return LatentAttention(
        q=place(weights.q),
        q_bias=place(weights.q_bias)[:, 0],
        kv_a=torch.cat((weights.v, weights.k[order])),
        kv_a_bias=torch.cat((weights.v_bias, weights.k_bias[order])),
        kv_b=select.reshape(H * d, g * d),
        o=weights.o,
        o_bias=weights.o_bias,
        slots=list(range(F)) * g,
        spectrum=torch.empty(0),
    )


def low_rank_attention(
    weights: AttentionWeights,
    shape: AttentionShape,
    statistics: LayerStatistics,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    recipe: Recipe,
    attention_factor: float = 1.0,
) -> LatentAttention:
    """EG-MLA attention of latent width `R` and rotary width `P` closest to the source's on the calibration text.

    Args:
        weights (`AttentionWeights`): the source layer.
        shape (`AttentionShape`): its widths.
        statistics (`LayerStatistics`): its second moments.
        kv_lora_rank (`int`): `R`, at most `2 g d - P`.
        qk_rope_head_dim (`int`): `P`, at most `g d`.
        recipe (`Recipe`): choices.
        attention_factor (`float`): what the rope type multiplies cosines and sines by; the rest gets it here.
    """
    H, d, P, R = shape.heads, shape.head_dim, qk_rope_head_dim, kv_lora_rank
    rotation = _mean_rotation(statistics, recipe)
    mixings, slots = _rotary_components(shape, statistics, rotation, P // 2, recipe)
    rope_q, rope_k, nope_k = _decouple(weights, shape, mixings, slots)
    turned = rotation * attention_factor**2
    nope_q = _turn(weights.q.view(H, d, -1), turned)
    nope_q_bias = _turn(weights.q_bias.view(H, d, 1), turned)

    key_metric, value_metric = _metrics(weights, shape, statistics, turned, recipe)
    mean = statistics.mean if recipe.centred else torch.zeros_like(statistics.mean)
    moment = statistics.covariance if recipe.centred else statistics.raw_moment
    down, key_up, value_up, spectrum = _joint_low_rank(
        nope_k.weight, weights.v, moment, key_metric, value_metric, R, recipe.balance
    )
    per_head = lambda up: up.view(shape.kv_heads, d, R).repeat_interleave(shape.group, dim=0)  # noqa: E731
    # v = W_V x + b_V is rebuilt as up(down(x - mean)) + W_V mean + b_V; the constant goes through o_proj once.
    value_mean = (weights.v @ mean + weights.v_bias).view(shape.kv_heads, d).repeat_interleave(shape.group, dim=0)
    return LatentAttention(
        q=torch.cat((nope_q, rope_q.weight), dim=1).reshape(H * (d + P), -1),
        q_bias=torch.cat((nope_q_bias, rope_q.bias), dim=1).reshape(-1),
        kv_a=torch.cat((down, rope_k.weight)),
        kv_a_bias=torch.cat((-down @ mean, rope_k.bias)),
        kv_b=torch.cat((per_head(key_up), per_head(value_up)), dim=1).reshape(-1, R),
        o=weights.o,
        o_bias=weights.o_bias + weights.o @ value_mean.reshape(-1),
        slots=[frequency for frequency, _ in slots],
        spectrum=spectrum,
    )


@dataclass(frozen=True)
class _Affine:
    """A linear map and its bias."""

    weight: torch.Tensor
    bias: torch.Tensor


def _mean_rotation(statistics: LayerStatistics, recipe: Recipe) -> torch.Tensor:
    """Stand-in `[H, d / 2]` for a lost rotation."""
    if recipe.mean_rotation == "none":
        return torch.ones_like(statistics.rotation)
    if recipe.mean_rotation == "layer":
        return statistics.rotation.mean(dim=0, keepdim=True).expand_as(statistics.rotation)
    return statistics.rotation


def _rotary_components(shape, statistics, rotation, slots, recipe):
    """The mixing of each frequency and the components that keep their rotation.

    Returns:
        `mixings` `[d / 2, g, g]`, rows are components; the chosen `(frequency, component)` pairs in frequency order.
    """
    H, g, F = shape.heads, shape.kv_heads, shape.frequencies
    moment = statistics.key_moment.view(g, 2, F, g, 2, F)
    energy = statistics.query_moment.diagonal(dim1=1, dim2=2).view(H, 2, F).sum(dim=1)  # E|q_h,l|^2
    # A component that is represented by rho times itself loses the share 1 - |rho|^2 of its energy.
    lost = energy * (1 - rotation.abs() ** 2) if recipe.mean_rotation != "none" else energy
    mixings, candidates = [], []
    for frequency in range(F):
        keys = sum(moment[:, half, frequency, :, half, frequency] for half in (0, 1))
        if recipe.rope_metric == "query":
            query_energy = lost[:, frequency].view(g, -1).sum(dim=1)
        else:
            query_energy = torch.ones(g, dtype=torch.float64)
        scale = query_energy.clamp_min(1e-12).sqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * keys * scale)
        mixings.append(vectors.T * scale)
        candidates += [(float(value), frequency, component) for component, value in enumerate(values)]
    chosen = sorted(candidates, reverse=True)[:slots]
    return torch.stack(mixings), sorted((frequency, component) for _, frequency, component in chosen)


def _decouple(weights, shape, mixings, slots):
    """Rotary queries `[H, P, D]`, rotary keys `[P, D]`, and keys `[g d, D]` without the components that got slots."""
    H, g, F, D = shape.heads, shape.kv_heads, shape.frequencies, shape.hidden_size
    keys = torch.cat((weights.k, weights.k_bias[:, None]), dim=1).view(g, 2, F, D + 1)
    queries = torch.cat((weights.q, weights.q_bias[:, None]), dim=1).view(H, 2, F, D + 1)
    inverse = torch.linalg.inv(mixings)  # M^-1: key heads from components
    rope_k = torch.zeros(2, len(slots), D + 1, dtype=torch.float64)
    rope_q = torch.zeros(H, 2, len(slots), D + 1, dtype=torch.float64)
    remain = torch.eye(g, dtype=torch.float64).repeat(F, 1, 1)
    for slot, (frequency, component) in enumerate(slots):
        row, column = mixings[frequency, component], inverse[frequency, :, component]
        rope_k[:, slot] = torch.einsum("j,jsx->sx", row, keys[:, :, frequency])
        rope_q[:, :, slot] = column.repeat_interleave(shape.group)[:, None, None] * queries[:, :, frequency]
        remain[frequency] -= torch.outer(column, row)
    nope_k = torch.einsum("fij,jsfx->isfx", remain, keys).reshape(g * 2 * F, D + 1)
    split = lambda rows: _Affine(rows[..., :-1], rows[..., -1:])  # noqa: E731
    rope_k_rows = rope_k.view(-1, D + 1)
    return (
        split(rope_q.view(H, -1, D + 1)),
        _Affine(rope_k_rows[:, :-1], rope_k_rows[:, -1]),
        split(nope_k),
    )


def _turn(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rows of heads `[H, d, ...]`, each pair multiplied by its complex number in `rotation` `[H, d / 2]`."""
    first, second = rows.chunk(2, dim=1)
    real, imaginary = rotation.real[..., None], rotation.imag[..., None]
    return torch.cat((first * real - second * imaginary, second * real + first * imaginary), dim=1)


def _metrics(weights, shape, statistics, rotation, recipe):
    """Square roots of what errors in keys and in values cost, block-diagonal over key/value heads, `[g d, g d]`."""
    g, n, d = shape.kv_heads, shape.group, shape.head_dim
    if recipe.metric == "input":
        identity = torch.eye(g * d, dtype=torch.float64)
        return identity, identity
    turned = _turn(_turn(statistics.query_moment, rotation).transpose(1, 2), rotation)  # E of turned queries
    outputs = weights.o.view(-1, shape.heads, d).permute(1, 0, 2)
    key_cost = turned.view(g, n, d, d).sum(dim=1)
    value_cost = (outputs.transpose(1, 2) @ outputs).view(g, n, d, d).sum(dim=1)
    roots = [torch.block_diag(*(_root(block, recipe.damping) for block in cost)) for cost in (key_cost, value_cost)]
    return roots[0], roots[1]


def _root(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Symmetric square root, with `damping` times the mean eigenvalue added to all of them."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp_min(0)
    values = values + damping * values.mean() + 1e-30
    return (vectors * values.sqrt()) @ vectors.T


def _joint_low_rank(keys, values, moment, key_metric, value_metric, rank, balance):
    """Leading `rank` directions of keys `[g d, D]` and values `[g d, D]` together.

    Returns:
        `down` `[R, D]`, `key_up` and `value_up` `[g d, R]`, and the spectrum.
    """
    energy = lambda metric, rows: torch.trace(metric @ rows @ moment @ rows.T @ metric.T)  # noqa: E731
    key_energy, value_energy = energy(key_metric, keys), energy(value_metric, values)
    # Keys that carry nothing (all rotation kept) stay as they are: scaling them up would be scaling rounding errors.
    scale = (balance * value_energy / key_energy).sqrt() if key_energy > 1e-12 * value_energy else torch.ones(())
    metric = torch.block_diag(key_metric * scale, value_metric)
    weighted = metric @ torch.cat((keys, values))
    eigenvalues, vectors = torch.linalg.eigh(weighted @ moment @ weighted.T)
    leading = vectors.flip(1)[:, :rank]
    up = torch.linalg.solve(metric, leading)
    width = keys.shape[0]
    return leading.T @ weighted, up[:width], up[width:], eigenvalues.flip(0)
