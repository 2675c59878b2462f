"""The errors of the library: every one is a `ValueError` whose message says what to do next."""

from __future__ import annotations


class VPTError(ValueError):
    """Base of everything that this library raises on purpose."""


class UnsupportedArchitectureError(VPTError):
    """The model, or a part of it, cannot take prompts exactly; the message says which and why."""


class AlreadyPromptedError(VPTError):
    """The model already carries prompts."""


class NotPromptedError(VPTError):
    """The call needs a prompted model."""


class SpecError(VPTError):
    """An option, or a pair of options, is wrong."""


class AdapterError(VPTError):
    """A task adapter file cannot be read or written."""


class AdapterMismatchError(AdapterError):
    """A sound task adapter file that was made for another backbone or another head."""
