"""Sweeps: every point once, by any number of workers, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peft_vpt.errors import SpecError, VPTError

pytest.importorskip("optuna")

from peft_vpt.training import DivergedError, SweepResult, SweepTrial, sweep

ROOT = Path(__file__).parent.parent
GRID = {"base_lr": [1.0, 0.1, 0.01], "weight_decay": [0.01, 0.0]}
POINTS = [{"base_lr": lr, "weight_decay": wd} for lr in (1.0, 0.1, 0.01) for wd in (0.01, 0.0)]


def value_of(settings: dict[str, Any]) -> float:
    return float(settings["base_lr"] == 0.1) - float(settings["weight_decay"])


class Counted:
    """An objective that notes its calls, and raises at one of them if told so."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error, self.at = error, at

    def __call__(self, settings: dict[str, Any]) -> float:
        self.calls.append(settings)
        if self.error is not None and len(self.calls) == self.at:
            raise self.error
        return value_of(settings)


def run(objective: Any, folder: Path, grid: Any = GRID, **options: Any) -> SweepResult:
    return sweep(objective, grid, folder=folder, progress=False, **options)


def missed(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points that are not among the calls, each of which was one of a point."""
    assert all(calls.count(settings) == 1 and settings in POINTS for settings in calls)
    return [point for point in POINTS if point not in calls]


def test_every_point_once(tmp_path: Path) -> None:
    objective = Counted()
    result = run(objective, tmp_path)
    assert missed(objective.calls) == []
    assert [t.params for t in result.trials] == POINTS
    assert [t.value for t in result.trials] == [value_of(p) for p in POINTS]
    assert result.best.params == {"base_lr": 0.1, "weight_decay": 0.0}
    assert all(t.seconds >= 0 and t.failure is None for t in result.trials)
    again = Counted()
    assert run(again, tmp_path).best.params == result.best.params
    assert not again.calls


def test_ties_go_to_the_smaller_rate(tmp_path: Path) -> None:
    grid = {"length": [10, 5], "base_lr": [1.0, 0.1], "kind": ["b", "a", None]}
    best = run(lambda settings: 0.5, tmp_path, grid).best
    assert best.params == {"base_lr": 0.1, "length": 5, "kind": "b"}


def test_one_point(tmp_path: Path) -> None:
    result = run(lambda settings: 1.0, tmp_path, {"base_lr": [0.1]})
    assert result.trials == (SweepTrial({"base_lr": 0.1}, 1.0, result.best.seconds),)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_sweep_goes_on(error: BaseException, tmp_path: Path) -> None:
    first, second = Counted(error, at=3), Counted()
    with pytest.raises(type(error)):
        run(first, tmp_path)
    result = run(second, tmp_path)
    assert missed(second.calls) == [point for point in POINTS if point in first.calls[:2]]
    assert [t.value for t in result.trials] == [value_of(p) for p in POINTS]


def test_a_trial_that_diverged_is_done(tmp_path: Path) -> None:
    objective = Counted(DivergedError("fit", "epoch 1: the loss is nan"), at=2)
    result = run(objective, tmp_path)
    assert missed(objective.calls) == []
    (trial,) = (t for t in result.trials if t.params == objective.calls[1])
    assert (trial.value, trial.failure) == (None, "fit: epoch 1: the loss is nan.")
    assert run(Counted(RuntimeError(), at=1), tmp_path).trials == result.trials

    def nothing(settings: dict[str, Any]) -> float:
        raise DivergedError("the loss is inf")

    with pytest.raises(DivergedError, match=r"every point.*the loss is inf"):
        run(nothing, tmp_path, name="other")


def test_another_grid_or_other_settings_are_refused(tmp_path: Path) -> None:
    run(Counted(), tmp_path, settings={"task": "pets"})
    for grid, settings in ((GRID, {"task": "cars"}), ({"base_lr": [1.0]}, {"task": "pets"})):
        objective = Counted()
        with pytest.raises(SpecError, match=r"pets.*another name or folder"):
            run(objective, tmp_path, grid, settings=settings)
        assert not objective.calls
    assert run(Counted(), tmp_path, settings={"task": "cars"}, name="cars").best


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": {}}, "grid"),
        ({"grid": {"base_lr": []}}, "base_lr"),
        ({"grid": {"base_lr": [0.1, 0.1]}}, "different"),
        ({"grid": {"deep": [1, True]}}, "different"),
        ({"grid": {"base_lr": [float("nan")]}}, "base_lr"),
        ({"grid": {"base_lr": 0.1}}, "base_lr"),
        ({"grid": {"size": [(1, 2)]}}, "size"),
        ({"name": "a/b"}, "name"),
        ({"storage": "sqlite://"}, "either folder"),
        ({"folder": None}, "either folder"),
        ({"settings": {"x": {1, 2}}}, "settings"),
    ],
)
def test_bad_options(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    options = {"grid": GRID, "folder": tmp_path / "study", "progress": False} | changes
    with pytest.raises(SpecError, match=match):
        sweep(Counted(), **options)
    assert not (tmp_path / "study").exists()


def test_an_objective_must_return_a_number(tmp_path: Path) -> None:
    for wrong in (None, float("nan"), "0.5"):
        with pytest.raises(SpecError, match=r"objective returned.*base_lr"):
            run(lambda settings, wrong=wrong: wrong, tmp_path)


def test_not_inside_a_distributed_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VPTError, match="Start each worker by itself"):
        run(Counted(), tmp_path)


def test_a_database_serves_as_well(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    first, second = Counted(RuntimeError(), at=4), Counted()
    with pytest.raises(RuntimeError):
        sweep(first, GRID, storage=storage, progress=False)
    sweep(second, GRID, storage=storage, progress=False)
    assert missed(second.calls) == [point for point in POINTS if point in first.calls[:3]]


# Several processes

WORKER = """
import os, sys, time
from pathlib import Path
from peft_vpt.training import sweep
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
def objective(settings):
    with open(folder / f"calls-{os.getpid()}", "a") as file:
        file.write(repr(settings) + "\\n")
    time.sleep(seconds)
    return settings["a"] + settings["b"]
result = sweep(objective, {"a": list(range(6)), "b": [0.5, 0.25]}, folder=folder, progress=False)
print(result.best.params)
"""
ALL = sorted(repr({"a": a, "b": b}) for a in range(6) for b in (0.5, 0.25))


def start(folder: Path, seconds: float) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(seconds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(folder: Path) -> list[str]:
    return [line for path in folder.glob("calls-*") for line in path.read_text().splitlines()]


def test_two_workers_do_each_trial_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, 0.05) for _ in range(2)]
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert out.strip() == "{'a': 5, 'b': 0.5}"
    found = calls(tmp_path)
    # Whoever is free at the end runs the point that the other is still at.
    assert sorted(set(found)) == ALL
    assert len(found) <= len(ALL) + 1
    assert len(list(tmp_path.glob("calls-*"))) == 2


def test_a_killed_worker_leaves_its_trial_to_others(tmp_path: Path) -> None:
    """The trial that it was at is run again, the finished ones are not."""
    dead = start(tmp_path, 0.3)
    limit = time.monotonic() + 120
    while len(calls(tmp_path)) < 3 and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(dead.pid, signal.SIGKILL)
    dead.communicate()
    before = calls(tmp_path)
    # A line that the kill cut short.
    with (tmp_path / "sweep.journal").open("ab") as file:
        file.write(b'{"op_code":5,"work')
    other = start(tmp_path, 0.0)
    _, err = other.communicate(timeout=120)
    assert other.returncode == 0, err
    assert sorted(set(calls(tmp_path))) == ALL
    again = [line for line in ALL if calls(tmp_path).count(line) > 1]
    assert again == [before[-1]]


def test_a_point_that_runs_twice_counts_once(tmp_path: Path) -> None:
    """As where a worker that seemed dead is not: the first result stays."""
    inner: list[SweepResult] = []

    def slow(settings: dict[str, Any]) -> float:
        if not inner:
            inner.append(run(lambda settings: 1.0, tmp_path, {"a": [1]}))
        return 2.0

    result = run(slow, tmp_path, {"a": [1]})
    assert result.trials == inner[0].trials
    assert result.best.value == 1.0
