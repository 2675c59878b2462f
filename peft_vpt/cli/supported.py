"""`supported`: would an architecture take prompts, and in which form."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..errors import UnsupportedArchitectureError, VPTError
from .output import CALL, Json, in_the_shell, quiet_stdout, write_facts, write_json

_ANSWERS = {"supported": "yes", "submodule": "yes, each of its encoders", "refused": "no"}
_CHECKED = {
    "": "",
    "forward": "keys and values of every block, at injection",
    "first": "keys and values of every block, at the first forward",
    "shape": "heads and widths only: keys are pooled behind their projection",
}
# More is looked at without memory; what needs a forward is then left for the first real one.
_MOST_PARAMETERS = 200_000_000


def supported(
    name: Annotated[
        str,
        typer.Argument(help="timm architecture or transformers class name.", show_default=False),
    ],
    as_json: Json = False,
) -> None:
    """Say whether an architecture takes prompts, in which form per block, and at which locations.

    It is built as it is by default, with random weights; one of more than 200 million parameters
    without memory, so that nothing runs through it.
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
    own = name.removeprefix("hf-hub:").removeprefix("timm/").partition(".")[0]
    # Classes are capitalised, timm names are not; so only one library is imported most times.
    libraries = ("transformers", "timm") if name[:1].isupper() else ("timm", "transformers")
    known: dict[str, str] = {}
    for library in libraries:
        names = _names(library)
        if own in names and (library == "timm" or _is_vision_model(own)):
            return library, own
        known |= {found.lower(): found for found in names}
    close = difflib.get_close_matches(own.lower(), list(known), n=5)
    raise UnsupportedArchitectureError(
        CALL,
        f"{name!r} is no architecture of timm and no vision model class of transformers, as far "
        "as they are installed",
        f"Did you mean {', '.join(known[match] for match in close)}?" if close else "",
    )


def _names(library: str) -> list[str]:
    try:
        if library == "timm":
            import timm

            return list(timm.list_models())
        import transformers

        ends = ("Model", "ForImageClassification", "Backbone")
        return [name for name in dir(transformers) if name.endswith(ends)]
    except ModuleNotFoundError:
        return []


def _is_vision_model(name: str) -> bool:
    """Tell whether a class of transformers is a model that takes images."""
    import inspect

    import transformers

    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return False
    return "pixel_values" in inspect.signature(kind.forward).parameters


def _build(library: str, name: str) -> Any:
    """Build an architecture with random weights, a large one on the meta device.

    Raises:
        UnsupportedArchitectureError: It cannot be built by its name alone.
    """
    import torch

    def make() -> Any:
        if library == "timm":
            import timm

            return timm.create_model(name)
        import transformers

        kind: Any = getattr(transformers, name)
        return kind(kind.config_class())

    try:
        with torch.device("meta"):
            model = make()
        if sum(p.numel() for p in model.parameters()) > _MOST_PARAMETERS:
            return model.eval()
        return make().eval()
    # Whatever a library raises where a name alone is not enough.
    except Exception as error:
        raise UnsupportedArchitectureError(
            CALL, f"{library} {name} cannot be built: {type(error).__name__}: {error}"
        ) from error


def _ask(library: str, name: str) -> dict[str, Any]:
    """Return what injection says: the form of every block, and why each location is refused."""
    from ..backbones.anatomy import first_floating
    from ..inject import remove_prompts

    model = _build(library, name)
    answer = {
        "library": library,
        "name": name,
        "family": type(model).__name__,
        "status": "refused",
        "reason": "",
        "checked": "",
        "carried": False,
        "skipped": [],
        "forms": {},
        "locations": {},
        "without_memory": first_floating(model).is_meta,
    }
    refusal = _refusal(model, keep=True)
    if refusal is None:
        prompts = model.prompts
        answer |= {
            "status": "supported",
            "family": prompts.encoder.family,
            "checked": _evidence(prompts),
            "skipped": list(prompts.encoder.skipped),
            "forms": _forms(prompts),
        }
        remove_prompts(model)
        answer["carried"] = _refusal(model, deep=False) is None
    else:
        answer["reason"] = in_the_shell(refusal)
        # Of several encoders each may be prompted alone.
        paths = refusal.facts.get("paths")
        if paths and all(_refusal(model.get_submodule(path)) is None for path in paths):
            return answer | {"status": "submodule"}
    return answer | {"locations": _locations(model)}


def _refusal(model: Any, length: int = 2, *, keep: bool = False, **options: Any) -> Any:
    """Inject prompts, and take them out again unless told to keep them; return the refusal."""
    from ..inject import inject_prompts, remove_prompts

    try:
        inject_prompts(model, length, **options)
    except VPTError as refusal:
        return refusal
    if not keep:
        remove_prompts(model)
    return None


def _evidence(prompts: Any) -> str:
    attentions = [a for block in prompts.encoder.blocks for a in block.attentions]
    if any(a.reduces == "output" for a in attentions):
        return "shape"
    return "forward" if prompts.checked else "first"


def _forms(prompts: Any) -> dict[str, list[int]]:
    """Return the blocks of every form; a reason stands in its name."""
    found: dict[str, list[int]] = {}
    for form in prompts.forms:
        index, kind = getattr(form, "index", None), form.extra_repr().partition("form=")[2]
        if index is not None and index not in found.setdefault(kind, []):
            found[kind].append(index)
    return found


def _locations(model: Any) -> dict[str, str | None]:
    """Return why each location is refused, None where it is not."""
    from ..spec import LOCATIONS

    found: dict[str, str | None] = {}
    for location, facts in LOCATIONS.items():
        for length in facts.tries:
            refusal = _refusal(model, length, location=location)
            found[location] = None if refusal is None else in_the_shell(refusal)
            if refusal is None:
                break
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
        "note": "looked at without memory, for its size" if answer["without_memory"] else "",
    }


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the libraries quiet about models without trained weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
