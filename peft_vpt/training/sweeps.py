"""`sweep`: a grid of settings on Optuna, by any number of workers, killed and resumed at will."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SpecError
from .health import DivergedError

_FAILURE = "failure"
_FIRST_TIE = "base_lr"


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
    progress: bool = True,
) -> SweepResult:
    """Run an objective on every point of a grid, and return when all are done.

    Several workers share a sweep: each calls this function with the same folder (or storage) and
    name. The points come in an order that Optuna's `GridSampler` shuffles. What is finished is
    never run again. Where every point has been begun, a worker that is free runs one that is not
    done, since whoever began it may be dead; the first result counts. A trial that diverged counts
    as finished, without a value; any other error ends the worker and leaves the point open.

    Args:
        objective: From the settings of a point to what shall be high: top1 on val.
        grid: Values per setting: numbers, text, booleans or None, as `paper_grid` gives.
        folder: Where the journal file of the study goes, for workers that share a file system.
        name: Of the study.
        storage: An Optuna storage or its URL, in place of `folder`, for workers on machines that
            share a database.
        settings: What else the results depend on (recipe, data), JSON values: a study of other
            settings is refused.
        progress: Show a progress bar on a terminal.

    Raises:
        SpecError: A wrong option, or a study of another grid or other settings.
        DivergedError: Every trial diverged.

    Source: Jia et al. 2022, section A.1 (grid search on val).
    """
    from rich.console import Console
    from rich.progress import Progress

    points = grid_points(grid)
    _check_options(folder, storage, name)
    console = Console(stderr=True)
    bar = Progress(console=console, disable=not (progress and console.is_terminal))
    with _quiet(), bar:
        task = bar.add_task(name, total=len(points))
        study = _open(folder, storage, name, grid, settings)
        while len(done := _settled(study)) < len(points):
            bar.update(task, completed=len(done))
            _run(study, objective, grid)
        bar.update(task, completed=len(points))
    return _result([(params, done[_key(params)]) for params in points], grid, name)


def _run(study: Any, objective: Callable[..., float], grid: Mapping[str, Sequence[Any]]) -> None:
    """Run one trial; an error that is not about training leaves it open for another worker."""
    from optuna.trial import TrialState

    trial = study.ask()
    settings = {key: trial.suggest_categorical(key, list(grid[key])) for key in grid}
    try:
        study.tell(trial, finite(objective(dict(settings)), settings))
    except DivergedError as error:
        trial.set_user_attr(_FAILURE, str(error))
        study.tell(trial, state=TrialState.FAIL)


def _settled(study: Any) -> dict[str, Any]:
    """Return the trial that came first to a result, diverging included, of each point."""
    done = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and (trial.value is not None or _FAILURE in trial.user_attrs)
    ]
    found: dict[str, Any] = {}
    for trial in sorted(done, key=lambda trial: trial.datetime_complete):
        found.setdefault(_key(trial.params), trial)
    return found


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def _result(
    done: Sequence[tuple[dict[str, Any], Any]], grid: Mapping[str, Sequence[Any]], name: str
) -> SweepResult:
    trials = [
        SweepTrial(
            params, trial.value, trial.duration.total_seconds(), trial.user_attrs.get(_FAILURE)
        )
        for params, trial in done
    ]

    def rank(trial: SweepTrial) -> tuple[float, ...]:
        keys = sorted(grid, key=lambda key: key != _FIRST_TIE)
        return (-(trial.value or 0.0), *(_size(trial.params[key], grid[key]) for key in keys))

    valued = [trial for trial in trials if trial.value is not None]
    if not valued:
        problem = f"training diverged at every point, at the first with: {trials[0].failure}"
        raise DivergedError("sweep", problem, given={"name": name})
    return SweepResult(min(valued, key=rank), tuple(trials))


def _size(value: Any, values: Sequence[Any]) -> float:
    numbers = all(isinstance(v, int | float) for v in values)
    return float(value) if numbers else float(list(values).index(value))


def _open(
    folder: Any, storage: Any, name: str, grid: Mapping[str, Sequence[Any]], settings: Any
) -> Any:
    """Open or begin a study, and check that it is of this grid and these settings."""
    import optuna

    about = {"grid": {k: list(v) for k, v in grid.items()}, "settings": dict(settings or {})}
    try:
        wanted = json.dumps(about, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        problem = f"must be plain, finite JSON values: {error}"
        raise SpecError("sweep", problem, given={"settings": ...}) from error

    class Grid(optuna.samplers.GridSampler):
        def after_trial(self, *about: Any) -> None:
            """Do not stop the study's own loop, which does not run here."""

    sampler = Grid(grid, seed=0)
    # One shuffled order for all workers; what each takes from the points left over, by chance.
    sampler.reseed_rng()
    study = optuna.create_study(
        study_name=name,
        storage=_journal(Path(folder), name) if folder is not None else storage,
        sampler=sampler,
        direction="maximize",
        load_if_exists=True,
    )
    if "about" not in study.user_attrs:
        study.set_user_attr("about", wanted)
    if study.user_attrs["about"] != wanted:
        raise SpecError(
            "sweep",
            f"the study there is of {study.user_attrs['about']}, this call is of {wanted}",
            "Use another name or folder",
            given={"name": name},
        )
    return study


def _journal(folder: Path, name: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.journal"
    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        # Behind half a line, which a killed worker may leave, nobody could write.
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's reports of every trial away: the bar tells the same."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def grid_points(grid: Any) -> list[dict[str, Any]]:
    """Return the settings at every point of a grid, the last setting changing first.

    Raises:
        SpecError: Values that a study cannot keep, or one twice.
    """
    if not isinstance(grid, Mapping) or not grid:
        problem = "must be a mapping of settings to values"
        raise SpecError("sweep", problem, given={"grid": grid})
    for key, values in grid.items():
        listed = isinstance(values, Sequence) and not isinstance(values, str) and values
        plain = listed and all(
            isinstance(v, str | int | None) or (isinstance(v, float) and math.isfinite(v))
            for v in values
        )
        if not isinstance(key, str) or not plain or len(set(values)) < len(values):
            problem = "must be a list of different numbers, texts, booleans or None"
            raise SpecError("sweep", problem, given={f"grid[{key!r}]": values})
    return [dict(zip(grid, row, strict=True)) for row in itertools.product(*grid.values())]


def _check_options(folder: Any, storage: Any, name: Any) -> None:
    """Check the plain options of `sweep`.

    Raises:
        SpecError: One is wrong, or the process is one of a distributed launch.
    """
    if (folder is None) == (storage is None):
        raise SpecError("sweep", "give either folder, for a journal file there, or storage")
    if not isinstance(name, str) or not name or set(name) & set("/\\\0") or name.startswith("."):
        raise SpecError("sweep", "must be text that can name a file", given={"name": name})
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpecError(
            "sweep",
            "the processes of one distributed launch train one model together and cannot each take "
            "trials",
            "Start each worker by itself, with the same folder",
        )


def finite(value: Any, settings: Mapping[str, Any]) -> float:
    """Return what an objective returned.

    Raises:
        SpecError: It is no finite number.
    """
    try:
        # Numbers of numpy and torch too.
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        problem = f"the objective returned {value!r} at {settings}; it must be a finite number"
        raise SpecError("sweep", problem)
    return number
