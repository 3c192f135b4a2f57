# Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
"""Latent attention on GPUs: vLLM's Triton kernel, whose code takes any `R` and any `P` of at least 16."""

from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAMetadataBuilder

from .vllm_backends import AnyWidthMetadata


class TritonBuilder(TritonMLAMetadataBuilder):
    """vLLM's builder, making `AnyWidthMetadata`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metadata_cls = AnyWidthMetadata


class TritonBackend(TritonMLABackend):
    """`TritonMLABackend` without its check of the width `R + P`."""

    @staticmethod
    def get_builder_cls() -> type[TritonBuilder]:
        return TritonBuilder
