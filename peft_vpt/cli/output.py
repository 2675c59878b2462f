"""What the commands share: options, and how results and messages are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import CODE, VPTError, cut, sentence

Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Offline = Annotated[bool, typer.Option("--offline", help="Take Hub files from the cache only.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the adapter's Hub repository.")
]
Source = Annotated[
    str, typer.Argument(metavar="FILE|FOLDER|HUB_ID", help="A task adapter.", show_default=False)
]
# What raises in a command; the one that runs is named where an error is said.
CALL = "peft-vpt"
# What a function calls an argument, where the option behind it has another name.
_ALIASES = {
    "backbone": "model",
    "base_lr": "lr",
    "commit_message": "message",
    "datasets": "dataset",
    "apply_protocol.name": "protocol",
    "num_classes": "classes",
    "path": "output",
    "repo_id": "hub_id",
}
# Code whose words in the shell are no option with that value.
_WORDS = {
    "hf auth login": "hf auth login",
    "token": "HF_TOKEN",
    "pass token=": "set HF_TOKEN",
    "resume=False": "--restart",
    "wide=True": "--grid wide",
    "load_backbone_with_adapter": "loading by its name",
    "pretrained=True": "loading pretrained weights",
}
_OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("peft_vpt_options", default={})  # noqa: B039


class Command(TyperCommand):
    """A command that notes its options, for what is said while it runs."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        words = {}
        for parameter in self.params:
            name = parameter.name or ""
            option = parameter.opts[0]
            words[name] = option if option.startswith("-") else parameter.metavar or name.upper()
        _OPTIONS.set(words)
        return super().invoke(ctx)


def in_the_shell(error: Exception, call: str = "") -> str:
    """Return an error in the words of the command line: options and variables, no arguments.

    Args:
        error: Of a function behind a command, or of the command itself.
        call: The command, in the place of the function that raised; "" where none is to be named.
    """
    if not isinstance(error, VPTError) or not error.problem:
        return str(error)
    given = [
        _said(name if value is ... else f"{name}={value}", error.call)
        or f"{name.replace('_', ' ')}{'' if value is ... else f' {_bare(value)}'}"
        for name, value in (error.facts.get("given") or {}).items()
    ]
    problem = CODE.sub(lambda found: _said(found[1]) or found[1], error.problem)
    advice = error.facts.get("shell", error.advice)
    unsaid = [code for code in CODE.findall(advice) if _said(code) is None]
    advice = "" if unsaid else CODE.sub(lambda found: _said(found[1]) or "", advice)
    where = ": ".join(part for part in (call, ", ".join(given)) if part)
    return sentence(where, error.facts.get("path"), problem, advice)


def _said(code: str, call: str = "") -> str | None:
    """Return code of a message in the shell's words, None where it has none for it."""
    if code in _WORDS:
        return _WORDS[code]
    name, _, value = code.partition("=")
    name = _ALIASES.get(f"{call}.{name}") or _ALIASES.get(name, name)
    option = _OPTIONS.get().get(name)
    return None if option is None else f"{option} {_bare(value)}".rstrip()


def _bare(value: Any) -> str:
    return cut(str(value), 80).strip("'\"")


def plain(text: str, keep: str = "") -> str:
    """Return text with every control character written out, so that it cannot steer a terminal.

    Args:
        text: Labels, file names and messages, which may come from somebody else's file.
        keep: Characters to leave alone.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def write_json(value: Any) -> None:
    """Write a value as one line of JSON, now."""
    print(json.dumps(value), flush=True)


def write_facts(facts: Mapping[str, str]) -> None:
    """Write names and values in two columns, leaving out the empty ones."""
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        if value:
            print(name.ljust(width) + plain(value))


def complain(message: str) -> None:
    """Write a message to stderr."""
    print(plain(message, keep="\n"), file=sys.stderr, flush=True)


def complain_once() -> Callable[[str], None]:
    """Return a `complain` that says nothing twice."""
    told: set[str] = set()

    def tell(message: str) -> None:
        if message not in told:
            told.add(message)
            complain(message)

    return tell


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what other libraries print to stderr: stdout is for results."""
    with redirect_stdout(sys.stderr):
        yield
