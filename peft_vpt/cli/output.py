"""What the commands share: options, and how results and messages are written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
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
_CALLS = r"^(?:load_backbone_with_adapter|load_task_adapter|push_task_adapter)(?:\((.*?)\))?: "
# What the functions behind the commands say to who calls them, and what a shell has in its place.
_IN_THE_SHELL = (
    (r"\bpass token=", "set HF_TOKEN"),
    (r"\bcheck revision=", "check --revision"),
    (r"\brevision='([^']*)'", r"--revision \1"),
    (r"\bpass base_model='owner/name'", "give --base-model owner/name"),
    (r"\bbase_model=", "--base-model "),
    (r"\brepo_id=", "HUB_ID "),
    (r"\bpass backbone=", "give --model"),
    (r"\bbackbone='([^']*)'", r"--model \1"),
    (r"\blicense=, datasets=, metrics=,", "--license, --dataset,"),
    (r" strict=False loads it all the same\.", ""),
    (r"[;,]( or)? strict='prompts' loads the prompts alone\.", "."),
)


def in_the_shell(message: str, call: str = "") -> str:
    """Return a message in the words of the command line: options and variables, no arguments.

    Args:
        message: Of a function behind a command, or of the command itself.
        call: The command, in the place of the function that the message begins with.
    """
    for words, ours in _IN_THE_SHELL:
        message = re.sub(words, ours, message)
    found = re.match(_CALLS, message)
    if found is None:
        return message
    parts = (call, found[1], message[found.end() :])
    return ": ".join(part for part in parts if part)


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
