"""The paper's printed results per task, group and test, and totals from the closed formulas.

Source: Jia et al. 2022, Tables 1, 10, 13 and 14. `EXACT`: reprinted by later publications.
`CHECKED`: from reading notes, where group means and win counts agree. The notes print the group
means of a method called Adapter that no one row gives on VTAB.
"""

from __future__ import annotations

from typing import NamedTuple

from ..data.tasks import TASKS
from .counts import VIT_B16, total_ratio

EXACT, CHECKED = "exact", "checked"
# In the order of the columns of Tables 14 and 13.
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(task.name for task in TASKS if task.group == group)
    for group in ("FGVC", "Natural", "Specialized", "Structured")
}
VTAB_GROUPS = ("Natural", "Specialized", "Structured")
CLASSES = {task.name: task.classes for task in TASKS}


class Row(NamedTuple):
    """One printed row: how far it is to be trusted, and its values in the order of the table."""

    mark: str
    values: tuple[float, ...]


# fmt: off
VTAB: dict[str, Row] = {
    "full": Row(EXACT, (68.9, 87.7, 64.3, 97.2, 86.9, 87.4, 38.8, 79.7, 95.7, 84.2, 73.9, 56.3,
                        58.6, 41.7, 65.5, 57.5, 46.7, 25.7, 29.1)),
    "linear": Row(EXACT, (63.4, 85.0, 63.2, 97.0, 86.3, 36.6, 51.0, 78.5, 87.5, 68.6, 74.0, 34.3,
                          30.6, 33.2, 55.4, 12.5, 20.0, 9.6, 19.2)),
    "partial-1": Row(CHECKED, (66.8, 85.9, 62.5, 97.3, 85.5, 37.6, 50.6, 78.6, 89.8, 72.5, 73.3,
                               41.5, 34.3, 33.9, 61.0, 31.3, 32.8, 16.3, 22.4)),
    "mlp-3": Row(CHECKED, (63.8, 84.7, 62.3, 97.4, 84.7, 32.5, 49.2, 77.0, 88.0, 70.2, 56.1, 47.8,
                           32.8, 32.3, 58.1, 12.9, 21.2, 15.2, 24.8)),
    "sidetune": Row(CHECKED, (60.7, 60.8, 53.6, 95.5, 66.7, 34.9, 35.3, 58.5, 87.7, 65.2, 61.0,
                              27.6, 22.6, 31.3, 51.7, 8.2, 14.4, 9.8, 21.8)),
    "bias": Row(EXACT, (72.8, 87.0, 59.2, 97.5, 85.3, 59.9, 51.4, 78.7, 91.6, 72.9, 69.8, 61.5,
                        55.6, 32.4, 55.9, 66.6, 40.0, 15.7, 25.1)),
    "adapter-256": Row(CHECKED, (74.1, 86.1, 63.2, 97.7, 87.0, 34.6, 50.8, 76.3, 88.0, 73.1, 70.5,
                                 45.7, 37.4, 31.2, 53.2, 30.3, 25.4, 13.8, 22.1)),
    "adapter-64": Row(CHECKED, (74.2, 85.8, 62.7, 97.6, 87.2, 36.3, 50.9, 76.3, 87.5, 73.7, 70.9,
                                42.9, 39.9, 30.4, 54.5, 31.9, 25.6, 13.5, 21.4)),
    "adapter-8": Row(CHECKED, (74.2, 85.7, 62.7, 97.8, 87.2, 36.4, 50.7, 76.9, 89.2, 73.5, 71.6,
                               45.2, 41.8, 31.1, 56.4, 30.4, 24.6, 13.2, 22.0)),
    "vpt-shallow": Row(CHECKED, (77.7, 86.9, 62.6, 97.5, 87.3, 74.5, 51.2, 78.2, 92.0, 75.6, 72.9,
                                 50.5, 58.6, 40.5, 67.1, 68.7, 36.1, 20.2, 34.1)),
    "vpt-deep": Row(EXACT, (78.8, 90.8, 65.8, 98.0, 88.3, 78.1, 49.6, 81.8, 96.1, 83.4, 68.4, 68.5,
                            60.0, 46.5, 72.8, 73.6, 47.9, 32.9, 37.8)),
}
FGVC: dict[str, Row] = {
    "full": Row(EXACT, (87.3, 82.7, 98.8, 89.4, 84.5)),
    "linear": Row(EXACT, (85.3, 75.9, 97.9, 86.2, 51.3)),
    "partial-1": Row(EXACT, (85.6, 77.8, 98.2, 85.5, 66.2)),
    "mlp-3": Row(EXACT, (85.1, 77.3, 97.9, 84.9, 53.8)),
    "sidetune": Row(CHECKED, (84.7, 75.8, 96.9, 85.8, 48.6)),
    "bias": Row(EXACT, (88.4, 84.2, 98.8, 91.2, 79.4)),
    "adapter-64": Row(EXACT, (87.1, 84.3, 98.5, 89.8, 68.6)),
    "vpt-shallow": Row(EXACT, (86.7, 78.8, 98.4, 90.7, 68.7)),
    "vpt-deep": Row(EXACT, (88.5, 84.2, 99.0, 90.2, 83.6)),
}
# Table 1 as printed: group means, and tasks on which the method beats full fine-tuning. Its
# "Adapter" is the row with reduction 64 on FGVC; on VTAB the notes do not say which.
TABLE_1: dict[str, dict[str, tuple[float, int | None]]] = {
    method: dict(zip(GROUPS, cells, strict=True))
    for method, cells in {
        "full": ((88.54, None), (75.88, None), (83.36, None), (47.64, None)),
        "linear": ((79.32, 0), (68.93, 1), (77.16, 1), (26.84, 0)),
        "partial-1": ((82.63, 0), (69.44, 2), (78.53, 0), (34.17, 0)),
        "mlp-3": ((79.80, 0), (67.80, 2), (72.83, 0), (30.62, 0)),
        "sidetune": ((78.35, 0), (58.21, 0), (68.12, 0), (23.41, 0)),
        "bias": ((88.41, 3), (73.30, 3), (78.25, 0), (44.09, 2)),
        "adapter-64": ((85.66, 2), (70.39, 4), (77.11, 0), (33.43, 0)),
        "vpt-shallow": ((84.62, 1), (76.81, 4), (79.66, 0), (46.98, 4)),
        "vpt-deep": ((89.11, 4), (78.48, 6), (82.43, 2), (54.98, 8)),
    }.items()
}
# fmt: on
# Table 1, total parameters of 24 tasks over one backbone.
TOTALS = {
    "full": 24.02,
    "linear": 1.02,
    "partial-1": 3.00,
    "mlp-3": 1.35,
    "sidetune": 3.69,
    "bias": 1.05,
    "vpt-shallow": 1.04,
    "vpt-deep": 1.18,
}
# Table 10: VPT-deep better than each, from means of five runs that are not printed.
WILCOXON = {
    "full": 1.2e-3,
    "linear": 2.7e-5,
    "mlp-3": 1.9e-6,
    "partial-1": 1.9e-5,
    "sidetune": 1.9e-6,
    "bias": 1.9e-6,
    "adapter-64": 3.8e-6,
    "vpt-shallow": 2.7e-5,
}
# Trainable parameters of ViT-B/16 in the reference's notebook, by (classes, length); deep.
NOTEBOOK = {(6, 100): 926_214, (397, 5): 351_373}


def results(method: str, group: str) -> dict[str, float]:
    """Return the printed accuracies of a method on the tasks of a group, in percent.

    Raises:
        KeyError: No such method or group.
    """
    tasks = GROUPS[group]
    if group == "FGVC":
        return dict(zip(tasks, FGVC[method].values, strict=True))
    every = [task for name in VTAB_GROUPS for task in GROUPS[name]]
    found = dict(zip(every, VTAB[method].values, strict=True))
    return {task: found[task] for task in tasks}


def vtab_results(method: str) -> dict[str, float]:
    """Return the printed accuracies of a method on the 19 tasks of VTAB-1k."""
    return {task: x for group in VTAB_GROUPS for task, x in results(method, group).items()}


def lengths(protocol: str) -> dict[str, int]:
    """Return the paper's best prompt length of each of the 24 tasks, for ViT-B/16.

    Raises:
        KeyError: Neither "vpt-deep" nor "vpt-shallow".
    """
    attribute = {"vpt-deep": "deep", "vpt-shallow": "shallow"}[protocol]
    return {task.name: getattr(task, attribute) for task in TASKS}


def total(protocol: str) -> float:
    """Return the parameters of all 24 tasks over one ViT-B/16, from the closed formulas."""
    per_task = lengths(protocol) if protocol in ("vpt-deep", "vpt-shallow") else None
    return total_ratio(VIT_B16, protocol, CLASSES, per_task=per_task)
