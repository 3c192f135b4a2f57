"""The closed form of a conversion: attention weights and statistics in, EG-MLA attention weights out.

Pure functions on fp64 tensors, one layer at a time. Notation as in the model: `H` heads, `g` key/value heads, `d`
head width, `D` hidden size, `P` rotary width, `R` latent width; `j(h)` is head `h`'s key/value head.

1. **Rotary decoupling.** RoPE rotates the pair `(l, l + d/2)` of every key head by the same angle: as a complex number
   times `e^{i theta_l t}`. Any invertible real mixing `M_l` of the heads' components at one frequency commutes with
   that, if the queries get `M_l^-T`. The mixing here makes components independent in the energy that the logits would
   lose without rotation, so that the `P / 2` rotary slots go to the components that lose most.
2. **Mean rotation.** A component without a slot rotates no more; its best constant stand-in is the mean rotation
   `rho = E[e^{i theta (t - s)}]` over the positions attended to, put into the query: free at run time.
3. **Joint low rank.** What is left of the keys and all values become `R` numbers: the leading directions of their
   second moment on calibration text. Means are folded away: a constant in a key changes no softmax, and one in a value
   is a constant in the output.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .calibration import LayerStatistics
from .families.base import AttentionShape, AttentionWeights
from .recipes import Recipe


# Energy of the constant in a latent with a norm, in mean energies of the rest: what the rest adds to the norm is less
# than a thousandth even for a text's first token, whose energy is a hundred times the mean.
CONSTANT_ENERGY = 1e5


@dataclass(frozen=True)
class LatentAttention:
    """EG-MLA attention weights of one layer, fp64, and the frequency number of each rotary slot.

    Attributes:
        q: `[H (N + P), D]`, per head first `N` rows without position, then `P` rotary rows.
        q_bias: the same rows' biases.
        kv_a: `[R + P, D]`; kv_a_bias `[R + P]`.
        kv_b: `[H (N + V), R]`.
        o: `[D, H V]`; o_bias `[D]`.
        slots: frequency numbers, `P / 2`; without meaning where the layer does not rotate.
        spectrum: eigenvalues of the latent's second moment, largest first (empty in exact mode).
        q_rope_scale: `[H, P / 2]` where normalised queries give their rotary part too, `q` then being `[H N, D]`.
        latent_gain: `[R]`, weight of the latent's norm; `None` where it has none.
        encoder: `[F, D]`, what the features that `kv_a` reads are made by before their norms, encoder_bias `[F]`;
            `None` where `kv_a` reads the layer's input.
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
    q_rope_scale: torch.Tensor | None = None
    latent_gain: torch.Tensor | None = None
    encoder: torch.Tensor | None = None
    encoder_bias: torch.Tensor | None = None


def exact_attention(weights: AttentionWeights, shape: AttentionShape, interleaved: bool = False) -> LatentAttention:
    """The same function in EG-MLA's form: every key component that rotates keeps its rotation, the rest is the latent.

    Width `P` is of all that rotates, `R` of the values and of the key components that do not rotate. A head has `N` of
    these components, 0 where whole heads rotate. Each query head sits on the rotary block of its own key head and is
    zero elsewhere.

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
    # What a head takes from the latent [values, keys that do not rotate]: those of its key/value head.
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
    normed: bool = False,
) -> LatentAttention:
    """EG-MLA attention of latent width `R` and rotary width `P` closest to the source's on the calibration text.

    All is done on the features `[k; v]` of a token, keys as they are before they rotate. Where they are linear in the
    layer's input, the maps are merged into one; else the source's projections stay before its norms, as an encoder.

    Args:
        weights (`AttentionWeights`): the source layer.
        shape (`AttentionShape`): its widths.
        statistics (`LayerStatistics`): its second moments.
        kv_lora_rank (`int`): `R`, at most `2 g d - P`.
        qk_rope_head_dim (`int`): `P`, at most the width of all keys that rotate.
        recipe (`Recipe`): choices.
        attention_factor (`float`): what the rope type multiplies cosines and sines by; what loses its rotation gets
            it here.
        rotates (`bool`): whether this layer rotates its queries and keys.
        normed (`bool`): whether queries and keys are normalised before they rotate.
    """
    H, g, d, P, R = shape.heads, shape.kv_heads, shape.head_dim, qk_rope_head_dim, kv_lora_rank
    rotation = _mean_rotation(statistics, recipe) if rotates else torch.ones_like(statistics.rotation)
    mixings, strengths = _rotary_components(shape, statistics, rotation if rotates else None, recipe)
    slots = _choose_slots(strengths, P // 2, shape, recipe)
    rope_take, rope_down, rest = _decouple(shape, mixings, slots)
    turned = rotation * attention_factor**2 if rotates else rotation

    mean = statistics.mean if recipe.centred else torch.zeros_like(statistics.mean)
    spread = moment = statistics.covariance if recipe.centred else statistics.raw_moment
    project, project_bias = torch.cat((weights.k, weights.v)), torch.cat((weights.k_bias, weights.v_bias))
    if recipe.metric == "weights":
        moment = project @ project.T  # that of inputs without any preference
    rows = torch.block_diag(rest, torch.eye(g * d, dtype=torch.float64))
    metric = _metric(weights, shape, statistics, turned, rows, moment, recipe)
    down, up, spectrum = _joint_low_rank(rows, moment, metric, R - recipe.latent_norm)
    down_bias, gain = -down @ mean, None
    if recipe.latent_norm:
        down, down_bias, up, gain = _with_norm(down, down_bias, up, spread)
    key_up, value_up = up.view(2, g, d, R).repeat_interleave(shape.group, dim=1)
    # v is rebuilt as up(down([k; v] - mean)) + the values' mean; the constant goes through o_proj once.
    value_mean = mean[g * d :].view(g, d).repeat_interleave(shape.group, dim=0).reshape(-1)
    down = torch.cat((down, torch.nn.functional.pad(rope_down, (0, g * d))))
    down_bias = torch.nn.functional.pad(down_bias, (0, P))
    common = {
        "o": weights.o,
        "o_bias": weights.o_bias + weights.o @ value_mean,
        "slots": [slot.frequency for slot in slots],
        "spectrum": spectrum,
        "latent_gain": gain,
    }
    if normed:
        # Rotary queries are pairs of the normalised one; the mean rotation goes to the keys, rotating them back.
        return LatentAttention(
            q=weights.q,
            q_bias=weights.q_bias,
            q_rope_scale=rope_take[:, torch.arange(P // 2), common["slots"]],
            encoder=project,
            encoder_bias=project_bias,
            kv_a=down,
            kv_a_bias=down_bias,
            kv_b=torch.cat((_turn(key_up, turned.conj()), value_up), dim=1).reshape(-1, R),
            **common,
        )
    queries = _joined(weights.q, weights.q_bias).view(H, d, -1)
    pairs = queries[:, : shape.rotary_head_dim].unflatten(1, (2, -1))
    rope_q = torch.einsum("hsf,hcfx->hcsx", rope_take, pairs).flatten(1, 2)
    q = torch.cat((_turn(queries, turned), rope_q), dim=1).flatten(0, 1)
    return LatentAttention(
        q=q[:, :-1],
        q_bias=q[:, -1],
        kv_a=down @ project,
        kv_a_bias=down @ project_bias + down_bias,
        kv_b=torch.cat((key_up, value_up), dim=1).reshape(-1, R),
        **common,
    )


@dataclass(frozen=True)
class SmallerLatent:
    """What makes the latent of an MLA layer smaller, fp64.

    Attributes:
        down: `[R, r]`, the smaller latent from the source's; down_bias `[R]`.
        kv_b: `[H (N + V), R]`.
        o_bias: `[D]`, what the output loses with the latent's mean.
        spectrum: eigenvalues of the latent's second moment in the metric, largest first.
    """

    down: torch.Tensor
    down_bias: torch.Tensor
    kv_b: torch.Tensor
    o_bias: torch.Tensor
    spectrum: torch.Tensor


def smaller_latent(
    kv_b: torch.Tensor, o: torch.Tensor, nope_dim: int, statistics: LayerStatistics, rank: int, recipe: Recipe
) -> SmallerLatent:
    """The `rank` directions of an MLA layer's latent that its keys and values need most.

    Args:
        kv_b (`torch.Tensor`): the source's up-projections `[H (N + V), r]`.
        o (`torch.Tensor`): its output projection `[D, H V]`.
        nope_dim (`int`): `N`.
        statistics (`LayerStatistics`): its second moments, the latent being the first of the features.
        rank (`int`): `R`, at most `r`.
        recipe (`Recipe`): metric, damping, balance, centring.
    """
    H, r = statistics.query_moment.shape[0], kv_b.shape[1]
    key_up, value_up = kv_b.view(H, -1, r).tensor_split([nope_dim], dim=1)
    mean = statistics.mean[:r] if recipe.centred else torch.zeros(r, dtype=torch.float64)
    moment = (statistics.covariance if recipe.centred else statistics.raw_moment)[:r, :r]
    if recipe.metric == "weights":
        moment = torch.eye(r, dtype=torch.float64)
    # What an error in the latent costs through all keys, and through all values.
    if recipe.metric == "output":
        queries = statistics.query_moment[:, :nope_dim, :nope_dim]
        outputs = (o.view(-1, H, value_up.shape[1]).transpose(0, 1) @ value_up).flatten(0, 1)
    else:
        queries, outputs = torch.eye(nope_dim, dtype=torch.float64), value_up.flatten(0, 1)
    key_cost, value_cost = (key_up.mT @ queries @ key_up).sum(dim=0), outputs.T @ outputs
    scale = _key_scale((key_cost @ moment).diagonal(), (value_cost @ moment).diagonal(), recipe)
    metric = _root(scale**2 * key_cost + value_cost, recipe.damping)
    down, up, spectrum = _joint_low_rank(torch.eye(r, dtype=torch.float64), moment, metric, rank)
    return SmallerLatent(
        down=down,
        down_bias=-down @ mean,
        kv_b=kv_b @ up,
        o_bias=o @ (value_up @ mean).flatten(),
        spectrum=spectrum,
    )


def _with_norm(down, down_bias, up, spread):
    """The same latent with an RMSNorm behind it, one number wider: `down`, its bias, `up` and the norm's gain.

    The new number is a constant so large that the norm divides by nearly the same for every token; the gain multiplies
    by that again, and the constant by 0.
    """
    R = len(down) + 1
    constant = (CONSTANT_ENERGY * (down @ spread @ down.T).trace()).sqrt()
    gain = (constant / R**0.5).repeat(R)
    gain[-1] = 0.0
    pad = torch.nn.functional.pad
    return pad(down, (0, 0, 0, 1)), torch.cat((down_bias, constant[None])), pad(up, (0, 1)), gain


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


class _Slot(NamedTuple):
    """A component that keeps its rotation: its group of frequencies, its place there, and its own frequency."""

    frequency: int
    group: int
    component: int


def _rotary_components(shape, statistics, rotation, recipe):
    """The mixing of each group of `M = freqfold` frequencies, and what each of its components is worth a slot.

    The members that a group mixes are the pairs `(head, frequency)`, head by head.

    Returns:
        `mixings` `[d / 2 M, g M, g M]`, rows are components; `strengths` `[d / 2 M, g M]`.
    """
    H, g, d, r, F = shape.heads, shape.kv_heads, shape.head_dim, shape.rotary_head_dim, shape.frequencies
    M = recipe.freqfold
    groups = F // M
    moment = statistics.key_moment.view(g, d, g, d)[:, :r, :, :r].reshape(g, 2, groups, M, g, 2, groups, M)
    energy = statistics.query_moment.diagonal(dim1=1, dim2=2)[:, :r].reshape(H, 2, F).sum(dim=1)  # E|q_h,l|^2
    # A component that is represented by rho times itself loses the share 1 - |rho|^2 of its energy. Where nothing
    # rotates nothing is lost, and the slots go to the components that carry most.
    known = rotation is not None and recipe.mean_rotation != "none"
    lost = energy * (1 - rotation.abs() ** 2) if known else energy
    mixings, strengths = [], []
    for group in range(groups):
        keys = sum(moment[:, half, group, :, :, half, group] for half in (0, 1)).reshape(g * M, g * M)
        members = slice(group * M, (group + 1) * M)
        if recipe.rope_metric == "heads":
            query_norm = energy[:, members].sqrt().view(g, -1, M).sum(dim=1).flatten()
            mixings.append(torch.eye(g * M, dtype=torch.float64))
            strengths.append(query_norm * keys.diagonal().clamp_min(0).sqrt())
            continue
        if recipe.rope_metric == "query":
            query_energy = lost[:, members].view(g, -1, M).sum(dim=1).flatten()
        else:
            query_energy = torch.ones(g * M, dtype=torch.float64)
        scale = query_energy.clamp_min(1e-12).sqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * keys * scale)
        mixings.append(vectors.T * scale)
        strengths.append(values)
    return torch.stack(mixings), torch.stack(strengths)


def _choose_slots(strengths, count, shape, recipe) -> list[_Slot]:
    """The `count` components that keep their rotation, in order of frequency; `strengths` as of the components."""
    groups, M = len(strengths), recipe.freqfold
    if count and recipe.slots == "uniform":
        # The frequencies of a rotary key of this width: every so many-th one of the source's.
        stride = shape.frequencies // count
        order = strengths.argsort(dim=1, descending=True)[:, : M // stride].tolist()
        return [_Slot(i * M + m * stride, i, component) for i in range(groups) for m, component in enumerate(order[i])]
    if recipe.slots == "heads":
        order = strengths.argsort(dim=0, descending=True)[: count // shape.kv_heads]
        return sorted(
            _Slot(frequency, frequency, head) for head, of in enumerate(order.T.tolist()) for frequency in of
        )
    ranked = [(float(value), i, component) for i, row in enumerate(strengths) for component, value in enumerate(row)]
    return sorted(_Slot(i, i, component) for _, i, component in sorted(ranked, reverse=True)[:count])


def _decouple(shape, mixings, slots):
    """What the slots take: of each head's query pairs `[H, P / 2, d / 2]`, and rotary keys from keys `[P, g d]`.

    The third result is what the slots leave of the keys, `[g d, g d]`.
    """
    g, d, F = shape.kv_heads, shape.head_dim, shape.frequencies
    M = F // len(mixings)
    inverse = torch.linalg.inv(mixings)  # M^-1: members from components
    take = torch.zeros(g, len(slots), F, dtype=torch.float64)
    rope = torch.zeros(2, len(slots), g, d, dtype=torch.float64)
    rest = torch.eye(g * d, dtype=torch.float64).view(g, d, g, d)
    for number, (_, group, component) in enumerate(slots):
        row, column = mixings[group, component].view(g, M), inverse[group, :, component].view(g, M)
        members = slice(group * M, group * M + M)
        take[:, number, members] = column
        for half in (0, 1):
            members = slice(half * F + group * M, half * F + group * M + M)
            rope[half, number, :, members] = row
            rest[:, members, :, members] -= torch.einsum("im,jn->imjn", column, row)
    return take.repeat_interleave(shape.group, dim=0), rope.reshape(-1, g * d), rest.reshape(g * d, g * d)


def _turn(rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """TensorSlice of heads `[H, d, ...]`, each pair multiplied by its complex number in `rotation` `[H, F]`.

    TensorSlice behind the `F` pairs belong to no pair and stay.
    """
    F = rotation.shape[1]
    first, second, rest = rows.split([F, F, rows.shape[1] - 2 * F], dim=1)
    real, imaginary = rotation.real[..., None], rotation.imag[..., None]
    return torch.cat((first * real - second * imaginary, second * real + first * imaginary, rest), dim=1)


def _metric(weights, shape, statistics, rotation, rows, moment, recipe):
    """Square root `[2 g d, 2 g d]` of what errors in the rows, keys before values, cost."""
    g, n, d = shape.kv_heads, shape.group, shape.head_dim
    keys = values = torch.eye(g * d, dtype=torch.float64)
    if recipe.metric == "output":
        turned = _turn(_turn(statistics.query_moment, rotation).transpose(1, 2), rotation)  # E of rotated queries
        outputs = weights.o.view(-1, shape.heads, d).permute(1, 0, 2)
        costs = turned, outputs.transpose(1, 2) @ outputs
        # Block-diagonal over key/value heads.
        keys, values = (
            torch.block_diag(*(_root(block, recipe.damping) for block in cost.view(g, n, d, d).sum(dim=1)))
            for cost in costs
        )
    moment = rows @ moment @ rows.T
    key_energy = (keys @ moment[: g * d, : g * d] @ keys.T).diagonal()
    value_energy = (values @ moment[g * d :, g * d :] @ values.T).diagonal()
    return torch.block_diag(keys * _key_scale(key_energy, value_energy, recipe), values)


def _key_scale(key_energy: torch.Tensor, value_energy: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """What the keys' errors are multiplied by beside the values', so that neither takes all of the latent.

    The energies are of single dimensions.
    """
    key_energy, value_energy = key_energy.clamp_min(0), value_energy.clamp_min(0)
    # Keys that carry nothing (all rotation kept) stay as they are: scaling them up would be scaling rounding errors.
    if recipe.balance_by == "none" or key_energy.sum() <= 1e-12 * value_energy.sum():
        return torch.ones((), dtype=torch.float64)
    if recipe.balance_by == "norm":
        return recipe.balance * value_energy.sqrt().mean() / key_energy.sqrt().mean()
    return (recipe.balance * value_energy.sum() / key_energy.sum()).sqrt()


def _root(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Symmetric square root, with `damping` times the mean eigenvalue added to all of them."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp_min(0)
    values = values + damping * values.mean() + 1e-30
    return (vectors * values.sqrt()) @ vectors.T


def _joint_low_rank(rows, moment, metric, rank):
    """Leading `rank` directions of `rows` `[m, F]` of features with second moment `[F, F]`, in the metric `[m, m]`.

    Returns:
        `down` `[R, F]`, `up` `[m, R]`, and the spectrum.
    """
    weighted = metric @ rows
    eigenvalues, vectors = torch.linalg.eigh(weighted @ moment @ weighted.T)
    leading = vectors.flip(1)[:, :rank]
    return leading.T @ weighted, torch.linalg.solve(metric, leading), eigenvalues.flip(0)
