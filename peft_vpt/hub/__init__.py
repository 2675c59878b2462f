"""Task adapters on the Hugging Face Hub."""

from .backbone import build_backbone
from .verbs import load_backbone_with_adapter, push_task_adapter

__all__ = ["build_backbone", "load_backbone_with_adapter", "push_task_adapter"]
