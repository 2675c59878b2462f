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
from functools import partial
from typing import Annotated, Any

import typer
from typer.main import get_command

from ..errors import VPTError, VPTWarning
from ..files import __version__
from . import adapters, compare, cost, predict, supported, sweep, train
from .output import Command, complain, in_the_shell

_DEBUG = "PEFT_VPT_DEBUG"


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done or yes, 1 failed or no, 2 wrong usage. PEFT_VPT_DEBUG=1 in the "
    "environment shows tracebacks.",
)
for _command in (
    adapters.info,
    adapters.check,
    adapters.push,
    adapters.pull,
    predict.predict,
    supported.supported,
    compare.compare,
    cost.cost,
    train.train,
    sweep.sweep,
):
    app.command(cls=Command)(_command)
app.command("eval", cls=Command)(predict.evaluate)


def _version(asked: bool) -> None:
    if asked:
        print(f"peft-vpt {__version__}")
        raise typer.Exit


@app.callback()
def peft_vpt(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Visual prompt tuning: look at task adapters, share them, use them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands behind the program's name. None: those of this process.

    Returns:
        The exit code.
    """
    _prepare_streams()
    words = sys.argv[1:] if arguments is None else arguments
    call = f"peft-vpt {words[0]}" if words and not words[0].startswith("-") else "peft-vpt"
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, call)
        try:
            return _flushed(_run(arguments, call), call)
        except BrokenPipeError:
            _forget_stdout()
            return 1


def _flushed(code: int, call: str) -> int:
    """Write out what is left to write, a full disk being a failure as any other."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_stdout()
        if not code:
            _report(error, call)
        return 1
    return code


def _prepare_streams() -> None:
    """Let every character be written, and give what is written to a closed stream to nobody."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Python's own answer to a stream that was closed before it started.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _run(arguments: Sequence[str] | None, call: str) -> int:
    try:
        get_command(app)(args=arguments, prog_name="peft-vpt")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        _report(error, call)
        return 1
    return 0


def _report(error: Exception, call: str) -> None:
    if os.environ.get(_DEBUG, "") not in ("", "0"):
        traceback.print_exception(error)
    elif isinstance(error, VPTError):
        complain(f"error: {in_the_shell(error, call)}")
    else:
        complain(f"error: {type(error).__name__}: {error} ({_DEBUG}=1 shows where)")


def _show_warning(call: str, message: Warning | str, *args: Any, **kwargs: Any) -> None:
    told = in_the_shell(message.error, call) if isinstance(message, VPTWarning) else message
    complain(f"warning: {told}")


def _forget_stdout() -> None:
    """Let the interpreter flush into nothing when it ends."""
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
    except (OSError, ValueError):
        pass
