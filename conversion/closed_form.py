"""The closed form of a conversion: attention weights and statistics in, EG-MLA attention weights out.

Pure functions on fp64 tensors, one layer at a time. Notation as in the model: `H` heads, `g` key/value heads, `d`
head width, `D` hidden size, `P` rotary width, `R` latent width; `j(h)` is head `h`'s key/value head.

1. **Rotary decoupling.** RoPE turns the pair `(l, l + d/2)` of every key head by the same angle: as a complex number
   times `e^{i theta_l t}`. Any invertible real mixing `M_l` of the heads' components at one frequency commutes with
   that, if the queries get `M_l^-T`. The mixing here makes components independent in the energy that the logits would
   lose without rotation, so that the `P / 2` rotary slots go to the components that lose most.
2. **Mean rotation.** A component without a slot turns no more; its best constant stand-in is the mean rotation
   `rho = E[e^{i theta (t - s)}]` over the positions attended to, put into the query: free at run time.
3. **Joint low rank.** What is left of the keys and all values become `R` numbers: the leading directions of their
   second moment on calibration text. Means are folded away: a constant in a key changes no softmax, and one in a value
   is a constant in the output.
"""

from dataclasses import dataclass

import torch

from .family import AttentionShape, AttentionWeights
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
        slots: frequency numbers, `P / 2`; without meaning where the layer does not turn.
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


def exact_attention(weights: AttentionWeights, shape: AttentionShape, interleaved: bool = False) -> LatentAttention:
    """The same function in EG-MLA's form: every key component that turns keeps its rotation, the rest is the latent.

    `P` is the width of all that turns, `R` that of the values and of key components that do not, `N` such components
    of a head (0 where whole heads turn). Each query head sits on the rotary block of its own key head and is zero
    elsewhere.

    Args:
        weights (`AttentionWeights`): the source layer.
        shape (`AttentionShape`): its widths.
        interleaved (`bool`): rotary rows head by head, pairs beside one another, instead of first members of all
            pairs before all second ones.
    """
    H, g, d, r, F = shape.heads, shape.kv_heads, shape.head_dim, shape.rotary_head_dim, shape.frequencies
    N = d - r
    pairs = torch.arange(g * r).view(g, 2, F)
    order = pairs.transpose(1, 2).reshape(-1) if interleaved else pairs.transpose(0, 1).reshape(-1)
    block = torch.eye(g, dtype=torch.float64).repeat_interleave(shape.group, dim=0)  # [H, g]

    queries = _joined(weights.q, weights.q_bias).view(H, d, -1)
    rope_q = (block.view(H, g, 1, 1) * queries[:, None, :r]).reshape(H, g * r, -1)[:, order]
    q = torch.cat((queries[:, r:], rope_q), dim=1).reshape(H * (N + g * r), -1)
    keys = _joined(weights.k, weights.k_bias).view(g, d, -1)
    values = _joined(weights.v, weights.v_bias)
    kv_a = torch.cat((values, keys[:, r:].flatten(0, 1), keys[:, :r].flatten(0, 1)[order]))
    # What a head takes from the latent [values, keys that do not turn]: those of its key/value head.
    take_v = torch.eye(g * d, dtype=torch.float64).view(g, d, g * d)
    take_k = torch.eye(g * N, dtype=torch.float64).view(g, N, g * N)
    kv_b = torch.zeros(g, N + d, g * (d + N), dtype=torch.float64)
    kv_b[:, :N, g * d :], kv_b[:, N:, : g * d] = take_k, take_v
    return LatentAttention(
        q=q[:, :-1],
        q_bias=q[:, -1],
        kv_a=kv_a[:, :-1],
        kv_a_bias=kv_a[:, -1],
        kv_b=kv_b.repeat_interleave(shape.group, dim=0).reshape(H * (N + d), -1),
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
    rotates: bool = True,
) -> LatentAttention:
    """EG-MLA attention of latent width `R` and rotary width `P` closest to the source's on the calibration text.

    Args:
        weights (`AttentionWeights`): the source layer.
        shape (`AttentionShape`): its widths.
        statistics (`LayerStatistics`): its second moments.
        kv_lora_rank (`int`): `R`, at most `2 g d - P`.
        qk_rope_head_dim (`int`): `P`, at most the width of all keys that turn.
        recipe (`Recipe`): choices.
        attention_factor (`float`): what the rope type multiplies cosines and sines by; what loses its rotation gets
            it here.
        rotates (`bool`): whether this layer turns its queries and keys.
    """
    H, d, P, R = shape.heads, shape.head_dim, qk_rope_head_dim, kv_lora_rank
    rotation = _mean_rotation(statistics, recipe) if rotates else torch.ones_like(statistics.rotation)
    mixings, slots = _rotary_components(shape, statistics, rotation if rotates else None, P // 2, recipe)
    rope_q, rope_k, nope_k = _decouple(weights, shape, mixings, slots)
    turned = rotation * attention_factor**2 if rotates else rotation
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


def _joined(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A weight with its bias as one more column."""
    return torch.cat((weight, bias[:, None]), dim=1)


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
    H, g, d, r, F = shape.heads, shape.kv_heads, shape.head_dim, shape.rotary_head_dim, shape.frequencies
    moment = statistics.key_moment.view(g, d, g, d)[:, :r, :, :r].reshape(g, 2, F, g, 2, F)
    energy = statistics.query_moment.diagonal(dim1=1, dim2=2)[:, :r].reshape(H, 2, F).sum(dim=1)  # E|q_h,l|^2
    # A component that is represented by rho times itself loses the share 1 - |rho|^2 of its energy. Where nothing
    # turns nothing is lost, and the slots go to the components that carry most.
    known = rotation is not None and recipe.mean_rotation != "none"
    lost = energy * (1 - rotation.abs() ** 2) if known else energy
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
    H, g, d, D = shape.heads, shape.kv_heads, shape.head_dim, shape.hidden_size
    r, F = shape.rotary_head_dim, shape.frequencies
    all_keys = _joined(weights.k, weights.k_bias).view(g, d, D + 1)
    keys = all_keys[:, :r].reshape(g, 2, F, D + 1)
    queries = _joined(weights.q, weights.q_bias).view(H, d, D + 1)[:, :r].reshape(H, 2, F, D + 1)
    inverse = torch.linalg.inv(mixings)  # M^-1: key heads from components
    rope_k = torch.zeros(2, len(slots), D + 1, dtype=torch.float64)
    rope_q = torch.zeros(H, 2, len(slots), D + 1, dtype=torch.float64)
    remain = torch.eye(g, dtype=torch.float64).repeat(F, 1, 1)
    for slot, (frequency, component) in enumerate(slots):
        row, column = mixings[frequency, component], inverse[frequency, :, component]
        rope_k[:, slot] = torch.einsum("j,jsx->sx", row, keys[:, :, frequency])
        rope_q[:, :, slot] = column.repeat_interleave(shape.group)[:, None, None] * queries[:, :, frequency]
        remain[frequency] -= torch.outer(column, row)
    rest = torch.einsum("fij,jsfx->isfx", remain, keys).reshape(g, r, D + 1)
    nope_k = torch.cat((rest, all_keys[:, r:]), dim=1).reshape(g * d, D + 1)
    split = lambda rows: _Affine(rows[..., :-1], rows[..., -1:])  # noqa: E731
    rope_k_rows = rope_k.view(-1, D + 1)
    return (
        split(rope_q.view(H, -1, D + 1)),
        _Affine(rope_k_rows[:, :-1], rope_k_rows[:, -1]),
        split(nope_k),
    )


def _turn(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rows of heads `[H, d, ...]`, each pair multiplied by its complex number in `rotation` `[H, F]`.

    Rows behind the `F` pairs belong to no pair and stay.
    """
    F = rotation.shape[1]
    first, second, rest = rows.split([F, F, rows.shape[1] - 2 * F], dim=1)
    real, imaginary = rotation.real[..., None], rotation.imag[..., None]
    return torch.cat((first * real - second * imaginary, second * real + first * imaginary, rest), dim=1)


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
