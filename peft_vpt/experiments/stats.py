"""Statistics over seeds and tasks: means, Wilcoxon, Welch, Holm, standard errors."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..checks import integer, number, one_of
from ..errors import SpecError, VPTError
from .records import Record, values_of

_EXACT_UP_TO = 25
# Accuracies are printed with a few digits; differences that are equal there must tie, which binary
# fractions hide (0.3 - 0.1 is not 0.2).
_DIGITS = 10
_ALTERNATIVES = one_of("greater", "less", "two-sided")
_ZEROS = one_of("wilcox", "pratt")


class Spread(NamedTuple):
    """Mean and sample standard deviation (0 for one value), and the number of values."""

    mean: float
    std: float
    number: int

    @property
    def deviation(self) -> str:
        """What stands behind a mean in percent: " ± 1.4", "" for one value."""
        return f" ± {100 * self.std:.1f}" if self.number > 1 else ""


class Significance(NamedTuple):
    """A test: its statistic, its p-value, the pairs (or seeds) it used, and how it was computed."""

    statistic: float
    p_value: float
    number: int
    method: str


def spread(values: Iterable[float]) -> Spread:
    """Return mean, sample standard deviation and number.

    Raises:
        SpecError: No values.
    """
    found = [float(value) for value in values]
    if not found:
        raise SpecError("spread", "there are no values")
    deviation = statistics.stdev(found) if len(found) > 1 else 0.0
    return Spread(statistics.fmean(found), deviation, len(found))


def accuracy_error(accuracy: float, images: int) -> float:
    """Return the binomial standard error of an accuracy over `images` test images."""
    number(0, 1).check("accuracy_error", "accuracy", accuracy)
    integer(1).check("accuracy_error", "images", images)
    return math.sqrt(accuracy * (1 - accuracy) / images)


def wilcoxon(
    first: Mapping[str, float] | Sequence[float],
    second: Mapping[str, float] | Sequence[float],
    *,
    alternative: str = "greater",
    zeros: str = "wilcox",
) -> Significance:
    """Test over tasks whether a method is better than another: Wilcoxon's signed-rank test.

    Up to 25 pairs the p-value is exact, also under ties (over all signs of the midranks); above
    that it is scipy's normal approximation.

    Args:
        first: Results by task, or in the same order as `second`.
        second: Of the other method.
        alternative: "greater" (the first is better), "less" or "two-sided".
        zeros: What becomes of tasks without a difference: "wilcox" drops them, "pratt" ranks them
            and drops them then.

    Returns:
        The sum of the positive ranks, the p-value, and the number of differences that are not zero.

    Raises:
        SpecError: Other tasks on either side, no tasks, or a wrong option.

    Source: Jia et al. 2022, appendix, Table 10.
    """
    _ALTERNATIVES.check("wilcoxon", "alternative", alternative)
    _ZEROS.check("wilcoxon", "zeros", zeros)
    pairs = _pairs(first, second)
    if not all(math.isfinite(value) for pair in pairs for value in pair):
        advice = "leave its task out on both sides"
        raise SpecError("wilcoxon", "a result is not finite", advice)
    from scipy import stats

    differences = [round(a - b, _DIGITS) for a, b in pairs]
    moved = sum(d != 0 for d in differences)
    if not moved:
        return Significance(0.0, 1.0, 0, "no differences")
    ranked = differences if zeros == "pratt" else [d for d in differences if d]
    # Midranks of the sizes; those of zeros are dropped here at the latest.
    ranks = list(zip(map(float, stats.rankdata([abs(d) for d in ranked])), ranked, strict=True))
    positive = sum(rank for rank, d in ranks if d > 0)
    if moved <= _EXACT_UP_TO:
        p_value = _exact_p([rank for rank, d in ranks if d], positive, alternative)
        return Significance(positive, p_value, moved, f"exact, zeros={zeros}")
    found: Any = stats.wilcoxon(
        differences, alternative=alternative, zero_method=zeros, method="approx"
    )
    return Significance(positive, float(found.pvalue), moved, f"normal, zeros={zeros}")


def welch(
    first: Sequence[float], second: Sequence[float], *, alternative: str = "greater"
) -> Significance:
    """Test over seeds of one task whether a method is better than another: Welch's t-test.

    Args:
        first: Results of at least two seeds.
        second: Of the other method.
        alternative: "greater" (the first is better), "less" or "two-sided".

    Returns:
        t, the p-value (NaN where neither method varies, so that nothing can be said), and the
        number of seeds of both.

    Raises:
        SpecError: Fewer than two seeds on a side, or a wrong option.

    Source: Jia et al. 2022, appendix, Figure 16.
    """
    _ALTERNATIVES.check("welch", "alternative", alternative)
    if min(len(first), len(second)) < 2:
        given = {"first": first, "second": second}
        raise SpecError("welch", "needs two seeds or more on each side", given=given)
    count = len(first) + len(second)
    if len(set(first)) == len(set(second)) == 1:
        return Significance(math.nan, math.nan, count, "Welch, neither varies")
    from scipy import stats

    with warnings.catch_warnings():
        # Seeds that come to nearly the same; the statistic is large then, as it should be.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        found = stats.ttest_ind(list(first), list(second), equal_var=False, alternative=alternative)
    return Significance(float(found.statistic), float(found.pvalue), count, "Welch")


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method, in the same order.

    NaN, of a test that says nothing, stays NaN and does not count.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    tested = [i for i, p_value in enumerate(p_values) if not math.isnan(p_value)]
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for place, index in enumerate(sorted(tested, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(tested) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def by_task(
    records: Iterable[Record], *, metric: str = "top1", split: str = "test"
) -> dict[str, dict[str, list[float]]]:
    """Return the values of a metric by protocol and task, one per seed, in the order of the seeds.

    Runs without that metric are left out.

    Raises:
        VPTError: No runs are left, or two of the same seed, which differ in backbone or settings: a
            mean over them would say nothing.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for record, value in values_of("by_task", records, metric, split):
        runs = found.setdefault(record["protocol"], {}).setdefault(record["task"], {})
        if record["seed"] in runs:
            raise VPTError(
                "by_task",
                f"two {split} runs of {record['protocol']} on {record['task']} with seed "
                f"{record['seed']}",
                "choose one backbone and one setting by `select(records, ...)`",
            )
        runs[record["seed"]] = value
    return {
        protocol: {task: [runs[seed] for seed in sorted(runs)] for task, runs in of.items()}
        for protocol, of in found.items()
    }


def task_means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean over runs of each task."""
    return {task: spread(runs).mean for task, runs in values.items()}


def wins(first: Mapping[str, float], second: Mapping[str, float], *, ties: bool = False) -> int:
    """Count the tasks that both have on which the first is better; with `ties`, also equal ones."""
    shared = set(first) & set(second)
    differences = (round(first[task] - second[task], _DIGITS) for task in shared)
    return sum(d > 0 or (ties and d == 0) for d in differences)


def _pairs(first: Any, second: Any) -> list[tuple[float, float]]:
    problem = ""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if other := sorted(set(first) ^ set(second)):
            problem = f"both sides need the same tasks; only one has {', '.join(other)}"
        else:
            first, second = list(first.values()), [second[task] for task in first]
    elif isinstance(first, Mapping) or isinstance(second, Mapping) or len(first) != len(second):
        problem = "give two mappings of the same tasks, or two sequences of the same length"
    if problem or not len(first):
        raise SpecError("wilcoxon", problem or "there are no tasks")
    return list(zip(first, second, strict=True))


def _exact_p(ranks: list[float], positive: float, alternative: str) -> float:
    """Return the p-value over all sign patterns: the distribution of sums of ranks is convolved."""
    import numpy as np

    # Midranks are multiples of a half.
    ways, at = np.ones(1), round(2 * positive)
    for rank in ranks:
        either = np.zeros(round(2 * rank) + 1)
        either[[0, -1]] = 1
        ways = np.convolve(ways, either)
    total = ways.sum()
    greater, less = float(ways[at:].sum() / total), float(ways[: at + 1].sum() / total)
    if alternative == "two-sided":
        return min(1.0, 2 * min(greater, less))
    return greater if alternative == "greater" else less
