"""Dotted paths of modules."""

from __future__ import annotations

from torch import nn


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path below `root`; the empty path is `root` itself."""
    module = root
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def reach(root: nn.Module, path: str) -> nn.Module | None:
    """Return what `module_at` does, or None where there is no module."""
    found: object = root
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def join(*parts: str) -> str:
    """Join path parts with dots, leaving out the empty ones."""
    return ".".join(part for part in parts if part)
