"""The support matrix as a page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from .walk import Result

_CHECKED = {"forward": "at injection", "first": "at the first forward", "shape": "shapes"}
_LEGEND = """\
- **names**: architecture names (timm) or classes (transformers) with this encoder; listed below.
- **carried**: whether `deep=False` is possible (VPT-shallow).
- **checked**: where the self-check compares keys and values of every block with those that its
  softmax receives, position by position: at injection, or at the first forward where no dummy input
  is known (packed sequences); "shapes" where the model pools keys behind their projection, so that
  only heads and widths can be compared. The guard, one softmax met per attention and forward,
  stands everywhere. `tests/test_zoo.py` compares members of the families with an independent
  insertion of tokens, or a written-out window attention, in float64.
- **without prompts**: parts of the model that mix tokens or channels in another way.
- **pad**: how many of the refused names take `location="pad"`, tried on one of each class.

Names that come out equal when built small (they differ in width, depth or weights) are run once.
"""


def render(results: Iterable[Result], versions: Mapping[str, str]) -> str:
    """Return docs/supported-models.md.

    Args:
        results: Of the walk.
        versions: Of the libraries walked, by their names.
    """
    results = list(results)
    lines = [
        "# Supported models",
        "",
        "Written by `python -m tests.matrix` with "
        + " and ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        "Every architecture was built small, with random weights and the module classes of the",
        "full one, injected (dropout 0), run forward and backward, and removed again.",
        "",
        *_LEGEND.splitlines(),
        "",
    ]
    for library in versions:
        own = [result for result in results if result.library == library]
        lines += _section(library, own)
    return "\n".join(lines) + "\n"


def _section(library: str, results: list[Result]) -> list[str]:
    counts = Counter(result.status for result in results)
    lines = [
        f"## {library}",
        "",
        f"{len(results)} architectures: {counts['supported']} take prompts in their attention, "
        f"{counts['submodule']} in each of their encoders, {counts['refused']} are refused for "
        f"`location='prepend'`; {sum(r.pad for r in results)} take `location='pad'`.",
        "",
        "| encoder | example | names | carried | checked | without prompts |",
        "|---|---|---|---|---|---|",
    ]
    supported = [result for result in results if result.status == "supported"]
    for family, members in _grouped(supported, lambda r: r.family).items():
        first = members[0]
        carried = "yes" if all(m.carried for m in members) else "no"
        if carried == "no" and any(m.carried for m in members):
            carried = "some"
        checked = "; ".join(dict.fromkeys(_CHECKED[m.checked] for m in members))
        skipped = "; ".join(dict.fromkeys(part for m in members for part in m.skipped)) or "-"
        lines.append(
            f"| {family} | `{first.name}` | {len(members)} | {carried} | {checked} | {skipped} |"
        )
    return [*lines, "", *_refusals(library, results), *_names(supported)]


def _refusals(library: str, results: list[Result]) -> list[str]:
    lines = [
        f"### Refused in {library}",
        "",
        "| names | example | pad | reason |",
        "|---|---|---|---|",
    ]
    refused = [r for r in results if r.status in ("refused", "submodule", "error")]
    for reason, members in _grouped(refused, _short_reason).items():
        pad = sum(m.pad for m in members)
        lines.append(f"| {len(members)} | `{members[0].name}` | {pad} | {reason} |")
    return [*lines, ""]


def _names(supported: list[Result]) -> list[str]:
    lines = ["### Names", ""]
    for family, members in _grouped(supported, lambda r: r.family).items():
        lines += [f"- {family}: " + ", ".join(f"`{m.name}`" for m in members)]
    return [*lines, ""]


def _short_reason(result: Result) -> str:
    if result.status == "submodule":
        return "several encoders: pass one of them, the error names their paths"
    reason = result.reason.removeprefix("inject_prompts: ")
    for marker in (" in timm.models.", " in transformers.models.", " location='pad'"):
        reason = reason.partition(marker)[0]
    return reason.replace("|", "/").replace(result.name, "it").strip(" .")


def _grouped(results: list[Result], key: Callable[[Result], str]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))
