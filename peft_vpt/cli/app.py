"""The commands of `peft-vpt`, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from .. import __version__
from . import compare, cost, evaluate, files, hub, predict, supported, sweep, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done or yes, 1 failed or no, 2 wrong usage. PEFT_VPT_DEBUG=1 in the "
    "environment shows tracebacks.",
)
for _command in (
    files.info,
    files.check,
    hub.push,
    hub.pull,
    predict.predict,
    supported.supported,
    compare.compare,
    cost.cost,
    train.train,
    sweep.sweep,
):
    app.command()(_command)
app.command("eval")(evaluate.evaluate)


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


def run(arguments: Sequence[str] | None) -> None:
    """Run a command; always ends in `SystemExit` or in the command's own exception."""
    get_command(app)(args=arguments, prog_name="peft-vpt")
