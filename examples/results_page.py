"""Write docs/results.md from the records beside it, and nothing else.

``docs/results/*.jsonl`` are the records of ``peft-vpt compare`` (comparison; beginnings: runs with
both first values of prompts), of ``examples/recipe_spread.py`` (rates) and of
``examples/finetune_segmentation.py`` (segmentation).
Numbers on the page come from them alone: the same records give the same page. What records do not
know, on which machine they were made and why no more, is in ``docs/results/about.md``.

Usage: ``python examples/results_page.py [--folder docs]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_vpt.experiments.plots import bar_chart
from peft_vpt.experiments.records import Record, read_records
from peft_vpt.experiments.report import (
    CONTROLS,
    accuracy_table,
    markdown_table,
    report_page,
    significance_table,
)
from peft_vpt.experiments.stats import by_task, spread, task_means

COMMAND = """```bash
peft-vpt compare --data FOLDER/{task} --model {model} --weights FILE.safetensors \\
    --size {size} --epochs {epochs} --length {length} --seeds {seeds} --factors {factors}{init}
```"""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Write the page and its figure; return the page's path."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "docs")
    folder = parser.parse_args(arguments).folder
    if not (folder / "results" / "comparison.jsonl").is_file():
        parser.error(f"{folder / 'results' / 'comparison.jsonl'}: no such file; records go there")
    page = folder / "results.md"
    page.write_text(write(folder / "results"), encoding="utf-8")
    records = read_records(folder / "results" / "comparison.jsonl")
    bar_chart(records, folder / "results" / "accuracy", title="top1 on test")
    return page


def write(folder: Path) -> str:
    """Return the page made of the records in a folder."""
    compared = read_records(folder / "comparison.jsonl")
    final = [r for r in compared if r["split"] == "test"]
    notes = [
        "## VPT-deep and linear probing", *against(final, "vpt-deep", "linear"),
        "## Rates", RATES, rates_table([r for r in compared if r["split"] == "val"]),
    ]  # fmt: skip
    begun, rates, segmented = (
        read_records(folder / f"{name}.jsonl") for name in ("beginnings", "rates", "segmentation")
    )
    if begun:
        notes += ["## Prompts that begin as tokens", *beginnings(begun)]
    if rates:
        told = SPREAD.format(**settings(rates))
        notes += ["## Default and paper preset", told, spread_table(rates)]
    if segmented:
        told = SEGMENTED.format(chosen=chosen(segmented), **settings(segmented))
        notes += ["## Segmentation", told, segmentation_table(segmented)]
    notes += ["## Run it", RUN, command(compared)]
    about = folder / "about.md"
    hand = f"\n\n{about.read_text(encoding='utf-8').strip()}" if about.is_file() else ""
    return report_page(
        compared, title="Results", intro=intro(final) + hand, notes=notes,
        figures={"Accuracy": "results/accuracy.svg"},
    )  # fmt: skip


RATES = (
    "Accuracy on val, in percent, of one seed by base learning rate. The best rate (of equals the "
    "smallest) is that of the final runs on train and val together."
)
SPREAD = (
    "VPT-deep on val, in percent, one seed, {size} px, {epochs} epochs, batch {batch} for both "
    "presets, at multiples of each preset's own learning rate, which stands beside its optimizer. "
    "Prompts begin at random but where a row says tokens. The spread is the best minus "
    'the worst over the factor of ten around 1; "!": `fit` warned that the loss had risen.'
)
BEGUN = (
    "{backbone} at {size} px, {epochs} epochs, batch {batch}, {seeds} seeds, learning rates chosen "
    "on val for each row: top1 on test in percent, mean ± standard deviation over seeds. Prompts "
    "begin at random but where a row says tokens."
)
SEGMENTED = (
    "A small SETR-PUP decoder over {backbone} on {tasks}, at {size} px, {epochs} epochs, in "
    "percent: mean and standard deviation over seeds; {chosen}. Head: the decoder alone trains."
)
RUN = (
    "One command per task; a comparison that was stopped goes on, and a run that has a record is "
    "not run again. With a GPU: `--size 224 --epochs 100 --seeds 3`, and `--preset paper` for the "
    "paper's optimizers."
)
INTRO = (
    "{backbone} on {tasks}: {images} training images, {size} px, {epochs} epochs, batch {batch}, "
    "{seeds} seeds, preset {preset} with a learning rate per protocol chosen on val. Seeds change "
    "head, prompts and the order of images, not the images: the deviations say nothing about "
    "other training sets. With {number} tasks a one-sided Wilcoxon test cannot give less than "
    "p = {least:g}."
)
# Around 1, with rates rounded as they are written.
NEAR = (0.29, 3.1)


def intro(final: Iterable[Record]) -> str:
    """Say what was run, from the configurations in the records."""
    trained = [r for r in final if r["protocol"] not in CONTROLS]
    number = len({r["task"] for r in trained})
    return INTRO.format(
        seeds=join({len({r["seed"] for r in trained})}),
        images=join({images(r) for r in trained}),
        preset=join({r["preset"] for r in trained}),
        number=number,
        least=0.5**number,
        **settings(trained),
    )


def images(record: Record) -> int:
    """Return the number of images that a final run has trained on."""
    config = record["config"]
    names = ("train", "val") if config["train"] == "trainval" else (config["train"],)
    return sum(int(config["images"][name].split(",")[0]) for name in names)


def settings(records: Iterable[Record]) -> dict[str, str]:
    """Return backbone, tasks, size, epochs and batch of runs."""
    records = list(records)
    configs = [r["config"] for r in records]
    return {
        "backbone": join({f"`{r['backbone']}`" for r in records}),
        "tasks": join({f"{r['task']} ({r['group']})" for r in records}),
        "size": join({image_size(r) for r in records}),
        "epochs": join({c["recipe"]["epochs"] for c in configs}),
        "batch": join({c["recipe"]["batch_size"] for c in configs}),
    }


def against(records: Sequence[Record], method: str, other: str) -> list[str]:
    """Return a sentence per task on how a method stands against another one."""
    values = by_task(records, metric="top1", split="test")
    ours, theirs = (task_means(values[name]) for name in (method, other))
    lines = []
    for task in sorted(set(ours) & set(theirs)):
        gain = 100 * (ours[task] - theirs[task])
        verb = "beats" if gain > 0 else "does not beat"
        lines.append(f"- {task}: {method} {verb} {other} ({gain:+.1f} points).")
    return ["\n".join(lines)]


def rates_table(records: Sequence[Record]) -> str:
    """Return val accuracy by task, protocol and learning rate."""
    rates = sorted({rate(r) for r in records})
    rows = []
    for task, protocol in dict.fromkeys((r["task"], r["protocol"]) for r in records):
        mine = {rate(r): r for r in records if (r["task"], r["protocol"]) == (task, protocol)}
        shown = [percent([mine[x]], "top1") if x in mine else "-" for x in rates]
        rows.append([f"{task}, {protocol}", *shown])
    return markdown_table(["task, protocol", *(f"{x:g}" for x in rates)], rows)


def beginnings(records: Iterable[Record]) -> list[str]:
    """Return paragraphs per size of the images: accuracy, tests, and each task against rivals."""
    trained = [r for r in records if r["split"] == "test" and r["protocol"] not in CONTROLS]
    final = [{**r, "protocol": begun_as(r)} for r in trained]
    method, parts = "vpt-deep, tokens", []
    for size in sorted({image_size(r) for r in final}):
        runs = [r for r in final if image_size(r) == size]
        seeds = len({r["seed"] for r in runs})
        parts += [BEGUN.format(seeds=seeds, **settings(runs)), accuracy_table(runs)]
        if len({r["task"] for r in runs}) > 1:
            parts.append(significance_table(runs, method=method))
        parts += against(runs, method, "linear")
    return parts


def begun_as(record: Record) -> str:
    """Return a record's protocol with the first values of its prompts where not random."""
    init = record["config"].get("options", {}).get("init")
    return f"{record['protocol']}, {init}" if init else record["protocol"]


def image_size(record: Record) -> int:
    """Return the edge of a run's images."""
    return int(record["config"]["preprocessing"]["size"][0])


def spread_table(records: Sequence[Record]) -> str:
    """Return val accuracy of each preset at multiples of its rate, and how far it spreads."""
    runs: dict[tuple[str, str], dict[float, Record]] = {}
    for record in records:
        where = f"{record['backbone'].partition('.')[0]}, {record['task']}"
        runs.setdefault((where, of_preset(record)), {})[record["factor"]] = record
    factors = sorted({factor for found in runs.values() for factor in found})
    rows = []
    for (where, kind), found in sorted(runs.items()):
        near = [r["metrics"]["top1"] for x, r in found.items() if NEAR[0] <= x <= NEAR[1]]
        shown = [percent([found[x]], "top1") + mark([found[x]]) if x in found else "-"
                 for x in factors]  # fmt: skip
        spread_of = f"{100 * (max(near) - min(near)):.1f}" if len(near) > 1 else "-"
        rows.append([f"{where}, {kind}", *shown, spread_of])
    return markdown_table(["preset", *(f"x {x:g}" for x in factors), "spread"], rows)


def of_preset(record: Record) -> str:
    """Return a record's preset with its optimizer and the rate that factors multiply.

    First values of prompts are named where they are not random.
    """
    recipe, init = record["config"]["recipe"], record["config"]["options"].get("init")
    base = recipe["base_lr"] / record["factor"]
    return f"{record['preset']}{f', {init}' if init else ''} ({recipe['optimizer']}, {base:.3g})"


def mark(records: Iterable[Record]) -> str:
    """Return what stands behind a value that something is wrong with."""
    risen = any(r.get("risen") for r in records)
    return " !" if risen else ""


def chosen(records: Iterable[Record]) -> str:
    """Say whether val had a choice of learning rates."""
    tried: dict[str, set[float]] = {}
    for record in records:
        if record["split"] == "val":
            tried.setdefault(record["protocol"], set()).add(rate(record))
    several = any(len(rates) > 1 for rates in tried.values())
    return "learning rates chosen on val" if several else "learning rates are the preset's"


def segmentation_table(records: Sequence[Record]) -> str:
    """Return mIoU on test, single- and multi-scale, and the IoU of every class."""
    final = [r for r in records if r["split"] == "test"]
    classes = [name for name in final[0]["metrics"] if name.startswith("iou ")]
    columns = {"miou": "mIoU", "miou_multi": "mIoU, multi-scale"} | {
        name: name.replace("iou", "IoU") for name in classes
    }
    rows = []
    for protocol in dict.fromkeys(r["protocol"] for r in final):
        mine = [r for r in final if r["protocol"] == protocol]
        shown = [percent(mine, name) for name in columns]
        rows.append([protocol, *shown, f"{mine[0]['trainable']:,}", str(len(mine))])
    return markdown_table(["trains", *columns.values(), "trained parameters", "seeds"], rows)


def command(records: Sequence[Record]) -> str:
    """Return the command line whose records these are."""
    tried = sorted({r["factor"] for r in records if r["split"] == "val"})
    trained = [r for r in records if r["split"] == "test" and r["protocol"] not in CONTROLS]
    first = next(r for r in trained if r["protocol"] == "vpt-deep")
    return COMMAND.format(
        task=first["task"],
        model=first["backbone"],
        size=image_size(first),
        epochs=first["config"]["recipe"]["epochs"],
        length=first["config"]["options"]["length"],
        seeds=len({r["seed"] for r in trained}),
        factors=",".join(f"{factor:g}" for factor in tried),
        # What the command does by itself needs no word.
        init="" if "init" in first["config"]["options"] else " --init random",
    )


def rate(record: Record) -> float:
    """Return the base learning rate of a run."""
    return float(record["config"]["recipe"]["base_lr"])


def percent(records: Sequence[Record], metric: str) -> str:
    """Return the mean of a share over runs, in percent, with the deviation where there is one.

    Runs without a value (of a class that is absent) do not count; "-" where none has one.
    """
    values = [r["metrics"][metric] for r in records if r["metrics"][metric] is not None]
    if not values:
        return "-"
    found = spread(values)
    return f"{100 * found.mean:.1f}{found.deviation}"


def join(values: Iterable[Any]) -> str:
    """Return values as a list in words."""
    return ", ".join(str(v) for v in sorted(values))


if __name__ == "__main__":
    print(f"written: {main()}")
