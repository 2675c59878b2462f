"""Visual prompt tuning for timm and Hugging Face vision transformers, in place.

>>> import peft_vpt
>>> sorted(peft_vpt.__all__)[:3]
['PromptSpec', 'VPTError', 'apply_protocol']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter.verbs import load_task_adapter, save_task_adapter
    from .errors import VPTError
    from .files import __version__ as __version__
    from .hub.verbs import push_task_adapter
    from .inject import (
        count_parameters,
        disable_prompts,
        inject_prompts,
        is_prompted,
        remove_prompts,
        trainable_parameters,
    )
    from .protocols.apply import apply_protocol
    from .spec import PromptSpec

_HOMES = {
    "__version__": "files",
    "apply_protocol": "protocols.apply",
    "PromptSpec": "spec",
    "VPTError": "errors",
    "count_parameters": "inject",
    "disable_prompts": "inject",
    "inject_prompts": "inject",
    "is_prompted": "inject",
    "load_task_adapter": "adapter.verbs",
    "push_task_adapter": "hub.verbs",
    "remove_prompts": "inject",
    "save_task_adapter": "adapter.verbs",
    "trainable_parameters": "inject",
}
__all__ = [
    "PromptSpec",
    "VPTError",
    "apply_protocol",
    "count_parameters",
    "disable_prompts",
    "inject_prompts",
    "is_prompted",
    "load_task_adapter",
    "push_task_adapter",
    "remove_prompts",
    "save_task_adapter",
    "trainable_parameters",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), so that `import peft_vpt` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
