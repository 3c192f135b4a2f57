# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""What a user can do without converting or quantising anything: forget the middle of the context.

A peer for comparisons, for evaluation only. Transformers has no cache with sinks any more.
"""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from .kivi_style import FIRST_TOKENS


class SinkWindowLayer(DynamicLayer):
    """Keys and values of the first tokens, the sinks, and of the newest ones; those between are forgotten.

    A query sees what is held and the tokens read along with it. Only then are tokens forgotten.

    Source: StreamingLLM (arXiv 2309.17453), which numbers positions within the cache. Here tokens keep their own.

    Args:
        newest (`int`): newest tokens that are held.
    """

    is_croppable = False

    def __init__(self, newest: int):
        super().__init__()
        self.newest = newest
        self.cumulative_length = 0

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        if keys.shape[-2] > FIRST_TOKENS + self.newest:
            self.keys, self.values = (
                torch.cat((entries[:, :, :FIRST_TOKENS], entries[:, :, -self.newest :]), dim=2)
                for entries in (keys, values)
            )
        return keys, values

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = 0 if self.keys is None else self.keys.shape[-2]
        return held + query_length, self.cumulative_length - held

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("A window cannot be cropped: the tokens that it forgot would have to come back.")


class SinkWindowCache(DynamicCache):
    """The source's cache with the first 4 and the newest tokens only; for evaluation only.

    Args:
        config (`PreTrainedConfig`): of a model with full attention in all layers.
        newest (`int`): newest tokens that are held, at least 1.

    Raises:
        ValueError: without a newest token.
    """

    def __init__(self, config: PreTrainedConfig, newest: int):
        if newest < 1:
            raise ValueError(f"newest={newest}: a window holds at least 1 token besides the first {FIRST_TOKENS}.")
        super().__init__()
        self.layers = [SinkWindowLayer(newest) for _ in range(config.num_hidden_layers)]
