"""`sweep`: a grid of settings on Optuna, by any number of workers, killed and resumed at will."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ..errors import SpecError
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


POINT, OWNER, BEAT, FAILURE = "point", "owner", "beat", "failure"
# Workers of this process, which lives on when one of them was interrupted.
_ACTIVE: set[str] = set()


@contextmanager
def worker() -> Iterator[dict[str, Any]]:
    """Yield who works here while the `with` block runs, so that others can tell if it lives."""
    me = _this_process()
    _ACTIVE.add(me["token"])
    try:
        yield me
    finally:
        _ACTIVE.remove(me["token"])


def _this_process() -> dict[str, Any]:
    import psutil  # type: ignore[import-untyped,unused-ignore]

    try:
        # Two containers may share a host name, and count processes apart.
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return {
        "host": platform.node(),
        "space": space,
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "token": secrets.token_hex(8),
    }


def is_settled(trial: Any) -> bool:
    """Tell whether a trial has a result, diverging included, so that its point is done."""
    from optuna.trial import TrialState

    failed = trial.state == TrialState.FAIL and FAILURE in trial.user_attrs
    return bool(trial.state == TrialState.COMPLETE or failed)


def is_alive(trial: Any, me: Mapping[str, Any], patience: float) -> bool:
    """Tell whether somebody works on a running trial.

    A process of this machine is looked for; elsewhere a sign of life must be younger than
    `patience` seconds.
    """
    owner = trial.user_attrs.get(OWNER)
    if owner is not None and all(owner[key] == me[key] for key in ("host", "space")):
        here = owner["pid"] == me["pid"] and owner["born"] == me["born"]
        return owner["token"] in _ACTIVE if here else _runs(owner)
    began = trial.datetime_start or datetime.now()
    beat = float(trial.user_attrs.get(BEAT, began.timestamp()))
    return time.time() - beat < patience


def open_points(trials: Sequence[Any], count: int, me: Any, patience: float) -> list[int]:
    """Return the points of a grid that nobody has done, does or is about to do."""
    held = [t for t in trials if is_settled(t) or _is_held(t, me, patience)]
    taken = {trial.user_attrs.get(POINT) for trial in held}
    return [point for point in range(count) if point not in taken]


def is_queued(trials: Sequence[Any]) -> bool:
    """Tell whether a trial waits, maybe of a worker that died before it took it up."""
    from optuna.trial import TrialState

    return any(t.state == TrialState.WAITING and POINT in t.user_attrs for t in trials)


def claim(study: Any, me: Mapping[str, Any], patience: float) -> Any:
    """Take a trial of the study's queue, and keep it if nobody else has its point.

    Two workers may queue a point at the same moment. The storage gives all trials one order, so
    that each sees the other's; the one with the lower number keeps the point. (Optuna's own grid
    sampler lets workers run the last points of a grid twice.)

    Returns:
        The trial; None: another worker was faster.
    """
    from optuna.trial import TrialState

    trial = study.ask()
    trial.set_user_attr(OWNER, dict(me))
    point = trial.user_attrs.get(POINT)
    rivals = [
        other
        for other in study.get_trials(deepcopy=False)
        if other.user_attrs.get(POINT) == point and other.number != trial.number
    ]
    before = [other for other in rivals if other.number < trial.number]
    taken = any(map(is_settled, rivals)) or any(_is_held(t, me, patience) for t in before)
    # A queue that another worker has emptied gives a trial without a point.
    if point is None or taken:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return None
    return trial


def bury_dead(study: Any, me: Any, patience: float) -> None:
    """Mark trials as failed whose workers are gone, so that their points are open again."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not is_alive(trial, me, patience):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


@contextmanager
def signs_of_life(trial: Any, patience: float) -> Iterator[None]:
    """Let a thread note the time on a trial while the `with` block runs."""
    stop = Event()

    def beat() -> None:
        while not stop.wait(patience / 10):
            try:
                trial.set_user_attr(BEAT, time.time())
            except Exception:
                # A sign that is missed is made up for by the next one.
                continue

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _is_held(trial: Any, me: Mapping[str, Any], patience: float) -> bool:
    """Tell whether a trial waits in the queue or is worked on."""
    from optuna.trial import TrialState

    if trial.state == TrialState.RUNNING:
        return is_alive(trial, me, patience)
    return bool(trial.state == TrialState.WAITING)


def _runs(owner: Mapping[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(int(owner["pid"]))
        dead = process.status() == psutil.STATUS_ZOMBIE
        return not dead and abs(process.create_time() - float(owner["born"])) < 1.0
    except psutil.NoSuchProcess:
        return False


_FIRST_TIE = "base_lr"


def grid_points(grid: Any) -> list[dict[str, Any]]:
    """Return the settings at every point of a grid, the last setting changing first.

    Raises:
        SpecError: Values that a study cannot keep, or one twice.
    """
    if not isinstance(grid, Mapping) or not grid:
        raise SpecError(f"sweep(grid={grid!r}): must be a mapping of settings to values.")
    for key, values in grid.items():
        listed = isinstance(values, Sequence) and not isinstance(values, str) and values
        plain = listed and all(
            v is None or isinstance(v, str | bool | int) or _is_finite(v) for v in values
        )
        if not isinstance(key, str) or not plain or len(set(map(repr, values))) < len(values):
            raise SpecError(
                f"sweep(grid[{key!r}]={values!r}): must be a list of different numbers, texts, "
                "booleans or None."
            )
    return [dict(zip(grid, row, strict=True)) for row in itertools.product(*grid.values())]


def check_sweep(folder: Any, storage: Any, name: Any, patience: Any) -> None:
    """Check the plain options of `sweep`.

    Raises:
        SpecError: One is wrong, or the process is one of a distributed launch.
    """
    if (folder is None) == (storage is None):
        raise SpecError("sweep: give either folder, for a journal file there, or storage.")
    if not isinstance(name, str) or not name or set(name) & set("/\\\0") or name.startswith("."):
        raise SpecError(f"sweep(name={name!r}): must be text that can name a file.")
    if not _is_finite(patience) or patience <= 0:
        raise SpecError(f"sweep(patience={patience!r}): must be a number of seconds > 0.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SpecError(
            "sweep: the processes of one distributed launch train one model together and cannot "
            "each take trials. Start each worker by itself, with the same folder."
        )


def rank(
    value: float, params: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
) -> tuple[float, ...]:
    """Return a key that sorts the best trial first: high value, then small settings."""
    keys = sorted(grid, key=lambda key: key != _FIRST_TIE)
    return (-value, *(_size(params[key], grid[key]) for key in keys))


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
        raise SpecError(
            f"sweep: the objective returned {value!r} at {settings}; it must be a finite number."
        )
    return number


def _size(value: Any, values: Sequence[Any]) -> float:
    numbers = all(isinstance(v, int | float) for v in values)
    return float(value) if numbers else float(list(values).index(value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
