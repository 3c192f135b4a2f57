"""Publish a checkpoint folder on the Hub: check it first, then send it as one commit."""

from egmla.model_cards.metadata import check_repo_id

from .loading import check_loads_without_package
from .preflight import FolderReport, check_folder
from .push import PushedFile, PushReport, push_folder


__all__ = [
    "FolderReport",
    "PushReport",
    "PushedFile",
    "check_folder",
    "check_loads_without_package",
    "check_repo_id",
    "push_folder",
]
