"""The segmentation example: protocols side by side on drawn shapes, offline, run once each."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("accelerate")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

from peft_vpt.experiments import read_records
from peft_vpt.segmentation import load_segmenter
from peft_vpt.training import preset

example: Any = importlib.import_module("examples.finetune_segmentation")
RATES = {"head": preset("linear").base_lr, "vpt-deep": preset("vpt-deep").base_lr}
FAST = ("--epochs", "1", "--channels", "8", "--length", "4", "--scales", "1,1.5")


def run(folder: Path, *options: str) -> Any:
    return example.main([*FAST, "--output", str(folder), *options])


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it ran again")

    for name in names:
        monkeypatch.setattr(example, name, called)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run(folder, "--protocols", "head,vpt-deep", "--factors", "1,3")


def test_rates_are_chosen_on_val_and_test_is_seen_once(done: tuple[Path, Any]) -> None:
    folder, found = done
    records = read_records(folder / "records.jsonl", strict=True)
    val, test = ([r for r in records if r["split"] == split] for split in ("val", "test"))
    assert [len(val), len(test)] == [4, 2]
    assert found == test
    for record in test:
        own = [r for r in val if r["protocol"] == record["protocol"]]
        best = max(own, key=lambda r: r["metrics"]["miou"])
        assert record["config"]["recipe"] == best["config"]["recipe"]
        assert record["config"]["evaluation"]["scales"] == [1.0, 1.5]
        assert {r["config"]["recipe"]["base_lr"] for r in own} == {
            factor * RATES[record["protocol"]] for factor in (1, 3)
        }


def test_records_hold_what_a_table_needs(done: tuple[Path, Any]) -> None:
    folder, (head, vpt) = done
    names = ["background", "disc", "square"]
    for record in (head, vpt):
        metrics = record["metrics"]
        each = [metrics[f"iou {name}"] for name in names]
        assert metrics["miou"] == pytest.approx(np.mean(each))
        assert 0 < metrics["miou"] < 1
        assert 0 < metrics["miou_multi"] < 1
        # The decoder's closed formula: norm, four convolutions with statistics, the classifier.
        assert record["decoder"] == 2 * 96 + 9 * 96 * 8 + 3 * 9 * 8 * 8 + 4 * 2 * 8 + 3 * 8 + 3
    assert head["trainable"] == head["decoder"]
    # Six blocks, four prompts each, width 96.
    assert vpt["trainable"] - vpt["decoder"] == 6 * 4 * 96
    lines = example.table([head, vpt], names).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["head", "vpt-deep"]
    assert f"{100 * vpt['metrics']['miou']:.1f}" in lines[3]
    assert vpt["stored_bytes"] == sum(
        path.stat().st_size for path in folder.glob(f"shapes/vpt-deep-x{factor(vpt):g}-0-*/*")
    )


def factor(record: Any) -> float:
    return float(round(record["config"]["recipe"]["base_lr"] / RATES[record["protocol"]], 3))


def test_a_run_with_a_record_is_not_run_again(
    done: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found = done
    text = (folder / "records.jsonl").read_text()
    forbid(monkeypatch, "fit", "predict")
    assert run(folder, "--protocols", "head,vpt-deep", "--factors", "1,3") == found
    assert (folder / "records.jsonl").read_text() == text
    assert "| vpt-deep |" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="ran again"):
        run(folder, "--protocols", "head", "--factors", "1", "--epochs", "2")


@pytest.mark.parametrize("what", ["weights", "images", "masks"])
def test_other_weights_images_and_masks_are_other_runs(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from safetensors.torch import save_file

    size = ("--size", "32", "--model", "test_vit", "--weights", str(tmp_path / "w.safetensors"))
    words = (*size, "--data", str(tmp_path / "shapes"), "--protocols", "head", "--factors", "1")
    example.draw_shapes(tmp_path / "shapes")
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "w.safetensors")
    run(tmp_path / "out", *words)
    if what == "weights":
        other = timm.create_model("test_vit", img_size=32)
        save_file(other.state_dict(), tmp_path / "w.safetensors")
    else:
        folder = "images" if what == "images" else "annotations"
        file = tmp_path / "shapes" / folder / "training" / "000.png"
        Image.fromarray(np.asarray(Image.open(file))[::-1].copy()).save(file)
    forbid(monkeypatch, "fit")
    with pytest.raises(AssertionError, match="ran again"):
        run(tmp_path / "out", *words)


def test_a_run_that_diverges_is_said_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--protocols", "head,vpt-deep", "--factors", "1,1e30")
    found = run(tmp_path, *words)
    assert all("failure" not in record for record in found)
    assert "diverged: step " in capsys.readouterr().out
    failed = [r for r in read_records(tmp_path / "records.jsonl") if "failure" in r]
    assert {r["protocol"] for r in failed} == {"head", "vpt-deep"}
    none = run(tmp_path, "--protocols", "head", "--factors", "1e30")
    assert [r["metrics"]["diverged"] for r in none] == [1.0]
    assert "head (1 of 1 diverged)" in capsys.readouterr().out
    # They have records: nothing is tried again.
    count = len(read_records(tmp_path / "records.jsonl"))
    run(tmp_path, "--protocols", "head", "--factors", "1e30")
    assert len(read_records(tmp_path / "records.jsonl")) == count


def test_test_results_come_from_the_adapter(
    done: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = done
    args = example.parse_arguments([*FAST, "--output", str(folder)])
    task = example.open_segmentation(folder / "shapes")
    runs = example.Runs(args, task)
    adapter = runs.folder("vpt-deep", factor(found[1]), 0)
    scores = runs.measure(load_segmenter(runs.backbone(), adapter), "test", (1.0,))
    assert scores.miou == found[1]["metrics"]["miou"]
    # Killed between val and test: the rest is done without training.
    kept = [line for line in (folder / "records.jsonl").read_text().splitlines()]
    (tmp_path / "records.jsonl").write_text("".join(f"{k}\n" for k in kept if '"val"' in k))
    (tmp_path / "shapes").symlink_to(folder / "shapes")
    forbid(monkeypatch, "fit")
    again = run(tmp_path, "--protocols", "head,vpt-deep", "--factors", "1,3")
    assert [r["metrics"] for r in again] == [r["metrics"] for r in found]


def test_other_options_never_meet_a_runs_weights(
    done: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ("--protocols", "head", "--factors", "1")
    first = run(tmp_path, *once)[0]["metrics"]
    longer = run(tmp_path, *once, "--epochs", "8")[0]["metrics"]
    assert longer["miou"] != first["miou"]
    # Another evaluation of the first run is one of the first run's weights, without training.
    forbid(monkeypatch, "fit")
    again = run(tmp_path, *once, "--scales", "1")[0]["metrics"]
    assert again["miou"] == first["miou"]
    folders = sorted(path.name for path in (tmp_path / "shapes").glob("head-*"))
    assert [name.rpartition("-")[0] for name in folders] == ["head-x1-0"] * 2


def test_weights_of_another_training_are_refused(tmp_path: Path) -> None:
    once = ("--protocols", "head", "--factors", "1")
    run(tmp_path, *once)
    file = tmp_path / "records.jsonl"
    val, _ = read_records(file)
    val["metrics"]["miou"] += 0.01
    file.write_text(json.dumps(val) + "\n")
    with pytest.raises(SystemExit, match="not of one training"):
        run(tmp_path, *once)


def test_a_class_that_is_absent_has_no_value() -> None:
    found = example.metrics(example.Scores(0.5, [0.5, float("nan")], 0.75), ["a", "b"])
    assert found == {"miou": 0.5, "pixel_accuracy": 0.75, "iou a": 0.5, "iou b": None}
    config = {"recipe": {"base_lr": 0.1}}
    rest = {"protocol": "head", "trainable": 3, "decoder": 3, "config": config}
    records = [{"metrics": found | {"miou_multi": 0.5}, **rest} for _ in range(2)]
    records[1]["metrics"] = records[1]["metrics"] | {"iou a": None}
    row = [cell.strip() for cell in example.table(records, ["a", "b"]).splitlines()[2].split("|")]
    assert row[2:6] == ["50.0 +- 0.0", "50.0 +- 0.0", "50.0", "-"]


def test_data_of_ones_own_with_unknown_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("training", "validation", "test"):
        for kind in ("images", "annotations"):
            (tmp_path / "own" / kind / split).mkdir(parents=True)
        for name in "ab":
            pixels, mask = rng.integers(0, 256, (40, 56, 3)), rng.integers(0, 2, (40, 56))
            mask[:5] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(
                tmp_path / f"own/images/{split}/{name}.jpg"
            )
            mask_path = tmp_path / f"own/annotations/{split}/{name}.png"
            Image.fromarray(mask.astype(np.uint8)).save(mask_path)
    options = ("--data", str(tmp_path / "own"), "--factors", "1", "--batch", "2", "--seeds", "2")
    records = run(tmp_path / "out", *options, "--protocols", "vpt+bias")
    assert [r["seed"] for r in records] == [0, 1]
    assert records[0]["metrics"] != records[1]["metrics"]
    text = example.table(records, ["0", "1"])
    assert " +- " in text
    assert "iou 1" in text


def test_images_to_test_on_are_needed(tmp_path: Path) -> None:
    folder = example.draw_shapes(tmp_path / "shapes")
    for kind in ("images", "annotations"):
        (folder / kind / "test").rename(folder / kind / "unused")
    with pytest.raises(SystemExit, match="no images/test"):
        run(tmp_path / "out", "--data", str(folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = example.main(["--output", str(tmp_path)])
    assert [r["protocol"] for r in records] == example.PROTOCOLS.split(",")
    # All background is a mean of a third; every protocol finds shapes.
    assert all(r["metrics"]["miou"] > 0.45 for r in records)
    assert capsys.readouterr().out.count("\n| ") == 2 + len(records)
