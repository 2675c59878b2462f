"""`train`, `eval` and `sweep`: what they write and print, on small models and images, offline."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.hub_server import Hub
from support.images import draw_task
from support.shell import call
from test_hub import HF_BASE, TIMM_BASE, hf_vit, timm_vit, upload_backbone
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("optuna")

import timm
from safetensors.torch import load_file, save_file

from peft_vpt import apply_protocol, inject_prompts, load_task_adapter, save_task_adapter
from peft_vpt.adapter.file import read_adapter
from peft_vpt.cli import sweep as search
from peft_vpt.cli.compare import Backbone
from peft_vpt.data import Transform, loader, open_task
from peft_vpt.experiments.records import read_records
from peft_vpt.training import (
    DivergedError,
    classification_metrics,
    fit,
    loop,
    paper_grid,
    preset,
    prompts_from_tokens,
)

ROOT = Path(__file__).parent.parent
NAME = "test_vit.r160_in1k"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark images in noise, easy to tell apart, and random weights in a file."""
    place = tmp_path_factory.mktemp("made")
    draw_task(place / "task", (12, 6, 7))
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), place / "w.safetensors")
    return place


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `task` and `w.safetensors`, both free to be changed."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


MODEL = ("--model", NAME, "--weights", "w.safetensors", "--size", "64")
SHORT = (*MODEL, "--epochs", "2", "--batch-size", "8")
TRAIN = ("train", "--data", "task", *SHORT, "--length", "3")


def answer(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """Return the one line of JSON that a command writes."""
    found: dict[str, Any] = json.loads(call(capsys, *arguments, "--json")[0])
    return found


def backbone() -> nn.Module:
    """The backbone of `world`, without the command line."""
    overlay = {"file": "w.safetensors"}
    model = timm.create_model(NAME, pretrained=True, img_size=64, pretrained_cfg_overlay=overlay)
    found: nn.Module = model.eval()
    return found


def measured(adapter: str, split: str, data: str = "task") -> dict[str, float]:
    """Metrics of an adapter, image by image."""
    model = load_task_adapter(backbone(), f"./{adapter}").eval()
    images = open_task(data).split(split)
    transform = Transform(read_adapter(Path(adapter)).metadata["preprocessing"], "timm", False)
    with torch.no_grad():
        rows = [model(transform(images.image(i))[None]) for i in range(len(images))]
    return classification_metrics(torch.cat(rows), torch.tensor(images.labels))


# train


def test_train_is_fit_in_python_and_says_what_it_did(world: Path, capsys: Capture) -> None:
    found = answer(capsys, *TRAIN, "--output", "out")
    path = Path("out/adapter.safetensors")
    assert found["adapter"] == str(path)
    assert found["bytes"] == path.stat().st_size
    # 6 blocks x 3 prompts x 64, and a head of 64 x 2 + 2.
    assert found["trainable"] == 6 * 3 * 64 + 130
    adapter = read_adapter(path)
    images = {"size": [64, 64], "crop": None, "interpolation": "bicubic"}
    assert adapter.metadata["preprocessing"].items() >= images.items()
    assert adapter.metadata["head"]["labels"] == ["dark", "light"]
    assert adapter.metadata["task"] == "task"
    assert adapter.metadata["metrics"] == {"split": "val", **found["metrics"]}
    # Batches of other sizes round otherwise in float32.
    assert found["metrics"] == pytest.approx(measured(str(path), "val"), abs=1e-5)

    task, images_of = open_task("task"), Transform(adapter.metadata["preprocessing"], "vtab", True)
    recipe = preset("vpt-deep", epochs=2, batch_size=8)
    model = backbone()
    generator = torch.Generator().manual_seed(0)
    apply_protocol(model, "vpt-deep", num_classes=2, length=3, generator=generator)
    draw, train = torch.Generator().manual_seed(0), task.split("train")
    chosen = torch.randperm(len(train), generator=draw)
    pixels = torch.stack([images_of(train.image(index)) for index in chosen.tolist()])
    prompts_from_tokens(model, pixels, generator=draw)
    assert adapter.spec.init == "tensor"
    batches = loader(train, images_of, batch_size=8, shuffle=True)
    fit(model, batches, recipe=recipe, progress=False)
    own = load_file(save_task_adapter(model, "own"))
    assert own.keys() == load_file(path).keys()
    for name, tensor in load_file(path).items():
        assert torch.equal(own[name], tensor), name


def test_train_prints_results_on_stdout_and_the_rest_on_stderr(
    world: Path, capsys: Capture
) -> None:
    out, err = call(capsys, *TRAIN, "--output", "out", "--evaluate", "test")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["adapter"] == "out/adapter.safetensors"
    assert facts["trained"].startswith("1,282 of 302,")
    assert facts["measured"] == "on  test"
    # Printed with four digits.
    expected = measured("out/adapter.safetensors", "test")["top1"]
    assert float(facts["top1"]) == pytest.approx(expected, abs=5.1e-5)
    assert "train 24, val 12, test 14" in err
    assert "resize to 64x64" in err


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> Any:
    """Let training stop after so many steps, once."""
    note, seen = loop._Run._note, []

    def noted(self: Any, loss: float) -> None:
        note(self, loss)
        seen.append(loss)
        if len(seen) == step:
            raise error

    monkeypatch.setattr(loop._Run, "_note", noted)
    return seen


def test_a_run_that_was_stopped_goes_on_by_the_same_command(
    world: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of three steps; Ctrl-C in the second one."""
    words = (*TRAIN, "--checkpoint-every", "1", "--transform", "fgvc")
    call(capsys, *words, "--output", "whole")
    seen = interrupted_at(monkeypatch, 5, KeyboardInterrupt())
    err = call(capsys, *words, "--output", "out", code=130)[1]
    assert "the same command goes on" in err
    assert sorted(os.listdir("out")) == ["checkpoint.pt", "config.json", "history.jsonl"]
    del seen[:]
    call(capsys, *words, "--output", "out")
    # The step in which it was stopped came too late for its checkpoint.
    assert len(seen) == 2
    both = (Path(name, "adapter.safetensors").read_bytes() for name in ("whole", "out"))
    assert next(both) == next(both)
    del seen[:]
    call(capsys, *words, "--output", "out")
    assert not seen


@pytest.mark.slow
def test_kill_in_the_middle_of_an_epoch(world: Path, capsys: Capture) -> None:
    """A process of its own, a second at the least between two steps."""
    words = [*TRAIN, "--checkpoint-every", "1", "--output", "out"]
    script = f"""
import time
from peft_vpt.cli import main
from peft_vpt.training import loop
step = loop._Run._step
loop._Run._step = lambda self, batches: (time.sleep(1), step(self, batches))[1]
main({words!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment)
    limit = time.monotonic() + 120
    while not Path("out/checkpoint.pt").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not Path("out/adapter.safetensors").exists()
    call(capsys, *TRAIN, "--checkpoint-every", "1", "--output", "out")
    call(capsys, *TRAIN, "--output", "whole")
    both = (Path(name, "adapter.safetensors").read_bytes() for name in ("whole", "out"))
    assert next(both) == next(both)


def test_options_reach_the_run(world: Path, capsys: Capture) -> None:
    call(
        capsys, "train", "--data", "task", *MODEL, "--output", "out", "--protocol", "adapter",
        "--reduction", "16", "--epochs", "1", "--lr", "0.02", "--weight-decay", "0.5", "--seed",
        "3", "--transform", "fgvc", "--fraction", "0.5", "--mixed-precision", "bf16", "--task",
        "light", "--workers", "0",
    )  # fmt: skip
    config = json.loads(Path("out/config.json").read_text())
    recipe = {"epochs": 1, "base_lr": 0.02, "weight_decay": 0.5, "seed": 3, "optimizer": "adamw"}
    assert config["recipe"].items() >= recipe.items()
    # Half of 24 images, and a batch that is no larger.
    assert config["loader"]["images"] == config["recipe"]["batch_size"] == 12
    assert config["mixed_precision"] == "bf16"
    metadata = read_adapter(Path("out/adapter.safetensors")).metadata
    assert metadata["protocol"] == {"name": "adapter", "reduction": 16}
    assert metadata["preprocessing"]["crop"] == 0.875
    assert metadata["task"] == "light"


def test_the_seed_is_that_of_prompts_too(world: Path, capsys: Capture) -> None:
    tensors = []
    for seed in (0, 0, 1):
        call(
            capsys, *TRAIN, "--lr", "1e-12", "--seed", seed, "--restart", "--init", "random",
            "--output", "out",
        )  # fmt: skip
        tensors.append(load_file("out/adapter.safetensors")["prompts.0"])
    assert torch.equal(tensors[0], tensors[1])
    # Xavier's values of one seed and another, which 6 steps at no rate leave where they are.
    assert (tensors[0] - tensors[2]).abs().max() > 1e-3


def test_prompts_begin_as_asked(world: Path, capsys: Capture) -> None:
    call(capsys, *TRAIN, "--lr", "1e-12", "--init", "random", "--output", "random")
    assert read_adapter(Path("random/adapter.safetensors")).spec.init == "xavier"
    model = backbone()
    draw = torch.Generator().manual_seed(0)
    inject_prompts(model, length=3, deep=True, generator=draw)
    found = load_file("random/adapter.safetensors")["prompts.0"]
    torch.testing.assert_close(found, model.prompts.stored(0).detach(), rtol=0, atol=1e-9)
    # Of another beginning, and so another run.
    _, err = call(capsys, *TRAIN, "--lr", "1e-12", "--output", "random", code=1)
    assert "another run" in err
    words = ("train", "--data", "task", *SHORT, "--protocol", "linear", "--output", "x")
    _, err = call(capsys, *words, "--init", "tokens", code=2)
    assert "linear: no prompts train there" in err


def test_the_paper_preset(world: Path, capsys: Capture) -> None:
    words = ("train", "--data", "task", *MODEL, "--preset", "paper", "--epochs", "1")
    call(capsys, *words, "--protocol", "linear", "--output", "out")
    recipe = json.loads(Path("out/config.json").read_text())["recipe"]
    paper = preset("linear", kind="paper", epochs=1)
    assert recipe["optimizer"] == "sgd"
    assert recipe["base_lr"] == paper.base_lr
    assert (paper.batch_size, recipe["batch_size"]) == (2048, 24)


@pytest.mark.parametrize(
    ("words", "images", "split"),
    [
        ((), 24, "val"),
        (("--evaluate", "none"), 24, None),
        (("--split", "trainval"), 36, None),
        (("--split", "trainval", "--evaluate", "test"), 36, "test"),
    ],
)
def test_what_is_trained_and_measured_on(
    words: tuple[str, ...], images: int, split: str | None, world: Path, capsys: Capture
) -> None:
    found = answer(capsys, *TRAIN, *words, "--output", "out")
    config = json.loads(Path("out/config.json").read_text())
    assert config["loader"]["images"] == images
    assert found["split"] == split
    expected = measured("out/adapter.safetensors", split) if split else {}
    assert found["metrics"] == pytest.approx(expected, abs=1e-5)
    stored = read_adapter(Path("out/adapter.safetensors")).metadata["metrics"]
    assert stored == ({"split": split, **found["metrics"]} if split else None)


def damage(world: Path) -> list[str]:
    """Break an image per split, and return those of train and val."""
    files = [world / "task" / name for name in ("train/dark/3.png", "val/light/1.png")]
    for file in (*files, world / "task" / "test" / "light" / "0.png"):
        file.write_bytes(file.read_bytes()[:60])
    return [str(file) for file in files]


def test_broken_images_are_listed_before_anything_is_written(world: Path, capsys: Capture) -> None:
    broken = damage(world)
    err = call(capsys, *TRAIN, "--output", "out", code=1)[1]
    assert all(path in err for path in broken)
    assert "2 of the images cannot be read" in err
    assert "--skip-broken" in err
    # Nobody asked for test.
    assert "/test/" not in err
    assert not Path("out").exists()
    call(capsys, *TRAIN, "--output", "out", "--skip-broken", "--evaluate", "none")
    assert json.loads(Path("out/config.json").read_text())["loader"]["images"] == 23


def without(folder: str) -> None:
    shutil.rmtree(folder)


def flat(world: Path) -> None:
    """Leave a folder without class folders."""
    without("task")
    Path("task").mkdir()
    Image.new("RGB", (9, 9)).save("task/a.png")


def strange(world: Path) -> None:
    shutil.copytree("task/val/dark", "task/val/grey")


BAD: dict[str, tuple[Any, tuple[str, ...], int, str]] = {
    "no folder": (lambda world: without("task"), (), 1, "is not there"),
    "no classes": (flat, (), 1, "no classes"),
    "a class that train lacks": (strange, (), 1, "unknown to train: grey"),
    "no test": (lambda world: without("task/test"), ("--evaluate", "test"), 1, "no split 'test'"),
    "protocol": (None, ("--protocol", "lora"), 1, "--protocol lora: must be one of full"),
    "length of no prompts": (None, ("--protocol", "linear"), 1, "linear has none"),
    "reduction of prompts": (None, ("--reduction", "8"), 1, "only 'adapter'"),
    "rate": (None, ("--lr", "-1"), 1, "--lr -1.0: must be a finite number > 0"),
    "fraction": (None, ("--fraction", "0"), 1, "fraction"),
    "size": (None, ("--size", "50"), 1, "50x50"),
    "weights": (None, ("--weights", "none"), 1, "none is no file"),
    "other weights": (None, ("--model", "test_resnet.r160_in1k"), 1, "Missing key"),
    "model": (None, ("--model", "test_nothing"), 1, "test_nothing"),
    "a file of another library": (None, ("--model", "lab/vit"), 1, "lab/vit is no timm model"),
    "precision": (None, ("--mixed-precision", "fp16"), 1, "bf16"),
    "val of trainval": (None, ("--split", "trainval", "--evaluate", "val"), 2, "among the"),
    "transform": (None, ("--transform", "none"), 2, "--transform"),
    "epochs": (None, ("--epochs", "0"), 2, "--epochs"),
    "output in a file": (None, ("--output", "w.safetensors/out"), 1, "is no folder"),
    "output is a file": (None, ("--output", "w.safetensors"), 1, "is no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_nothing(case: str, world: Path, capsys: Capture) -> None:
    prepare, words, code, match = BAD[case]
    if prepare is not None:
        prepare(world)
    out, err = call(capsys, *TRAIN, "--output", "out", *words, code=code)
    assert match in " ".join(err.split())
    assert out == ""
    assert not Path("out").exists()


def test_an_output_that_may_not_be_written(
    world: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root, as whom tests may run, is let in everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
    Path("closed").mkdir()
    assert "may not be written" in call(capsys, *TRAIN, "--output", "closed/out", code=1)[1]


def test_another_run_is_not_replaced_unasked(world: Path, capsys: Capture) -> None:
    call(capsys, *TRAIN, "--output", "out")
    before = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    err = call(capsys, *TRAIN, "--output", "out", "--lr", "0.1", code=1)[1]
    assert f"recipe.base_lr: {preset('vpt-deep').base_lr} there, 0.1 here" in err
    assert "--restart to start over" in err
    err = call(capsys, *TRAIN, "--output", "out", "--transform", "timm", code=1)[1]
    assert "data.preprocessing.crop: None there, 0.95 here" in err
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == before
    call(capsys, *TRAIN, "--output", "out", "--lr", "0.1", "--restart")
    assert Path("out/adapter.safetensors").read_bytes() != before["adapter.safetensors"]
    Path("out/checkpoint.pt").unlink()
    assert "is there already" in call(capsys, *TRAIN, "--output", "out", code=1)[1]


def test_images_that_changed_are_another_run(world: Path, capsys: Capture) -> None:
    call(capsys, *TRAIN, "--output", "out")
    shutil.move("task/train/dark/0.png", "task/train/light/new.png")
    assert "data.images.train" in call(capsys, *TRAIN, "--output", "out", code=1)[1]


def test_images_of_the_same_names_in_another_folder_are_another_run(
    world: Path, capsys: Capture
) -> None:
    call(capsys, *TRAIN, "--output", "out")
    # A folder that was moved is the same; one whose files differ in one byte only is not.
    Path("other").mkdir()
    shutil.move("task", "other/task")
    words = (*TRAIN, "--data", "other/task", "--output", "out")
    call(capsys, *words)
    file = Path("other/task/train/dark/0.png")
    size = file.stat().st_size
    Image.fromarray(np.asarray(Image.open(file)) ^ np.uint8(1)).save(file)
    assert abs(file.stat().st_size - size) < size
    assert "data.images.train" in call(capsys, *words, code=1)[1]


def test_training_that_diverges_saves_no_adapter(world: Path, capsys: Capture) -> None:
    words = (*TRAIN, "--preset", "paper", "--lr", "1e30", "--output", "out")
    assert "epoch" in call(capsys, *words, code=1)[1]
    assert not Path("out/adapter.safetensors").exists()


@pytest.mark.parametrize("base", [TIMM_BASE, HF_BASE])
def test_backbones_of_the_hub(base: str, hub: Hub, world: Path, capsys: Capture) -> None:
    """Trained by name; the adapter then says what `eval` and `predict` need."""
    model = timm_vit() if base == TIMM_BASE else hf_vit()
    upload_backbone(model, base, world / "base")
    words = ("--model", base, "--epochs", "3", "--batch-size", "8", "--length", "2")
    found = answer(capsys, "train", "--data", "task", *words, "--output", "out")
    again = answer(capsys, "eval", "./out", "--data", "task", "--split", "val")
    # Batches of other sizes round otherwise in float32.
    assert again["metrics"] == pytest.approx(found["metrics"], abs=1e-5)
    rows = call(capsys, "predict", "--adapter", "./out", "task/val", "--json")[0].splitlines()
    right = [
        row["predictions"][0]["label"] == Path(row["file"]).parent.name
        for row in map(json.loads, rows)
    ]
    assert np.mean(right) == pytest.approx(found["metrics"]["top1"])
    call(capsys, "train", "--data", "task", *words, "--output", "more", "--offline")


DISTRIBUTED = ("--standalone", "--nproc-per-node", "2", "-m", "peft_vpt")


@pytest.mark.slow
def test_two_processes(world: Path, capsys: Capture) -> None:
    """Each image once, one adapter, one answer."""
    damage(world)
    words = [*TRAIN, "--skip-broken", "--evaluate", "test", "--output", "out", "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", *DISTRIBUTED, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert json.loads(Path("out/config.json").read_text())["machine"]["processes"] == 2
    again = answer(
        capsys, "eval", "./out", "--data", "task", "--weights", "w.safetensors", "--skip-broken"
    )
    assert again["images"] == 13
    # The sums of two processes are added in another order.
    assert again["metrics"] == pytest.approx(found["metrics"], abs=1e-5)
    assert done.stderr.count("cannot be read: train") == 1


# eval

IMAGES: dict[str, Any] = {
    "size": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
    "crop": None,
}  # fmt: skip
EVAL = ("--data", "task", "--weights", "w.safetensors")


def an_adapter(
    path: str, labels: tuple[str, ...] | None = ("dark", "light"), classes: int = 2
) -> nn.Module:
    """Save a model with random prompts and a random head."""
    model = inject_prompts(backbone(), 2, num_classes=classes)
    with torch.no_grad():
        # Heads begin so close to zero that all classes would be alike.
        model.head.weight.normal_()
    save_task_adapter(model, path, labels=labels, preprocessing=IMAGES)
    return model


def test_eval_measures_each_image_once(world: Path, capsys: Capture) -> None:
    an_adapter("one")
    for split, images in (("test", 14), ("val", 12), ("trainval", 36), ("all", 50)):
        words = ("one", *EVAL, "--split", split, "--batch-size", "5")
        found = answer(capsys, "eval", *words)
        assert (found["split"], found["images"], found["task"]) == (split, images, "task")
        if split in ("test", "val"):
            expected = measured("one/adapter.safetensors", split)
            assert found["metrics"] == pytest.approx(expected, abs=1e-5)
    out, err = call(capsys, "eval", "one", *EVAL)
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["test"] == "14 images"
    expected = measured("one/adapter.safetensors", "test")
    assert float(facts["loss"]) == pytest.approx(expected["loss"], abs=1e-4)
    assert "train 24" in err


def test_eval_goes_by_the_names_of_classes(world: Path, capsys: Capture) -> None:
    """The same network under exchanged labels is right where it was wrong."""
    model = an_adapter("one")
    save_task_adapter(model, "other", labels=("light", "dark"), preprocessing=IMAGES)
    one, other = (answer(capsys, "eval", name, *EVAL)["metrics"] for name in ("one", "other"))
    assert other["top1"] == pytest.approx(1 - one["top1"])
    # At even odds both would be log 2.
    assert abs(one["loss"] - other["loss"]) > 1e-2


def test_eval_prepares_images_as_the_adapter_says(world: Path, capsys: Capture) -> None:
    model = an_adapter("one")
    images = {**IMAGES, "mean": [0.1] * 3, "std": [0.9] * 3, "crop": 0.5}
    save_task_adapter(model, "other", labels=("dark", "light"), preprocessing=images)
    losses = [answer(capsys, "eval", n, *EVAL)["metrics"]["loss"] for n in ("one", "other")]
    expected = [measured(f"{n}/adapter.safetensors", "test")["loss"] for n in ("one", "other")]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4


def test_eval_gives_a_file_of_weights_the_pooling_of_the_adapter(
    world: Path, capsys: Capture
) -> None:
    model: Any = backbone()
    model.reset_classifier(2, global_pool="avg")
    save_task_adapter(inject_prompts(model, 2), "one", preprocessing=IMAGES)
    assert answer(capsys, "eval", "one", *EVAL)["images"] == 14


def test_eval_refuses_other_classes(world: Path, capsys: Capture) -> None:
    an_adapter("three", ("dark", "grey", "light"), 3)
    err = call(capsys, "eval", "three", *EVAL, code=1)[1]
    assert "task lacks grey" in err
    an_adapter("other", ("dark", "bright"))
    err = call(capsys, "eval", "other", *EVAL, code=1)[1]
    assert "the adapter lacks light; task lacks bright" in err
    an_adapter("nameless", None, 3)
    assert "3 classes without names" in call(capsys, "eval", "nameless", *EVAL, code=1)[1]
    an_adapter("numbered", None)
    assert answer(capsys, "eval", "numbered", *EVAL)["images"] == 14
    save_task_adapter(inject_prompts(backbone(), 2, num_classes=0), "prompts")
    assert "without a head" in call(capsys, "eval", "prompts", *EVAL, code=1)[1]


def test_eval_of_bad_input(world: Path, capsys: Capture) -> None:
    an_adapter("one")
    assert "no such adapter" in call(capsys, "eval", "./none", *EVAL, code=1)[1]
    assert "--device" in call(capsys, "eval", "one", *EVAL, "--device", "abacus", code=2)[1]
    other = ("--data", "task", "--model", "test_vit2.r160_in1k", "--weights", "w.safetensors")
    assert "Missing key" in call(capsys, "eval", "one", *other, code=1)[1]
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), "v.safetensors")
    words = ("--data", "task", "--weights", "v.safetensors")
    assert "has others" in call(capsys, "eval", "one", *words, code=1)[1]
    broken = damage(world)
    err = call(capsys, "eval", "one", *EVAL, "--split", "trainval", code=1)[1]
    assert all(path in err for path in broken)
    assert answer(capsys, "eval", "one", *EVAL, "--skip-broken")["images"] == 13
    without("task/test")
    assert "no split 'test'" in call(capsys, "eval", "one", *EVAL, code=1)[1]


# sweep

SWEEP = ("sweep", "--data", "task", *SHORT, "--lengths", "1,2", "--seeds", "2", "--output", "out")
RATES = [factor * preset("vpt-deep").base_lr for factor in (0.3, 1.0, 3.0)]


def runs(split: str) -> list[dict[str, Any]]:
    return [r for r in read_records("out/records.jsonl") if r["split"] == split]


def settings_of(record: dict[str, Any]) -> tuple[int, float]:
    config = record["config"]
    return config["options"]["length"], config["recipe"]["base_lr"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were trained, as `run_once` was asked for them."""
    from peft_vpt.experiments import run

    done: list[str] = []
    once = run.run_once

    def counted(given: run.Run) -> Any:
        done.append(given.test)
        return once(given)

    monkeypatch.setattr(run, "run_once", counted)
    return done


def test_sweep_chooses_on_val_and_judges_on_test(
    world: Path, capsys: Capture, trained: list[str]
) -> None:
    out, err = call(capsys, *SWEEP)
    tried = {settings_of(record): record["metrics"]["top1"] for record in runs("val")}
    assert sorted(tried) == sorted((length, rate) for length in (1, 2) for rate in RATES)
    best = min(tried, key=lambda key: (-tried[key], key[1], key[0]))
    final = sorted(runs("test"), key=lambda record: record["seed"])
    assert [settings_of(record) for record in final] == [best, best]
    assert [record["seed"] for record in final] == [0, 1]
    assert {record["config"]["train"] for record in final} == {"trainval"}
    assert {record["config"]["train"] for record in runs("val")} == {"train"}
    for record in final:
        path = f"out/{record['adapter']}/adapter.safetensors"
        expected = measured(path, "test")
        assert {k: record["metrics"][k] for k in expected} == pytest.approx(expected, abs=1e-5)
    assert out == Path("out/vpt-deep.md").read_text()
    assert "Prompts begin as tokens of training images." in out
    assert {record["config"]["options"]["init"] for record in final} == {"tokens"}
    mean = np.mean([100 * record["metrics"]["top1"] for record in final])
    assert f"test top1 {mean:.1f} ±" in out
    assert out.count("| best |") == 1
    assert "6 settings to try, then 2 final runs" in err
    assert trained == ["val"] * 6 + ["test"] * 2

    del trained[:]
    assert call(capsys, *SWEEP)[0] == out
    assert trained == []
    call(capsys, *SWEEP, "--seeds", "3")
    assert trained == ["test"]


def test_a_sweep_that_was_stopped_goes_on(
    world: Path, capsys: Capture, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # Six steps a run: the third run.
        interrupted_at(patch, 14, KeyboardInterrupt())
        call(capsys, *SWEEP, code=130)
    assert trained == ["val"] * 3
    del trained[:]
    with monkeypatch.context() as patch:
        # Four trials of 6 steps, a final run of 10 with 36 images.
        interrupted_at(patch, 4 * 6 + 10 + 3, KeyboardInterrupt())
        call(capsys, *SWEEP, code=130)
    assert trained == ["val"] * 4 + ["test"] * 2
    del trained[:]
    call(capsys, *SWEEP)
    assert trained == ["test"]
    assert (len(runs("val")), len(runs("test"))) == (6, 2)


def test_records_count_where_the_study_was_lost(
    world: Path, capsys: Capture, trained: list[str]
) -> None:
    """Killed between the record of a run and the note in the study, say."""
    call(capsys, *SWEEP)
    for journal in Path("out").glob("*.journal"):
        journal.unlink()
    del trained[:]
    call(capsys, *SWEEP)
    assert trained == []
    Path("out/records.jsonl").write_text(
        "".join(line for line in Path("out/records.jsonl").read_text().splitlines(True)
                if '"seed": 1' not in line)
    )  # fmt: skip
    call(capsys, *SWEEP)
    assert trained == ["test"]


def test_two_workers_share_a_sweep(world: Path, capsys: Capture, trained: list[str]) -> None:
    """Another process and this one; each trial and each final run is one worker's."""
    words = [*SWEEP, "--epochs", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-m", "peft_vpt", *words]
    other = subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not Path("out/records.jsonl").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    out = call(capsys, *words)[0]
    theirs = other.communicate(timeout=120)[0]
    assert other.returncode == 0
    assert out == theirs
    assert 0 < len(trained) < 8
    points = [settings_of(record) for record in runs("val")]
    assert len(points) == len(set(points)) == 6
    assert sorted(record["seed"] for record in runs("test")) == [0, 1]


def test_other_settings_are_another_sweep(world: Path, capsys: Capture) -> None:
    words = (*SWEEP, "--lengths", "1", "--seeds", "1", "--epochs", "1")
    call(capsys, *words)
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), "v.safetensors")
    for change in (("--epochs", "2"), ("--lengths", "2"), ("--size", "80"),
                   ("--weights", "v.safetensors"), ("--grid", "paper")):  # fmt: skip
        assert "Use another name or folder" in call(capsys, *words, *change, code=1)[1], change
    shutil.move("task/train/dark/0.png", "task/train/light/new.png")
    assert "Use another name or folder" in call(capsys, *words, code=1)[1]


def plan(protocol: str, grid: str = "default", **choices: list[int]) -> dict[str, list[Any]]:
    return search.Search(
        backbone=Backbone(NAME, None, None, True, None), protocol=protocol, grid=grid,
        choices=choices, changes={}, folder=Path("out"), group=None,
    ).points()  # fmt: skip


def test_grids() -> None:
    assert plan("vpt-deep", "paper", length=[1, 50]) == {
        "length": [1, 50], **paper_grid("vpt-deep"),
    }  # fmt: skip
    assert plan("vpt-shallow", "wide") == {
        "length": [20], **paper_grid("vpt-shallow", wide=True),
    }  # fmt: skip
    own = preset("linear").base_lr
    assert plan("linear") == {"base_lr": [0.3 * own, own, 3 * own]}
    assert plan("adapter", reduction=[8, 64])["reduction"] == [8, 64]
    assert plan("adapter")["reduction"] == [8]


def test_a_trial_that_diverges_is_told_and_not_chosen(
    world: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_vpt.experiments import run

    once = run.run_once

    def shaky(given: run.Run) -> Any:
        recipe = given.recipe
        if recipe.base_lr == RATES[2] or (given.test, recipe.seed) == ("test", 1):
            raise DivergedError("the loss is nan")
        return once(given)

    monkeypatch.setattr(run, "run_once", shaky)
    out = call(capsys, *SWEEP, "--lengths", "1")[0]
    assert out.count("diverged") == 1
    diverged = {settings_of(record)[1]: record["metrics"].get("diverged") for record in runs("val")}
    assert diverged == {RATES[0]: None, RATES[1]: None, RATES[2]: 1.0}
    final = sorted(runs("test"), key=lambda record: record["seed"])
    assert all(settings_of(record)[1] != RATES[2] for record in final)
    assert [record["metrics"].get("diverged") for record in final] == [None, 1.0]
    assert [record.get("failure") for record in final] == [None, "the loss is nan"]


def one_class() -> None:
    for folder in Path("task").glob("*/light"):
        shutil.rmtree(folder)


def test_a_run_of_other_weights_is_not_gone_on_with(world: Path, capsys: Capture) -> None:
    words = ("train", "--data", "task", *SHORT, "--protocol", "full", "--output", "out")
    call(capsys, *words)
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), "v.safetensors")
    err = call(capsys, *words, "--weights", "v.safetensors", code=1)[1]
    assert "model.backbone" in err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    call(capsys, *words)


def test_a_run_that_is_done_is_measured_on_the_images_of_now(world: Path, capsys: Capture) -> None:
    first = answer(capsys, *TRAIN, "--output", "out")["metrics"]
    Path("task/val/dark").rename("task/val/spare")
    Path("task/val/light").rename("task/val/dark")
    Path("task/val/spare").rename("task/val/light")
    again = answer(capsys, *TRAIN, "--output", "out")["metrics"]
    assert again["top1"] == pytest.approx(1 - first["top1"])
    assert again == answer(capsys, "eval", "out", *EVAL, "--split", "val")["metrics"]


def test_half_precision_trains_and_metrics_are_those_of_eval(world: Path, capsys: Capture) -> None:
    words = (*TRAIN, "--output", "out", "--mixed-precision", "bf16")
    found = answer(capsys, *words)["metrics"]
    assert found == answer(capsys, "eval", "out", *EVAL, "--split", "val")["metrics"]


def test_a_last_batch_of_one_is_left_out_under_batch_norms(world: Path, capsys: Capture) -> None:
    words = ("train", "--data", "task", *SHORT, "--batch-size", "23", "--protocol", "mlp-2")
    call(capsys, *words, "--output", "out")
    # 24 images: a batch of 23, and the one that is left.
    assert json.loads(Path("out/config.json").read_text())["loader"]["steps_per_epoch"] == 1
    call(capsys, *words, "--protocol", "linear", "--output", "other")
    assert json.loads(Path("other/config.json").read_text())["loader"]["steps_per_epoch"] == 2


def test_copies_of_training_images_are_told(world: Path, capsys: Capture) -> None:
    shutil.copy("task/train/dark/0.png", "task/val/dark/copy.png")
    shutil.rmtree("task/test")
    shutil.copytree("task/train", "task/test")
    err = " ".join(call(capsys, *TRAIN, "--output", "out")[1].split())
    assert "note: 1 of the 13 images of val are in train too, byte for byte" in err
    err = " ".join(call(capsys, *TRAIN, "--output", "other", "--evaluate", "test")[1].split())
    assert "note: 24 of the 24 images of test are in train too, byte for byte" in err


def test_a_class_all_of_whose_images_are_broken(world: Path, capsys: Capture) -> None:
    for file in Path("task/train/dark").iterdir():
        file.write_bytes(b"broken")
    err = call(capsys, *TRAIN, "--output", "out", "--skip-broken", code=1)[1]
    assert "no image of dark in train can be read" in " ".join(err.split())
    assert not Path("out").exists()


def test_one_class_is_nothing_to_tell_apart(world: Path, capsys: Capture) -> None:
    one_class()
    assert "one class only" in call(capsys, *TRAIN, "--output", "out", code=1)[1]
    words = ("compare", "--data", "task", *MODEL, "--output", "out")
    assert "one class only" in call(capsys, *words, code=1)[1]
    assert not Path("out").exists()


BAD_SWEEPS: dict[str, tuple[Any, tuple[str, ...], int, str]] = {
    "no folder": (lambda world: without("task"), (), 1, "is not there"),
    "no test": (lambda world: without("task/test"), (), 1, "no split 'test'"),
    "protocol": (None, ("--protocol", "lora"), 1, "--protocol lora: must be one of full"),
    "lengths of no prompts": (None, ("--protocol", "linear"), 1, "linear has none"),
    "reductions of prompts": (None, ("--reductions", "8"), 1, "only 'adapter'"),
    "lengths": (None, ("--lengths", "1,b"), 2, "--lengths"),
    "part of a prompt": (None, ("--lengths", "1.5"), 2, "whole numbers"),
    "wide": (None, ("--grid", "wide"), 1, "vpt-shallow"),
    "twice": (None, ("--lengths", "1,1"), 1, "different"),
    "size": (None, ("--size", "50"), 1, "50x50"),
    "broken": (damage, (), 1, "3 of the images cannot be read"),
    "output": (None, ("--output", "w.safetensors/out"), 1, "is no folder"),
    "one class": (lambda world: one_class(), (), 1, "has one class only, dark"),
}


@pytest.mark.parametrize("case", BAD_SWEEPS)
def test_bad_sweeps_leave_nothing(case: str, world: Path, capsys: Capture) -> None:
    prepare, words, code, match = BAD_SWEEPS[case]
    if prepare is not None:
        prepare(world)
    out, err = call(capsys, *SWEEP, *words, code=code)
    assert match in " ".join(err.split())
    assert out == ""
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--protocol", "partial-99"), "--protocol partial-99"),
        (("--protocol", "sidetune", "--size", "48"), "no forward of an image of 48x48 pixels"),
    ],
)
def test_what_the_backbone_refuses_leaves_no_study(
    words: tuple[str, ...], match: str, world: Path, capsys: Capture
) -> None:
    given = ("sweep", "--data", "task", *MODEL, "--epochs", "1", "--seeds", "1", "--output", "out")
    assert match in " ".join(call(capsys, *given, *words, code=1)[1].split())
    assert not Path("out").exists()
    call(capsys, *given, "--protocol", "linear")


def test_a_sweep_without_broken_images(world: Path, capsys: Capture) -> None:
    damage(world)
    words = (*SWEEP, "--skip-broken", "--lengths", "1", "--epochs", "1", "--seeds", "1")
    call(capsys, *words, "--grid", "default", "--batch-size", "64")
    # As many as the images that are left.
    assert {record["config"]["recipe"]["batch_size"] for record in runs("val")} == {23}
    assert {record["config"]["recipe"]["batch_size"] for record in runs("test")} == {34}


@pytest.mark.parametrize("command", ["train", "eval", "sweep"])
def test_help_imports_nothing_heavy(command: str) -> None:
    script = f"""
import sys
from peft_vpt.cli import main
assert main([{command!r}, "--help"]) == 0
heavy = [n for n in ("torch", "timm", "accelerate", "optuna", "PIL", "numpy") if n in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True)


# What would become an image, or is found too late


@pytest.mark.parametrize("place", ["flat", "flat/out", "flat/dark/out", "task/train/out"])
@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_results_are_not_put_among_the_images(
    command: str, place: str, world: Path, capsys: Capture
) -> None:
    shutil.copytree("task/train", "flat")
    data = place.partition("/")[0]
    out, err = call(capsys, command, "--data", data, *MODEL, "--output", place, code=1)
    assert "lies among the images" in err
    assert out == ""
    assert sorted(path.name for path in Path("flat").iterdir()) == ["dark", "light"]
    assert sorted(path.name for path in Path("task/train").iterdir()) == ["dark", "light"]


@pytest.mark.parametrize("place", ["task/out", "task/train/.out"])
def test_results_that_are_no_images_may_lie_beside_them(
    place: str, world: Path, capsys: Capture
) -> None:
    for _ in range(2):
        call(capsys, *TRAIN, "--output", place)
    assert open_task("task").classes == ("dark", "light")


def lists_of_one_class() -> None:
    """Make lists that name two classes and have one."""
    Path("lists").mkdir()
    for name in ("train800", "val200", "train800val200", "test"):
        Image.new("RGB", (40, 40)).save(f"lists/{name}.png")
    for name in ("train800", "val200", "test"):
        Path(f"lists/{name}.txt").write_text(f"{name}.png 0\n")
    Path("lists/train800val200.txt").write_text("train800.png 0\nval200.png 0\n")
    Path("lists/classes.txt").write_text("one\ntwo\n")


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_one_class_to_train_on_is_nothing_to_tell_apart(
    command: str, world: Path, capsys: Capture
) -> None:
    lists_of_one_class()
    err = call(capsys, command, "--data", "lists", *MODEL, "--output", "out", code=1)[1]
    assert "train has one class only, one" in err
    assert not Path("out").exists()


def test_shares_of_the_images_are_read_before_anything_is_written(
    world: Path, capsys: Capture
) -> None:
    names = {}
    for part in ("train", "val", "test"):
        files = sorted(Path("task", part).glob("*/*.png"))
        names[part] = {f"{part}/{f.parent.name}/{f.name}": f.parent.name for f in files}
        Path(f"task/{part}.json").write_text(json.dumps(names[part]))
    (Path("task/images")).mkdir()
    for part in ("train", "val", "test"):
        shutil.move(f"task/{part}", f"task/images/{part}")
    Image.new("RGB", (40, 40)).save("task/images/broken.png")
    broken = Path("task/images/broken.png")
    broken.write_bytes(broken.read_bytes()[:50])
    Path("task/train_50.json").write_text(json.dumps({**names["train"], "broken.png": "dark"}))
    words = ("compare", "--data", "task", *MODEL, "--protocols", "linear", "--fraction", "0.5")
    err = call(capsys, *words, "--output", "out", code=1)[1]
    assert f"cannot be read: train, {broken.absolute()}: " in err
    assert "SyntaxError" in err or "OSError" in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--protocols", "linear", "--length", "3"), "no row takes it"),
        (("--ablation", "length", "--lengths", "1,2"), "no row takes it"),
        (("--length", "3", "--lengths", "2"), "in place of --length"),
        (("--ensemble", "--seeds", "1"), "--seeds 2"),
        (("--lengths", ""), "separated by commas"),
    ],
)
def test_options_without_effect_are_refused(
    words: tuple[str, ...], told: str, world: Path, capsys: Capture
) -> None:
    err = call(capsys, "compare", "--data", "task", *MODEL, "--output", "out", *words, code=2)[1]
    assert told in " ".join(err.replace("│", " ").split())
    assert not Path("out").exists()


def test_predict_takes_the_weights_that_train_took(world: Path, capsys: Capture) -> None:
    call(capsys, *TRAIN, "--output", "out")
    Image.new("RGB", (40, 40)).save("more.tga")
    Path("photos/deep").mkdir(parents=True)
    shutil.move("more.tga", "photos/deep/more.tga")
    Image.new("RGB", (40, 40), "white").save("photos/one.JPE", format="jpeg")
    words = ("predict", "photos", "--adapter", "out", "--weights", "w.safetensors", "--json")
    rows = [json.loads(line) for line in call(capsys, *words)[0].splitlines()]
    assert [row["file"] for row in rows] == ["photos/deep/more.tga", "photos/one.JPE"]
    model = load_task_adapter(backbone(), "./out").eval()
    transform = Transform(
        read_adapter(Path("out/adapter.safetensors")).metadata["preprocessing"], "timm", False
    )
    for row in rows:
        with torch.no_grad(), Image.open(row["file"]) as picture:
            shares = model(transform(picture.convert("RGB"))[None]).double().softmax(-1)[0]
        best = row["predictions"][0]
        assert best["probability"] == pytest.approx(float(shares.max()), abs=1e-6)
        assert best["index"] == int(shares.argmax())
    call(capsys, "predict", "photos", "--adapter", "out", code=1)


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_a_device_that_is_not_there_is_told(command: str, world: Path, capsys: Capture) -> None:
    call(capsys, *TRAIN, "--output", "out")
    first = ("predict", "task", "--adapter", "out") if command == "predict" else ("eval", "out")
    data = () if command == "predict" else ("--data", "task")
    for device in ("cuda:77", "meta"):
        err = call(capsys, *first, *data, "--device", device, code=2)[1]
        assert "no device that torch has here" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("factor", ["0", "1e300"])
def test_rates_that_cannot_be_leave_nothing(factor: str, world: Path, capsys: Capture) -> None:
    words = ("compare", "--data", "task", *MODEL, "--output", "out", "--factors", factor)
    assert "base lr" in call(capsys, *words, code=1)[1]
    assert not Path("out").exists()
