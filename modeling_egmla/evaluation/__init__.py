"""Measuring models: perplexity on a text, decode speed and cache bytes."""
