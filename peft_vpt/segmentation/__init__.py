"""Semantic segmentation: a SETR-PUP decoder over a prompted ViT, its evaluation, its files."""

from __future__ import annotations

from ..data.transforms import IGNORE
from .evaluation import Confusion, Scores, predict, score
from .files import load_segmenter, save_segmenter
from .model import PupHead, Segmenter, apply_to_encoder

__all__ = [
    "IGNORE",
    "Confusion",
    "PupHead",
    "Scores",
    "Segmenter",
    "apply_to_encoder",
    "load_segmenter",
    "predict",
    "save_segmenter",
    "score",
]
