"""`python -m tests.matrix`: walk timm and transformers and write docs/supported-models.md."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from .page import render
from .walk import Result, walk

_PAGE = Path(__file__).parents[2] / "docs" / "supported-models.md"


def main(arguments: list[str] | None = None) -> int:
    """Walk the libraries, print a line per architecture, write the page.

    Returns:
        The number of architectures that were neither supported nor refused.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--out", type=Path, default=_PAGE)
    parser.add_argument("--library", choices=["timm", "transformers"], action="append")
    parser.add_argument("--names", nargs="*", help="only these; nothing is written")
    options = parser.parse_args(arguments)
    libraries = options.library or ["timm", "transformers"]
    results: list[Result] = []
    for library in libraries:
        for result in walk(library, options.names):
            print(f"{library:13} {result.name:45} {result.status:10} {result.reason[:100]}")
            sys.stdout.flush()
            results.append(result)
    if not options.names:
        options.out.write_text(render(results, {name: version(name) for name in libraries}))
    return sum(result.status == "error" for result in results)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
