"""`egmla.model_cards`: cards for the Hub, filled from the reports in a checkpoint's folder and from nothing else."""

from .card import CARD_NAME, render_card, write_card


__all__ = ["CARD_NAME", "render_card", "write_card"]
