"""Task adapters on the Hugging Face Hub."""

from .verbs import load_backbone_with_adapter, push_task_adapter

__all__ = ["load_backbone_with_adapter", "push_task_adapter"]
