"""Base class that upstream's model tests need; export is covered by this project's own tests."""


class ExportTesterMixin:
    """No tests."""
