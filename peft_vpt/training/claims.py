"""Who works on which trial of a study: every point of a grid once, also when workers die."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from threading import Event, Thread
from typing import Any

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
