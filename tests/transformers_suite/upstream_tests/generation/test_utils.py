"""Marker class that upstream requires of models that generate; generation is covered by this project's own tests."""


class GenerationTesterMixin:
    """No tests."""
