"""Benchmarks of decoding, prefill and memory, against other models."""
