"""The slow oracle: an EG-MLA model in fp64, loops written from the design's equations, no code shared with the model.

c_t = W_DKV x_t (+ b)                     latent; RMS-normed when kv_latent_norm
g_t = LayerNorm(W_g e_t)                  gate of the token's embedding
z_t = c_t * g_t                           gated latent
kr_t = RoPE(W_KR x_t, t)
score_h(t, s) = tau (qn_h . W_UK,h z_s + qr_h . kr_s),  s <= t
y_t = W_O concat_h(sum_s softmax_s(score_h)(t, s) W_UV,h z_s) (+ b)

With kv_gate="expanded", z_t = c_t and W_UK,h z_s, W_UV,h z_s are multiplied by their head's part of g_s instead.
With an encoder, W_DKV and W_KR read RMSNorm groups of W_E x_t (+ b) in the place of x_t.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Reference:
    """Everything the oracle computes for one batch; `layers` holds each layer's per-sequence results."""

    logits: torch.Tensor
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    attentions: list[torch.Tensor] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)  # as they are cached
    rope_keys: list[torch.Tensor] = field(default_factory=list)


def rms_norm(x, weight, eps):
    return weight * x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps)


def layer_norm(x, weight, bias, eps):
    mean = sum(float(v) for v in x) / len(x)
    variance = sum((float(v) - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + eps) * weight + bias


def silu(x):
    return x / (1 + torch.exp(-x))


def rope_frequencies(config, length):
    """Angle per position of each rotary pair, and the factor on cos and sin, for a sequence of `length` tokens."""
    parameters = config.rope_parameters
    kind, theta, dim = parameters["rope_type"], parameters["rope_theta"], config.head_dim
    longest = config.max_position_embeddings
    factor = parameters.get("factor", 1.0)
    if kind == "dynamic" and length > longest:
        theta = theta * (factor * length / longest - (factor - 1)) ** (dim / (dim - 2))
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return [frequency / factor for frequency in plain], 1.0
    original = parameters["original_max_position_embeddings"]
    if kind == "longrope":
        divisors = parameters["long_factor"] if length > original else parameters["short_factor"]
        scale = math.sqrt(1 + math.log(factor) / math.log(original))
        return [frequency / divisor for frequency, divisor in zip(plain, divisors, strict=True)], scale
    if kind == "llama3":
        low, high, result = parameters["low_freq_factor"], parameters["high_freq_factor"], []
        for frequency in plain:
            turns = original * frequency / (2 * math.pi)
            share = min(1.0, max(0.0, (turns - low) / (high - low)))
            result.append((1 - share) * frequency / factor + share * frequency)
        return result, 1.0
    # YaRN: frequencies that rotate often over the original length stay, slow ones are stretched, a ramp lies between.
    if kind != "yarn":
        raise NotImplementedError(kind)

    def dimension_of(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension_of(parameters["beta_fast"])), 0)
    last = min(math.ceil(dimension_of(parameters["beta_slow"])), dim - 1)
    result = []
    for i, frequency in enumerate(plain):
        stretched = min(1.0, max(0.0, (i - first) / (last - first)))
        result.append(stretched * frequency / factor + (1 - stretched) * frequency)

    def mscale(strength):
        return 0.1 * strength * math.log(factor) + 1

    if "mscale" in parameters:
        return result, mscale(parameters["mscale"]) / mscale(parameters["mscale_all_dim"])
    return result, mscale(1.0)


def turn(x, position, frequencies, scale, interleaved):
    """RoPE of one vector: pair `i` rotated by `position * frequencies[i]`; first members first in the result."""
    pairs = len(x) // 2
    turned = torch.empty_like(x)
    for i in range(pairs):
        a, b = (x[2 * i], x[2 * i + 1]) if interleaved else (x[i], x[i + pairs])
        angle = position * frequencies[i]
        turned[i] = scale * (a * math.cos(angle) - b * math.sin(angle))
        turned[i + pairs] = scale * (a * math.sin(angle) + b * math.cos(angle))
    return turned


def softmax_scale(config):
    """tau: the config's own, else `(N + P) ** -0.5` times YaRN's mscale squared."""
    if config.softmax_scale is not None:
        return config.softmax_scale
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    strength = config.rope_parameters.get("mscale_all_dim", 0)
    if strength:
        scale *= (0.1 * strength * math.log(config.rope_parameters["factor"]) + 1) ** 2
    return scale


def reference_forward(config, state_dict, input_ids, positions=None) -> Reference:
    """Logits `[B, T, vocab_size]` and intermediate results of ids `[B, T]`, every sequence on its own."""
    weights = {name: tensor.detach().double() for name, tensor in state_dict.items()}
    rows = [_sequence(config, weights, ids.tolist(), positions) for ids in input_ids]
    joined = Reference(torch.stack([row.logits for row in rows]))
    for name in ("hidden_states", "attentions", "latents", "rope_keys"):
        values = zip(*(getattr(row, name) for row in rows), strict=True)
        setattr(joined, name, [torch.stack(value) for value in values])
    return joined


def _sequence(config, weights, ids, positions) -> Reference:
    length = len(ids)
    positions = list(range(length)) if positions is None else positions
    embedding = weights["model.embed_tokens.weight"]
    states = [embedding[token] for token in ids]
    result = Reference(torch.empty(0), [torch.stack(states)])
    # Norms before and behind attention, before and behind the MLP.
    names = ("input_layernorm", None, "post_attention_layernorm", None)
    if config.post_norm:
        names = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        local = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        taken = _norms(config, local, names[0], states)
        given = _attention(config, layer, local, taken, ids, embedding, positions, result)
        states = [x + y for x, y in zip(states, _norms(config, local, names[1], given), strict=True)]
        given = [_mlp(local, x) for x in _norms(config, local, names[2], states)]
        states = [x + y for x, y in zip(states, _norms(config, local, names[3], given), strict=True)]
        result.hidden_states.append(torch.stack(states))
    final = [rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps) for x in states]
    result.hidden_states[-1] = torch.stack(final)  # Transformers reports the last one normed
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    result.logits = torch.stack([head @ x for x in final])
    return result


def _linear(weights, name, x):
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _norms(config, weights, name, states):
    """The layer's norm of that name on every state; `None` leaves them."""
    return states if name is None else [rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps) for x in states]


def _group_norm(weights, name, x, eps):
    """RMS norm of groups of elements as wide as the norm, where there is such a norm."""
    weight = weights.get(f"{name}.weight")
    return x if weight is None else torch.cat([rms_norm(group, weight, eps) for group in x.split(len(weight))])


def _features(config, weights, x):
    """What latents and rotary keys are linear in: the layer's input, or its encoder's output."""
    if config.kv_encoder_dim is None:
        return x
    features = _linear(weights, "self_attn.kv_encoder_proj", x)
    normed = config.kv_encoder_norm_dim * config.kv_encoder_norm_groups
    eps = config.latent_norm_eps
    return torch.cat((_group_norm(weights, "self_attn.kv_encoder_norm", features[:normed], eps), features[normed:]))


def _normed_query(config, weights, x, slots):
    """Each head's normalised query, and behind it the pairs of it that rotate, scaled: `[H, N + P]`."""
    heads, N, half = config.num_attention_heads, config.qk_nope_head_dim, config.head_dim // 2
    query = _group_norm(weights, "self_attn.q_norm", _linear(weights, "self_attn.q_proj", x), config.rms_norm_eps)
    rows = []
    for h, nope in enumerate(query.view(heads, N)):
        scale = weights["self_attn.q_rope_scale"][h]
        first = [scale[i] * nope[slot] for i, slot in enumerate(slots)]
        second = [scale[i] * nope[slot + half] for i, slot in enumerate(slots)]
        rows.append(torch.cat((nope, torch.stack(first + second))))
    return torch.stack(rows)


def _mlp(weights, x):
    inner = silu(_linear(weights, "mlp.gate_proj", x)) * _linear(weights, "mlp.up_proj", x)
    return _linear(weights, "mlp.down_proj", inner)


def _attention(config, layer, weights, inputs, ids, embedding, positions, result):
    heads, N, P, V = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    R = config.kv_lora_rank[layer] if isinstance(config.kv_lora_rank, list) else config.kv_lora_rank
    frequencies, scale = rope_frequencies(config, max(positions) + 1) if P else ([], 1.0)
    slots = config.rope_slots
    if slots is not None:
        slots = slots[layer] if isinstance(slots[0], list) else slots
        frequencies = [frequencies[slot] for slot in slots]
    rotates = layer not in (config.nope_layers or [])
    tau = softmax_scale(config)

    latents, gates, rope_keys, queries = [], [], [], []
    for x, token, position in zip(inputs, ids, positions, strict=True):
        compressed = _linear(weights, "self_attn.kv_a_proj_with_mqa", _features(config, weights, x))
        latent, rope_key = compressed[:R], compressed[R:]
        if config.kv_latent_norm:
            latent = rms_norm(latent, weights["self_attn.kv_a_layernorm.weight"], config.latent_norm_eps)
        if config.kv_gate is not None:
            e = embedding[token]
            if config.kv_gate_embedding_dim is not None:
                e = weights["self_attn.kv_gate_embedding.weight"][token]
            g = layer_norm(
                weights["self_attn.kv_gate_proj.weight"] @ e,
                weights["self_attn.kv_gate_norm.weight"],
                weights["self_attn.kv_gate_norm.bias"],
                config.rms_norm_eps,
            )
            if config.kv_gate == "latent":
                latent = latent * g
            gates.append(g)
        latents.append(latent)
        rope_key = _group_norm(weights, "self_attn.k_norm", rope_key, config.rms_norm_eps)
        if rotates:
            rope_key = turn(rope_key, position, frequencies, scale, config.rope_interleave)
        rope_keys.append(rope_key)
        if config.query_norm_dim is not None:
            query = _normed_query(config, weights, x, slots or range(P // 2))
        elif config.q_lora_rank is None:
            query = _linear(weights, "self_attn.q_proj", x)
        else:
            query = _linear(weights, "self_attn.q_a_proj", x)
            query = rms_norm(query, weights["self_attn.q_a_layernorm.weight"], config.latent_norm_eps)
            query = _linear(weights, "self_attn.q_b_proj", query)
        queries.append(query.view(heads, N + P))

    up = weights["self_attn.kv_b_proj.weight"].view(heads, N + V, R)
    # Each head's keys and values of each token, `[T][H]` vectors of N + V.
    expanded = [[up[h] @ latent for h in range(heads)] for latent in latents]
    if config.kv_gate == "expanded":
        for s, g in enumerate(gates):
            for h in range(heads):
                expanded[s][h] = expanded[s][h] * g[h * (N + V) : (h + 1) * (N + V)]
    attention = torch.zeros(heads, len(ids), len(ids), dtype=torch.float64)
    outputs = []
    for t, position in enumerate(positions):
        joined = []
        for h in range(heads):
            nope = queries[t][h, :N]
            rope = queries[t][h, N:]
            if config.qk_norm_dim is not None:
                rope = _group_norm(weights, "self_attn.q_norm", rope, config.rms_norm_eps)
            if rotates:
                rope = turn(rope, position, frequencies, scale, config.rope_interleave)
            scores = [tau * float(nope @ expanded[s][h][:N] + rope @ rope_keys[s]) for s in range(t + 1)]
            exponentials = [math.exp(score - max(scores)) for score in scores]
            shares = [exponential / sum(exponentials) for exponential in exponentials]
            attention[h, t, : t + 1] = torch.tensor(shares, dtype=torch.float64)
            joined.append(sum(share * expanded[s][h][N:] for s, share in enumerate(shares)))
        outputs.append(_linear(weights, "self_attn.o_proj", torch.cat(joined)))
    result.attentions.append(attention)
    result.latents.append(torch.stack(latents))
    result.rope_keys.append(torch.stack(rope_keys))
    return outputs
