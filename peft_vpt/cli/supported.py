"""`supported`: would an architecture take prompts, and in which form."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .output import Json, quiet_stdout, write_facts, write_json

_CALL = "peft-vpt supported"
_ANSWERS = {"supported": "yes", "submodule": "yes, each of its encoders", "refused": "no"}
_CHECKED = {
    "": "",
    "forward": "keys and values of every block, at injection",
    "first": "keys and values of every block, at the first forward",
    "shape": "heads and widths only: keys are pooled behind their projection",
}
# Lengths to try, the first that fits counts: a border has to fit the patch grid.


def supported(
    name: Annotated[
        str,
        typer.Argument(help="timm architecture or transformers class name.", show_default=False),
    ],
    as_json: Json = False,
) -> None:
    """Say whether an architecture takes prompts, in which form per block, and at which locations.

    It is built small, with random weights: the module classes are those of the full model, the
    numbers of blocks and their widths are not.
    """
    with quiet_stdout(), _silence():
        answer = _ask(*_resolve(name))
    if as_json:
        write_json(answer)
    else:
        write_facts(_facts(answer))
    if answer["status"] == "refused":
        raise typer.Exit(1)


def _resolve(name: str) -> tuple[str, str]:
    """Return library and architecture behind a name.

    Raises:
        UnsupportedArchitectureError: Neither library knows it; names that are close are named.
    """
    from ..errors import UnsupportedArchitectureError

    own = name.removeprefix("hf-hub:").removeprefix("timm/").partition(".")[0]
    # Classes are capitalised, timm names are not; so only one library is imported most times.
    libraries = ("transformers", "timm") if name[:1].isupper() else ("timm", "transformers")
    known: dict[str, str] = {}
    for library in libraries:
        names = _names(library)
        if own in names or (names and library == "transformers" and _is_class(own)):
            return library, own
        known |= {found.lower(): found for found in names}
    close = difflib.get_close_matches(own.lower(), list(known), n=5)
    hint = f" Did you mean {', '.join(known[match] for match in close)}?" if close else ""
    raise UnsupportedArchitectureError(
        f"{_CALL}: {name!r} is no architecture of timm and no vision model class of "
        f"transformers, as far as they are installed.{hint}"
    )


def _names(library: str) -> list[str]:
    from matrix import small_timm, small_transformers

    try:
        return small_timm.names() if library == "timm" else small_transformers.names()
    except ModuleNotFoundError:
        return []


def _is_class(name: str) -> bool:
    """Tell whether transformers has a model class of that name; it can be built small then."""
    import transformers
    from matrix import small_transformers

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return False
    # The walk takes one class per file; others are built in the same way.
    small_transformers._classes().setdefault(name, kind)
    return True


def _ask(library: str, name: str) -> dict[str, Any]:
    """Return the walk's result, the blocks of every form, and why each location is refused."""
    from matrix.walk import Build, try_one

    from ..errors import UnsupportedArchitectureError

    try:
        model, inputs = Build(library)(name)
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{_CALL}: {library} {name} cannot be built small: {type(error).__name__}: {error}"
        ) from error
    result = try_one(library, name, lambda _: (model, inputs))
    if result.status == "error":
        raise UnsupportedArchitectureError(f"{_CALL}: {library} {name}: {result.reason}")
    return dataclasses.asdict(result) | {
        "forms": _forms(model) if result.status == "supported" else {},
        "locations": _locations(model) if result.status != "submodule" else {},
    }


def _forms(model: Any) -> dict[str, list[int]]:
    """Return the blocks of every form under the default options; a reason stands in its name."""
    from ..inject import inject_prompts, remove_prompts

    inject_prompts(model, 2)
    found: dict[str, list[int]] = {}
    for form in model.prompts.forms:
        index, kind = getattr(form, "index", None), form.extra_repr().partition("form=")[2]
        if index is not None and index not in found.setdefault(kind, []):
            found[kind].append(index)
    remove_prompts(model)
    return found


def _locations(model: Any) -> dict[str, str | None]:
    """Return why each location is refused, None where it is not."""
    from ..errors import VPTError
    from ..inject import inject_prompts, remove_prompts
    from ..spec import LOCATIONS

    found: dict[str, str | None] = {}
    for location, facts in LOCATIONS.items():
        for length in facts.tries:
            try:
                remove_prompts(inject_prompts(model, length, location=location))
                found[location] = None
                break
            except VPTError as refusal:
                found[location] = str(refusal)
    return found


def _facts(answer: dict[str, Any]) -> dict[str, str]:
    locations, forms = answer["locations"], answer["forms"]
    takes = [name for name, reason in locations.items() if reason is None]
    refused = [name for name in locations if name not in takes]
    shallow = "yes" if answer["carried"] else "no: prompts stay in their block"
    return {
        "architecture": f"{answer['library']} {answer['name']}",
        "takes prompts": _ANSWERS[answer["status"]],
        "reason": answer["reason"],
        "encoder": answer["family"],
        "form": "; ".join(
            f"{kind} in {'all blocks' if len(forms) == 1 else f'blocks {blocks}'}"
            for kind, blocks in forms.items()
        ),
        "shallow": shallow if answer["status"] == "supported" else "",
        "checked": _CHECKED[answer["checked"]],
        "locations": ", ".join(takes) or ("none" if refused else ""),
        "not at": ", ".join(refused),
        "no prompts in": "; ".join(answer["skipped"]),
    }


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the libraries quiet about their odd small models."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
