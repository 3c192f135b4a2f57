"""What other people's tools do to a model: it works as with a stock Llama, or is refused in one clear sentence."""

import pytest
import torch
from cases import BASE, difference, tiny_model, token_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    MistralConfig,
    StaticCache,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache, export_with_dynamic_cache

from egmla import EGMLACache


ROUNDING = 2e-5  # of logits up to 10, in fp32
IDS = token_ids(2, 12)
PREFIX = 6


def uncached(model, **options) -> torch.Tensor:
    """Logits `[2, 12, V]` of one call without a cache."""
    with torch.no_grad():
        return model(IDS, use_cache=False, **options).logits


def cached(model, cache=None) -> torch.Tensor:
    """The same logits by a prompt and one call per further token."""
    with torch.no_grad():
        outputs = model(IDS[:, :PREFIX], past_key_values=cache, use_cache=True)
        logits = [outputs.logits]
        for position in range(PREFIX, IDS.shape[1]):
            step = model(IDS[:, position : position + 1], past_key_values=outputs.past_key_values)
            logits.append(step.logits)
    return torch.cat(logits, dim=1)


def generated(model, **options) -> torch.Tensor:
    """Five greedy tokens after `IDS`."""
    return model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, **options)


# --- caches of other classes and models ---

WORKING_CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic, from the config": lambda model: DynamicCache(config=model.config),
    "dynamic, from a Llama's config": lambda model: DynamicCache(config=LlamaConfig(num_hidden_layers=2)),
    "layers by hand": lambda model: Cache(layers=[DynamicLayer(), DynamicLayer()]),
    "layers made on demand": lambda model: Cache(layer_class_to_replicate=DynamicLayer),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
    "our own": lambda model: EGMLACache(model.config),
}


def filled_by_another_model(model):
    keys = torch.zeros(2, 4, 3, 12)
    return DynamicCache([(keys, keys), (keys, keys)])


REFUSED_CACHES = {
    "legacy tuple": (lambda model: ((torch.zeros(2, 4, 3, 12),) * 2,) * 2, TypeError, "type tuple: must be a cache"),
    "legacy list": (lambda model: [[torch.zeros(2, 4, 3, 12)] * 2] * 2, TypeError, "type list: must be a cache"),
    "name": (lambda model: "dynamic", TypeError, "type str: must be a cache"),
    "of an encoder and a decoder": (
        lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        TypeError,
        "EncoderDecoderCache: must be a cache of one decoder",
    ),
    "of fewer layers": (
        lambda model: DynamicCache(config=LlamaConfig(num_hidden_layers=1)),
        ValueError,
        "has 1 layers, and this model has 2",
    ),
    "with a sliding window": (
        lambda model: DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4)),
        ValueError,
        "has a sliding window, which drops old tokens",
    ),
    "filled by another model": (filled_by_another_model, ValueError, "keys of 4 heads with 12 elements"),
}


@pytest.mark.parametrize("make", WORKING_CACHES.values(), ids=WORKING_CACHES)
def test_caches_of_transformers(make):
    model = tiny_model()
    assert difference(cached(model, make(model)), uncached(model)) < ROUNDING
    assert torch.equal(generated(model, past_key_values=make(model)), generated(model))


@pytest.mark.parametrize("make, error, message", REFUSED_CACHES.values(), ids=REFUSED_CACHES)
def test_foreign_caches_are_refused(make, error, message):
    model = tiny_model()
    with pytest.raises(error, match=message) as caught:
        model(IDS, past_key_values=make(model))
    assert "EGMLACache(model.config)" in str(caught.value)


@pytest.mark.parametrize("projection", [False, True], ids=["prefixes", "prefixes by an encoder"])
def test_prefix_tuning_is_refused(projection):
    """Its prefixes are keys and values per head, which a latent cache cannot hold."""
    peft = pytest.importorskip("peft")
    options = {"prefix_projection": True, "encoder_hidden_size": 8} if projection else {}
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match="prefix tuning makes such keys: use prompt tuning, p-tuning or LoRA"):
        model(IDS, labels=IDS)
    with pytest.raises(ValueError, match="prefix tuning makes such keys"):
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)


def test_export_recipes():
    """Of the two recipes in Transformers, one makes keys and values per head, which a latent cache cannot hold."""
    ids, mask = IDS[:1, :PREFIX], torch.ones(1, PREFIX, dtype=torch.long)
    model = tiny_model()
    model.generation_config.cache_implementation = "static"
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=16)
    with pytest.raises(ValueError, match="So does convert_and_export_with_cache: use export_with_dynamic_cache"):
        module(ids, cache_position=torch.arange(PREFIX))
    model = tiny_model()
    program = export_with_dynamic_cache(model, ids, mask).module()
    cache = DynamicCache(config=model.config)
    outputs = program(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    with torch.no_grad():
        assert difference(outputs.logits, model(ids).logits) < ROUNDING


# --- tools that look into layers ---


class Catcher(nn.Module):
    """What GPTQ, AWQ, SparseGPT and Wanda put in the first layer's place to get its inputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        self.inputs, self.kwargs = hidden_states, kwargs
        return self.layer(hidden_states, **kwargs)


@pytest.mark.parametrize("case", ["input-gate", "table-gate", "post-norm"])
def test_inputs_of_a_layer_can_be_caught_and_replayed(case):
    model = tiny_model(case)
    expected = uncached(model)
    layer, catcher = model.model.layers[0], Catcher(model.model.layers[0])
    model.model.layers[0] = catcher
    assert difference(uncached(model), expected) == 0
    model.model.layers[0] = layer
    replayed = layer(catcher.inputs, **catcher.kwargs)
    with torch.no_grad():
        assert difference(replayed, model(IDS, output_hidden_states=True).hidden_states[1]) == 0


def test_attention_is_called_by_keyword_as_in_llama():
    """kvpress and others read `hidden_states` and `past_key_values` among a hook's keyword arguments."""
    model, seen = tiny_model(), []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda module, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True)
    cached(model)
    args, kwargs = seen[0]
    assert args == () and kwargs["hidden_states"].shape == (2, PREFIX, BASE["hidden_size"])
    assert kwargs["past_key_values"].get_seq_length() == IDS.shape[1]


HOOKS = {
    "output changed": lambda layer: layer.register_forward_hook(lambda module, inputs, output: output.relu()),
    "input changed": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: inputs[0] + 0.3),
}


GLOBAL_HOOKS = {
    "outputs changed": (
        nn.modules.module.register_module_forward_hook,
        lambda up: lambda module, inputs, output: output.relu() if module is up else None,
    ),
    "inputs changed": (
        nn.modules.module.register_module_forward_pre_hook,
        lambda up: lambda module, inputs: (inputs[0] + 0.3,) if module is up else None,
    ),
}


@pytest.mark.parametrize("register, make_hook", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS)
def test_hooks_on_every_module_count(register, make_hook):
    model = tiny_model()
    plain = uncached(model)
    handle = register(make_hook(model.model.layers[0].self_attn.kv_b_proj))
    try:
        assert difference(uncached(model), plain) > 0.1
        assert difference(cached(model), uncached(model)) < ROUNDING
    finally:
        handle.remove()


def test_counting_operations_leaves_decoding_as_it_is():
    """PyTorch's counter hooks every module, only to name it: it must count the absorbed step, not expand for it."""
    model = tiny_model()
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(IDS[:, -1:], past_key_values=cache)
    modules = counter.get_flop_counts()
    assert any(name.endswith("o_proj") for name in modules)
    assert not any(name.endswith("kv_b_proj") for name in modules)


LAYER_HOOKS = {
    "a tensor": lambda module, inputs: inputs[0] + 0.5,
    "a tuple": lambda module, inputs: (inputs[0] + 0.5,),
}


@pytest.mark.parametrize("hook", LAYER_HOOKS.values(), ids=LAYER_HOOKS)
@pytest.mark.parametrize("case", ["input-gate", "table-gate"])
def test_a_hook_may_replace_the_inputs_of_a_layer(case, hook):
    """As for Llama's layers, hidden states are the only positional input, and the gate keeps its own."""
    model = tiny_model(case)
    plain = uncached(model)
    model.model.layers[1].register_forward_pre_hook(hook)
    assert difference(uncached(model), plain) > 0.1
    assert difference(cached(model), uncached(model)) < ROUNDING


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_the_up_projection_count(hook):
    model = tiny_model()
    plain = uncached(model)
    hook(model.model.layers[0].self_attn.kv_b_proj)
    assert difference(uncached(model), plain) > 0.1
    assert difference(cached(model), uncached(model)) < ROUNDING


def test_hooks_on_the_up_projection_see_real_latents():
    """Every call, of the latents of all tokens so far: nothing that absorption or its checks made up."""
    model, shapes = tiny_model(), []
    up = model.model.layers[0].self_attn.kv_b_proj
    up.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    cached(model)
    assert shapes == [(2, tokens, BASE["kv_lora_rank"]) for tokens in range(PREFIX, IDS.shape[1] + 1)]


def test_a_layer_may_be_replaced_by_one_without_attention():
    class Skip(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    model = tiny_model()
    model.model.layers[1] = Skip()
    assert difference(cached(model), uncached(model)) < ROUNDING


def test_attention_may_stand_inside_another_module():
    class Halved(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, **kwargs):
            output, weights = self.attention(**kwargs)
            return output / 2, weights

    model = tiny_model()
    plain = uncached(model)
    model.model.layers[0].self_attn = Halved(model.model.layers[0].self_attn)
    assert difference(uncached(model), plain) > 0.1
    assert difference(cached(model), uncached(model)) < ROUNDING
