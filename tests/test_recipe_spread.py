"""The script that measures how much a recipe depends on its learning rate."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.images import draw_task

pytest.importorskip("accelerate")

from peft_vpt.experiments.compare import Plan, compare
from peft_vpt.experiments.records import append_record, read_records
from peft_vpt.experiments.sums import file_sum
from peft_vpt.training import preset

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "recipe_spread.py"))
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bright and dark images in noise, easy to tell apart."""
    return draw(tmp_path / "task", {"dark": 40, "light": 200})


def draw(folder: Path, levels: dict[str, int]) -> Path:
    return draw_task(folder, (8, 4, 3), levels, (20, 20), 40)


@pytest.fixture
def arguments(folder: Path, tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=16, **SMALL)
    weights = tmp_path / "small.safetensors"
    save_file(model.state_dict(), weights)
    return [
        *("--data", str(folder), "--model", MODEL, "--weights", str(weights)),
        *("--model-args", json.dumps(SMALL), "--size", "16", "--length", "2", "--epochs", "2"),
        *("--batch", "8", "--output", str(tmp_path / "out"), "--group", "Natural"),
    ]  # fmt: skip


def main(arguments: list[str], *more: str) -> str:
    return str(SCRIPT["main"]([*arguments, *more]))


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of the table by the first word of their row."""
    found = {}
    for line in text.splitlines():
        if line.startswith("|"):
            first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[first.split(" ")[0]] = cells
    return found


def test_table_is_made_of_the_records_and_the_spread_of_the_counted_factors(
    arguments: list[str], tmp_path: Path
) -> None:
    text = main(arguments, "--factors", "0.3,3", "--beyond", "10")
    records = read_records(tmp_path / "out" / "records.jsonl", strict=True)
    assert len(records) == 6
    table = rows(text)
    assert table["preset"] == ["x 0.3", "x 3", "x 10", "spread x 0.3-3"]
    for kind, optimizer in (("default", "adamw"), ("paper", "sgd")):
        base = preset("vpt-deep", kind=kind).base_lr
        mine = {r["factor"]: r for r in records if r["preset"] == kind}
        for factor, record in mine.items():
            recipe = record["config"]["recipe"]
            assert recipe["optimizer"] == optimizer
            # One multiplication in float64.
            assert recipe["base_lr"] == pytest.approx(base * factor, rel=1e-15)
        top1 = [100 * mine[factor]["metrics"]["top1"] for factor in (0.3, 3.0)]
        assert [cell.rstrip(" !") for cell in table[kind][:2]] == [f"{x:.1f}" for x in top1]
        assert table[kind][-1] == f"{max(top1) - min(top1):.1f}"


def test_a_run_with_a_record_is_not_repeated(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--factors", "1", "--beyond", "")
    first = main(arguments, *few, "--presets", "paper")
    file = tmp_path / "out" / "records.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    called: list[Any] = []
    inner = SCRIPT["run_once"]

    def counted(run: Any) -> Any:
        called.append(run.recipe.optimizer)
        return inner(run)

    monkeypatch.setitem(SCRIPT["main"].__globals__, "run_once", counted)
    both = main(arguments, *few)
    assert called == ["adamw"]
    assert rows(both)["paper"] == rows(first)["paper"]
    assert file.read_text(encoding="utf-8").splitlines()[:1] == lines
    # Another seed is another run.
    main(arguments, *few, "--presets", "paper", "--seed", "1")
    assert called == ["adamw", "sgd"]


@pytest.mark.parametrize("init", ["random", "tokens"])
def test_records_of_compare_count(init: str, arguments: list[str], tmp_path: Path) -> None:
    args = SCRIPT["parse"](arguments)
    work = SCRIPT["Measurement"](args)
    begin = {} if init == "random" else {"init": init}
    plan = Plan(
        protocols=("vpt-deep",), options={"vpt-deep": {"length": 2, **begin}}, epochs=2,
        factors=(0.3, 1.0), seeds=(0,), changes={"batch_size": 8},
    )  # fmt: skip
    other = compare(
        work.task, work.pixels.transform, work.build, backbone=MODEL, folder=tmp_path / "compare",
        plan=plan, weights=file_sum(args.weights), progress=False,
    )  # fmt: skip
    for record in other:
        append_record(work.file, record)
    # Tokens are what the default preset begins with.
    words = ("--init", "random") if init == "random" else ()
    main(arguments, "--presets", "default", "--factors", "0.3,1", "--beyond", "", *words)
    assert len(read_records(work.file)) == len(other)


def test_what_diverges_is_shown_and_counts_as_nothing(arguments: list[str]) -> None:
    rates = ("--presets", "paper", "--factors", "1,1e38", "--beyond", "")
    found = rows(main(arguments, *rates))["paper"]
    assert found[1] == "diverged"
    assert found[2] == found[0].rstrip(" !")


def test_a_loss_that_rises_is_marked(arguments: list[str], tmp_path: Path) -> None:
    alike = draw(tmp_path / "alike", {"a": 100, "b": 100})
    few = ("--data", str(alike), "--presets", "paper", "--factors", "0.001,10000", "--beyond", "")
    # The first steps of a long warm-up are harmless, its last ones are not.
    late = ("--epochs", "8", "--changes", '{"warmup_epochs": 7}')
    found = rows(main(arguments, *few, *late))["paper"]
    assert found[0][-1] != "!"
    assert found[1][-1] == "!"
    assert [r["risen"] for r in read_records(tmp_path / "out" / "records.jsonl")] == [False, True]


def test_the_test_split_is_that_of_runs_on_train_and_val(
    arguments: list[str], tmp_path: Path
) -> None:
    one = ("--presets", "paper", "--factors", "1", "--beyond", "", "--split", "test")
    text = main(arguments, *one)
    assert "6 test images" in text
    assert "batch 8 in both presets, in place of the paper's own" in text
    (record,) = read_records(tmp_path / "out" / "records.jsonl")
    assert (record["split"], record["config"]["train"]) == ("test", "trainval")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--weights", "absent.safetensors"), "no such file"),
        (("--factors", ""), "needs one number"),
        (("--factors", "1,-2"), "positive numbers"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    arguments: list[str], tmp_path: Path, capsys: Any, wrong: tuple[str, str], said: str
) -> None:
    with pytest.raises(SystemExit):
        main(arguments, *wrong)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
