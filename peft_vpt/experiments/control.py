"""Baselines that train no network: the majority class, raw pixels, frozen features."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import SpecError, VPTError

STRENGTHS = tuple(10.0**power for power in range(-4, 6))
_STEPS = 1000


class Fitted(NamedTuple):
    """A logistic regression: accuracies as shares, and the C that was chosen on val."""

    top1: float
    val_top1: float
    strength: float
    converged: bool


def majority(train: Sequence[int], test: Sequence[int]) -> float:
    """Return the accuracy on test of the class that is most frequent in train.

    Of equally frequent classes the lowest counts.

    Raises:
        VPTError: An empty split.
    """
    if not len(train) or not len(test):
        raise VPTError("majority: an empty split; give labels of train and of test.")
    counts = Counter(int(label) for label in train)
    best = min(counts, key=lambda label: (-counts[label], label))
    return sum(int(label) == best for label in test) / len(test)


def raw_pixels(split: Any, size: int = 16) -> Any:
    """Return the images of a split as rows of `size` x `size` RGB values in 0 to 1.

    Args:
        split: Of a task (`peft_vpt.data.Split`), of image files or PIL images.
        size: Edge that images are squeezed to, averaging over areas.

    Raises:
        SpecError: A size below 1.
        VPTError: An empty split, or an image that cannot be read.
    """
    import numpy as np
    from PIL import Image

    if size < 1:
        raise SpecError(f"raw_pixels(size={size}): must be at least 1.")
    if not len(split):
        raise VPTError("raw_pixels: the split is empty.")
    rows = [
        np.asarray(split.image(i).resize((size, size), Image.Resampling.BOX), dtype=np.float32)
        for i in range(len(split))
    ]
    return np.stack(rows).reshape(len(rows), -1) / 255


def logistic(
    train: tuple[Any, Sequence[int]],
    val: tuple[Any, Sequence[int]],
    test: tuple[Any, Sequence[int]],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Fitted:
    """Fit a regularised logistic regression; C is chosen on val, then train and val are joined.

    Values are standardised by the images it is fitted on. Of equal C on val the smallest wins.

    Args:
        train: Rows `(images, values)` of pixels or frozen features, and labels.
        val: Likewise.
        test: Likewise; used once.
        strengths: Values of C, scikit-learn's inverse of the penalty.

    Raises:
        SpecError: No strengths, or one that is not positive.
        VPTError: An empty split.
    """
    if not strengths or min(strengths) <= 0:
        raise SpecError(f"logistic(strengths={strengths}): give positive values of C.")
    for name, (_, labels) in (("train", train), ("val", val), ("test", test)):
        if not len(labels):
            raise VPTError(f"logistic: the split {name} is empty.")
    import numpy as np

    parts = [(np.asarray(x, dtype=np.float64), np.asarray(y)) for x, y in (train, val, test)]
    scores = {c: _score(parts[0], parts[1], c)[0] for c in sorted(strengths)}
    best = max(scores, key=lambda c: scores[c])
    joined = tuple(np.concatenate(pair) for pair in zip(*parts[:2], strict=True))
    top1, converged = _score(joined, parts[2], best)
    return Fitted(top1, scores[best], best, converged)


def _score(train: Any, test: Any, strength: float) -> tuple[float, bool]:
    """Return the accuracy on test, and whether the solver came to an end."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_STEPS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(*train)
    stopped = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return float(classifier.score(*test)), not stopped
