"""The pages that a comparison writes: of its task, and of all tasks beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .output import complain

if TYPE_CHECKING:
    from ..experiments.ablations import Row
    from ..experiments.records import Record


def write_pages(
    records: list[Record],
    rows: list[Row],
    ablation: str | None,
    folder: Path,
    intro: str,
    suffix: str,
    chosen_lengths: bool,
) -> list[Path]:
    """Write the page of this task, and one of all tasks whose records lie in the folder.

    `report.md` is of the task whose records came first into the folder.
    """
    from ..errors import VPTError
    from ..experiments.ablations import ABLATIONS
    from ..experiments.compare import RECORDS
    from ..experiments.records import read_records
    from ..experiments.report import like, write_ablation, write_report
    from ..experiments.variants import file_name

    task = records[0]["task"]
    place = file_name(task)
    if ablation:
        chosen = ABLATIONS[ablation]
        title = f"{chosen.paper}: {ablation}, {task}"
        return [
            write_ablation(
                records,
                rows,
                chosen,
                folder,
                name=f"{ablation}-{place}{suffix}",
                title=title,
                intro=intro,
            )
        ]
    there = read_records(folder / RECORDS)
    end = suffix if there[0]["task"] == task else f"-{place}{suffix}"
    names = {"name": f"report{end}", "figure": f"accuracy{end}"}
    pages = [write_report(records, folder, title=f"Comparison on {task}", intro=intro, **names)]
    every = like(records, there, ("length",) if chosen_lengths else ())
    if len({record["task"] for record in every}) > 1:
        names = {"name": f"all-tasks{suffix}", "figure": f"all-tasks{suffix}"}
        try:
            pages.append(write_report(every, folder, title="All tasks", intro="", **names))
        except VPTError as error:
            complain(f"no page of all tasks: {error}")
    return pages
