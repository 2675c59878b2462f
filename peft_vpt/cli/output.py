"""What the commands share: options, and how results and messages are written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Offline = Annotated[bool, typer.Option("--offline", help="Take Hub files from the cache only.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the adapter's Hub repository.")
]
Source = Annotated[
    str, typer.Argument(metavar="FILE|FOLDER|HUB_ID", help="A task adapter.", show_default=False)
]


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


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what other libraries print to stderr: stdout is for results."""
    with redirect_stdout(sys.stderr):
        yield
