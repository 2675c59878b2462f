"""`sweep`: a grid of settings on Optuna, by any number of workers, killed and resumed at will."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SpecError
from .claims import (
    FAILURE,
    POINT,
    bury_dead,
    claim,
    is_queued,
    is_settled,
    open_points,
    signs_of_life,
    worker,
)
from .grids import check_sweep, finite, grid_points, rank
from .health import DivergedError

_POLL = 0.5


@dataclass(frozen=True)
class SweepTrial:
    """One point of a grid that is done.

    Args:
        params: Its settings.
        value: What the objective returned; None where training diverged.
        seconds: Time it took.
        failure: Why there is no value.
    """

    params: dict[str, Any]
    value: float | None
    seconds: float
    failure: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """A grid that is done.

    Args:
        best: The trial with the highest value; of equals that with the smaller `base_lr`, then with
            the smaller values of the other settings in the order of the grid.
        trials: All of them, in the order of the grid.
    """

    best: SweepTrial
    trials: tuple[SweepTrial, ...]


def sweep(
    objective: Callable[[dict[str, Any]], float],
    grid: Mapping[str, Sequence[Any]],
    *,
    folder: str | Path | None = None,
    name: str = "sweep",
    storage: Any = None,
    settings: Mapping[str, Any] | None = None,
    patience: float = 300.0,
    progress: bool = True,
) -> SweepResult:
    """Run an objective on every point of a grid, each one once, and return when all are done.

    Several workers share a sweep: each calls this function with the same folder (or storage) and
    name. A worker that is killed leaves its trial to the others, or to the next call. What is
    finished is never run again. A trial that diverged counts as finished, without a value; any
    other error ends the worker and leaves the point open.

    Args:
        objective: From the settings of a point to what shall be high: top1 on val.
        grid: Values per setting: numbers, text, booleans or None, as `paper_grid` gives.
        folder: Where the journal file of the study goes, for workers that share a file system.
        name: Of the study.
        storage: An Optuna storage or its URL, in place of `folder`, for workers on machines that
            share a database.
        settings: What else the results depend on (recipe, data), JSON values: a study of other
            settings is refused.
        patience: Seconds without a sign of life after which a worker on another machine is dead.
        progress: Show a progress bar on a terminal.

    Raises:
        SpecError: A wrong option, or a study of another grid or other settings.
        DivergedError: Every trial diverged.

    Source: Jia et al. 2022, section A.1 (grid search on val).
    """
    points = grid_points(grid)
    check_sweep(folder, storage, name, patience)
    with _quiet(), worker() as me:
        study = _open(folder, storage, name, grid, settings)
        with _bar(name, len(points), progress) as show:
            while (done := _settled(study)).keys() < set(range(len(points))):
                show(len(done))
                bury_dead(study, me, patience)
                trials = study.get_trials(deepcopy=False)
                free = open_points(trials, len(points), me, patience)
                if not free and not is_queued(trials):
                    time.sleep(_POLL)
                    continue
                if free:
                    study.enqueue_trial(points[free[0]], user_attrs={POINT: free[0]})
                trial = claim(study, me, patience)
                if trial is not None:
                    _run(study, trial, objective, grid, patience)
            show(len(points))
    return _result(points, done, grid, name)


def _run(
    study: Any,
    trial: Any,
    objective: Callable[[dict[str, Any]], float],
    grid: Mapping[str, Sequence[Any]],
    patience: float,
) -> None:
    """Run one trial and tell the study how it went, whatever happens."""
    from optuna.trial import TrialState

    value = None
    try:
        settings = {key: trial.suggest_categorical(key, list(grid[key])) for key in grid}
        with signs_of_life(trial, patience):
            value = finite(objective(dict(settings)), settings)
    except DivergedError as error:
        trial.set_user_attr(FAILURE, str(error))
    finally:
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.tell(trial, value, state=state, skip_if_finished=True)


def _open(
    folder: Any, storage: Any, name: str, grid: Mapping[str, Sequence[Any]], settings: Any
) -> Any:
    """Open or begin a study, and check that it is of this grid and these settings."""
    import optuna

    about = {"grid": {k: list(v) for k, v in grid.items()}, "settings": dict(settings or {})}
    try:
        wanted = json.dumps(about, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"sweep(settings=...): must be plain, finite JSON values: {error}"
        ) from error
    study = optuna.create_study(
        study_name=name,
        storage=_journal(Path(folder), name) if folder is not None else storage,
        # Never asked: every trial comes with its values.
        sampler=optuna.samplers.RandomSampler(seed=0),
        direction="maximize",
        load_if_exists=True,
    )
    if "about" not in study.user_attrs:
        study.set_user_attr("about", wanted)
    if study.user_attrs["about"] != wanted:
        raise SpecError(
            f"sweep(name={name!r}): the study there is of {study.user_attrs['about']}, this call "
            f"is of {wanted}. Use another name or folder."
        )
    return study


def _journal(folder: Path, name: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.journal"
    lock = JournalFileOpenLock(str(path))
    _drop_torn_line(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _drop_torn_line(path: Path, lock: Any) -> None:
    """Cut off a last line that a killed worker left unfinished, or no one could read the file."""
    lock.acquire()
    try:
        with path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
    finally:
        lock.release()


def _settled(study: Any) -> dict[int, Any]:
    """Return the trial with the result of each point that is done."""
    found: dict[int, Any] = {}
    for trial in study.get_trials(deepcopy=False):
        if is_settled(trial) and POINT in trial.user_attrs:
            found.setdefault(trial.user_attrs[POINT], trial)
    return found


def _result(
    points: list[dict[str, Any]],
    done: Mapping[int, Any],
    grid: Mapping[str, Sequence[Any]],
    name: str,
) -> SweepResult:
    trials = []
    for point, params in enumerate(points):
        trial = done[point]
        seconds = trial.duration.total_seconds() if trial.duration is not None else 0.0
        failure = trial.user_attrs.get(FAILURE)
        trials.append(SweepTrial(params, None if failure else trial.value, seconds, failure))
    valued = [trial for trial in trials if trial.value is not None]
    if not valued:
        raise DivergedError(
            f"sweep(name={name!r}): training diverged at every point, the first time with: "
            f"{trials[0].failure}"
        )
    best = min(valued, key=lambda trial: rank(trial.value or 0.0, trial.params, grid))
    return SweepResult(best, tuple(trials))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's reports of every trial away: the bar tells the same."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _bar(name: str, total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (wanted and console.is_terminal)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.update(task, completed=done)
