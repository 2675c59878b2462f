"""Backbones by name, at the address under which cards that are on the Hub already import them."""

from .hub.backbone import build_backbone, default_processor

__all__ = ["build_backbone", "default_processor"]
