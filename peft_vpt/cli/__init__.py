"""The command line, `peft-vpt`: exit codes, errors without traceback, broken pipes, Ctrl-C.

0: done, or yes. 1: failed, or no. 2: wrong usage. 130: interrupted. Results go to stdout, all else
to stderr. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

_DEBUG = "PEFT_VPT_DEBUG"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands behind the program's name. None: those of this process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = _run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            _forget_stdout()
            return 1
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        from .app import run

        run(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        _report(error)
        return 1
    return 0


def _report(error: Exception) -> None:
    from ..errors import VPTError
    from .output import complain

    if os.environ.get(_DEBUG, "") not in ("", "0"):
        traceback.print_exception(error)
    elif isinstance(error, VPTError):
        complain(f"error: {error}")
    else:
        complain(f"error: {type(error).__name__}: {error} ({_DEBUG}=1 shows where)")


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    from .output import complain

    complain(f"warning: {message}")


def _forget_stdout() -> None:
    """Let the interpreter flush into nothing when it ends."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    except (OSError, ValueError):
        pass
