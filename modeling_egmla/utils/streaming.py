"""Generating with the answer shown as it comes, and the cache counted afterwards."""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer

from .accounting import cache_id_bytes, cache_nbytes


@dataclass
class Generated:
    """One generated answer.

    Attributes:
        text (`str`): the answer, without special tokens.
        prompt_tokens, new_tokens (`int`): tokens read and written.
        seconds (`float`): wall time of reading and writing together.
        cached_tokens (`int`): tokens in the cache at the end.
        cache_used_bytes, cache_allocated_bytes (`int`): counted from the cache's storages.
        cache_elements_per_token (`float`): elements in use per cached token, all layers.
        cache_layers (`int`): layers of the cache.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    cached_tokens: int
    cache_used_bytes: int
    cache_allocated_bytes: int
    cache_elements_per_token: float
    cache_layers: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, the time of reading the prompt included."""
        return self.new_tokens / self.seconds


def load_model(path: str | os.PathLike, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer to `device`, by default to the GPU when there is one.

    Raises:
        OSError: when there is no model at `path`.
        ValueError: when its architecture is unknown.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def encode_messages(tokenizer, messages: list[dict[str, str]]) -> torch.Tensor:
    """Return the ids `[1, T]` of a conversation of `{"role": ..., "content": ...}` that the assistant continues."""
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def encode_prompt(tokenizer, prompt: str, system: str | None = None, chat: bool = True) -> torch.Tensor:
    """Ids `[1, T]` of a prompt, through the chat template when the tokenizer has one and `chat` is wanted.

    Raises:
        ValueError: for an empty prompt, or a system message that has no template to go into.
    """
    if not prompt:
        raise ValueError("The prompt is empty; give some text.")
    if chat and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return encode_messages(tokenizer, messages)
    if system is not None:
        reason = "the tokenizer has no chat template" if chat else "the chat template is turned off"
        raise ValueError(f"A system message was given, but {reason}; put its text into the prompt.")
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def stream_answer(
    model: Any,
    tokenizer,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Generated:
    """Generates behind `input_ids` `[1, T]`, printing to standard output as tokens come.

    Args:
        model: a causal language model of Transformers.
        temperature (`float`): 0 takes the likeliest token each time; above, tokens are drawn.
        top_p (`float`): draw from the likeliest tokens that together have this probability.
        seed (`int`, *optional*): makes drawing repeatable.

    Raises:
        ValueError: for values out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: temperature must be at least "
            "0, top_p above 0 and at most 1, max_new_tokens at least 1."
        )
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    input_ids = input_ids.to(model.device)
    start = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
        pad_token_id=_pad_token(model, tokenizer),
        **(sampling if temperature > 0 else greedy),
    )
    seconds = time.perf_counter() - start
    answer = output.sequences[0, input_ids.shape[1] :]
    cache = output.past_key_values
    used, allocated = cache_nbytes(cache)
    cached_tokens = int(cache.get_seq_length())
    return Generated(
        text=tokenizer.decode(answer, skip_special_tokens=True),
        prompt_tokens=input_ids.shape[1],
        new_tokens=answer.numel(),
        seconds=seconds,
        cached_tokens=cached_tokens,
        cache_used_bytes=used,
        cache_allocated_bytes=allocated,
        cache_elements_per_token=(used / cached_tokens - cache_id_bytes(model.config)) / model.dtype.itemsize,
        cache_layers=len(cache.layers),
    )


def _pad_token(model: PreTrainedModel, tokenizer) -> int | None:
    """One sequence needs no padding; naming a token only keeps Transformers from warning about it."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    end = model.generation_config.eos_token_id
    return end[0] if isinstance(end, list) else end
