"""The command line: exit codes, output, errors; against files and a loopback Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub_server import Hub
from support.shell import call
from test_hub import (
    HF_BASE,
    LABELS,
    REPO,
    TIMM_BASE,
    averaged,
    hf_vit,
    prompted,
    timm_vit,
    upload_backbone,
)
from torch import nn

from peft_vpt import inject_prompts, save_task_adapter
from peft_vpt.adapter.file import read_adapter
from peft_vpt.cli import main

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "timm", "transformers", "huggingface_hub", "PIL", "numpy", "safetensors")
OTHER_WEIGHTS, OTHER_ARCHITECTURE = "lab/other-weights", "lab/other-architecture"

Capture = pytest.CaptureFixture[str]


@dataclass
class World:
    """A loopback Hub that holds a backbone, and a saved adapter for it."""

    hub: Hub
    model: nn.Module
    adapter: Path
    backbone: nn.Module


@pytest.fixture
def world(hub: Hub, tmp_path: Path) -> World:
    backbone = timm_vit()
    upload_backbone(backbone, TIMM_BASE, tmp_path / "base")
    model = prompted(timm_vit())
    metrics = {"accuracy": 0.93}
    path = save_task_adapter(model, tmp_path / "pets", task="pets", labels=LABELS, metrics=metrics)
    return World(hub, model, path, backbone)


def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    words = [sys.executable, "-m", "peft_vpt", *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, **options)


# Start-up, exit codes, errors.


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["--version"], ["nonsense"]])
def test_nothing_heavy_is_imported_before_a_command_runs(words: list[str]) -> None:
    script = f"""
import sys
from peft_vpt.cli import main
code = main({words!r})
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == (2 if words == ["nonsense"] else 0), done.stderr


def test_as_a_module(tmp_path: Path) -> None:
    done = start("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("info", "check", "push", "pull", "predict", "supported"):
        assert name in done.stdout
    done = start("info", str(tmp_path / "nothing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: peft-vpt info: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["info"],
        ["info", "a", "b"],
        ["info", "a", "--nonsense"],
        ["check", "a"],
        ["check", "a", "--model", "b", "--library", "keras"],
        ["predict", "--adapter", "a"],
        ["predict", "b.png"],
        ["predict", "--adapter", "a", "b.png", "--top-k", "0"],
        ["predict", "--adapter", "a", "b.png", "--device", "abacus"],
    ],
)
def test_wrong_usage_is_2(words: list[str], capsys: Capture) -> None:
    assert call(capsys, *words, code=2)[1]


def test_no_words_show_the_help(capsys: Capture) -> None:
    assert "Usage: peft-vpt" in call(capsys, code=2)[0]


def test_version(capsys: Capture) -> None:
    import peft_vpt

    assert call(capsys, "--version")[0] == f"peft-vpt {peft_vpt.__version__}\n"


@pytest.mark.parametrize("words", [["--json"], []], ids=["written at once", "written at the end"])
def test_a_reader_that_goes_away_is_no_traceback(world: World, words: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_vpt", "info", *words, str(world.adapter)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Unbuffered, everything would be written at once.
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_a_stream_that_is_closed_or_full_is_no_traceback(world: World) -> None:
    words = f"{sys.executable} -m peft_vpt info {world.adapter}"
    for where, code, says in (
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("> /dev/full", 1, "error: OSError: [Errno 28] No space left"),
    ):
        done = subprocess.run(
            f"{words} {where}", shell=True, capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith(says) if says else not done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd (PEFT_VPT_DEBUG=1 shows where)\n"),
    ],
)
@pytest.mark.parametrize(
    "place", ["peft_vpt.adapter.source.find_adapter", "peft_vpt.cli.get_command"]
)
def test_other_exceptions(
    place: str,
    raised: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(place, fail)
    assert call(capsys, "info", "a", code=code) == ("", says)


def test_tracebacks_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("PEFT_VPT_DEBUG", "1")
    assert main(["info", str(tmp_path / "nothing")]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_libraries_print_goes_to_stderr(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import timm

    original = timm.create_model

    def noisy(*args: Any, **kwargs: Any) -> nn.Module:
        print("noise")
        return original(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", noisy)
    image = png(tmp_path / "a.png")
    for words in (
        ("check", world.adapter, "--model", "test_vit", "--no-weights"),
        ("predict", "--adapter", world.adapter, image),
    ):
        out, err = call(capsys, *words)
        assert "noise" not in out
        assert "noise" in err


# info


def test_info_on_file_folder_and_hub_id(world: World, capsys: Capture) -> None:
    world.hub.create(REPO, {"adapter.safetensors": world.adapter.read_bytes()})
    texts = []
    for source in (world.adapter, world.adapter.parent, REPO):
        first, _, rest = call(capsys, "info", source)[0].partition("\n")
        assert first.startswith("file ")
        texts.append(rest)
    assert texts[0] == texts[1] == texts[2]
    facts = dict(line.split(maxsplit=1) for line in texts[0].splitlines())
    assert facts["task"] == "pets"
    assert facts["backbone"] == "timm test_vit, 6 blocks of width 64"
    assert facts["prompts"].startswith("deep, length 4, blocks 0, 1, 2, 3, 4, 5; ")
    assert facts["labels"] == ", ".join(LABELS)
    assert facts["metrics"] == "accuracy 0.93"
    count = sum(p.numel() for p in world.model.parameters() if p.requires_grad)
    assert facts["parameters"].startswith(f"{count:,} ({6 * 4 * 64:,} of prompts")


def test_info_json_is_the_metadata_with_path_and_sizes(world: World, capsys: Capture) -> None:
    adapter = read_adapter(world.adapter)
    found = json.loads(call(capsys, "info", world.adapter, "--json")[0])
    sizes = found.pop("sizes")
    assert found.pop("path") == str(world.adapter)
    assert found == adapter.metadata
    assert sizes["file"] == world.adapter.stat().st_size
    assert {name: tuple(t["shape"]) for name, t in sizes["tensors"].items()} == {
        name: tuple(t.shape) for name, t in adapter.tensors.items()
    }
    parts = sizes["parameters"]
    assert parts["total"] == sum(t.numel() for t in adapter.tensors.values())
    assert parts["head"] == 3 * 64 + 3


def test_info_of_prompts_without_a_head(tmp_path: Path, capsys: Capture) -> None:
    model = inject_prompts(timm_vit(), 2, num_classes=0)
    path = save_task_adapter(model, tmp_path)
    assert "head           none\n" in call(capsys, "info", path)[0]
    image = png(tmp_path / "a.png")
    err = call(capsys, "predict", "--adapter", path, image, code=1)[1]
    assert "without a head" in err


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    labels = ["\x1b[31mred", "two\nlines", "a\tb"]
    path = save_task_adapter(prompted(timm_vit()), tmp_path, task="\x1b]0;x\x07", labels=labels)
    out = call(capsys, "info", path)[0]
    assert "\x1b" not in out
    assert r"labels         \x1b[31mred, two\nlines, a\tb" in out


def test_info_errors(world: World, tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(world.adapter.read_bytes()[:-1])
    for source, says in (
        (broken, "broken.safetensors"),
        (tmp_path / "nothing", "no such adapter"),
        ("user/nothing", "RepositoryNotFoundError"),
        ("a b", "no such adapter"),
    ):
        out, err = call(capsys, "info", source, code=1)
        assert out == ""
        assert err.startswith("error: peft-vpt info: ")
        assert says in err


@pytest.mark.filterwarnings("default::UserWarning")
def test_messages_are_in_the_words_of_the_shell(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    world.hub.create(REPO, {"adapter.safetensors": world.adapter.read_bytes()})
    err = call(capsys, "info", REPO, "--revision", "nowhere", code=1)[1]
    assert "check --revision" in err
    err = call(capsys, "info", world.adapter, "--revision", "main")[1]
    assert err.startswith("warning: peft-vpt info: --revision main is of no use: ")
    image = png(tmp_path / "a.png")
    upload_backbone(timm_vit(seed=1), OTHER_WEIGHTS, tmp_path / "other")
    words = ("predict", "--adapter", REPO, image, "--model", OTHER_WEIGHTS)
    err = call(capsys, *words, code=1)[1]
    assert err.startswith("error: peft-vpt predict: ")
    assert "strict" not in err
    monkeypatch.delenv("HF_TOKEN")
    err = call(capsys, "push", world.adapter, REPO, code=1)[1]
    assert err.startswith(f"error: peft-vpt push: {REPO}: ")
    assert "or set HF_TOKEN" in err
    assert "token=" not in err


def test_offline_takes_the_cache_only(world: World, capsys: Capture) -> None:
    world.hub.create(REPO, {"adapter.safetensors": world.adapter.read_bytes()})
    world.hub.requests.clear()
    err = call(capsys, "info", REPO, "--offline", code=1)[1]
    assert "cache" in err
    assert not world.hub.requests
    call(capsys, "info", REPO)
    world.hub.requests.clear()
    call(capsys, "info", REPO, "--offline")
    assert not world.hub.requests


# check


def test_check_against_timm_backbones(world: World, tmp_path: Path, capsys: Capture) -> None:
    import timm

    upload_backbone(timm_vit(seed=1), OTHER_WEIGHTS, tmp_path / "other")
    upload_backbone(timm.create_model("test_vit3"), OTHER_ARCHITECTURE, tmp_path / "other2")
    assert call(capsys, "check", world.adapter, "--model", TIMM_BASE)[0] == f"fits  {TIMM_BASE}\n"
    out = call(capsys, "check", world.adapter, "--model", OTHER_WEIGHTS, code=1)[0]
    assert out.startswith("does not fit  ")
    assert "weights" in out
    out = call(capsys, "check", world.adapter, "--model", OTHER_ARCHITECTURE, code=1)[0]
    assert out.startswith("does not fit  ")


def test_check_without_weights(world: World, capsys: Capture) -> None:
    world.hub.requests.clear()
    words = ("check", world.adapter, "--no-weights", "--model")
    assert call(capsys, *words, "test_vit") == ("fits  test_vit (weights not compared)\n", "")
    assert call(capsys, *words, "test_vit3", code=1)[0].startswith("does not fit")
    assert "no attention" in call(capsys, *words, "test_resnet", code=1)[0]
    assert not world.hub.requests
    call(capsys, *words, TIMM_BASE)
    assert {path.rpartition("/")[2] for _, path in world.hub.requests} == {"config.json"}


def test_check_against_a_transformers_backbone(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    transformers = pytest.importorskip("transformers")
    model = hf_vit()
    upload_backbone(model, HF_BASE, tmp_path / "tiny")
    path = save_task_adapter(prompted(model), tmp_path / "hf")
    assert call(capsys, "check", path, "--model", HF_BASE)[0] == f"fits  {HF_BASE}\n"
    # Of a class that no task of transformers would choose by itself.
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, mask_ratio=0.0,
    )  # fmt: skip
    tower = transformers.ViTMAEModel(config)
    upload_backbone(tower, "lab/tower", tmp_path / "tower")
    path = save_task_adapter(inject_prompts(tower, 2), tmp_path / "prompts")
    assert call(capsys, "check", path, "--model", "lab/tower")[0] == "fits  lab/tower\n"
    words = ("check", world.adapter, "--library", "transformers", "--model", HF_BASE)
    assert call(capsys, *words, code=1)[0].startswith("does not fit")


def test_check_of_a_model_that_cannot_be_had(world: World, capsys: Capture) -> None:
    for name in ("no_such_model", "user/nothing"):
        out, err = call(capsys, "check", world.adapter, "--model", name, code=1)
        assert out == ""
        assert name in err


def test_check_gives_the_backbone_the_pooling_of_the_adapter(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    path = save_task_adapter(inject_prompts(averaged(timm_vit()), 2), tmp_path / "mean")
    assert call(capsys, "check", path, "--model", TIMM_BASE)[0] == f"fits  {TIMM_BASE}\n"


def test_check_speaks_of_options(world: World, tmp_path: Path, capsys: Capture) -> None:
    upload_backbone(timm_vit(seed=1), OTHER_WEIGHTS, tmp_path / "other")
    out = call(capsys, "check", world.adapter, "--model", OTHER_WEIGHTS, code=1)[0]
    assert out.startswith(f"does not fit  {world.adapter}: it was made for")
    assert "strict" not in out
    upload_backbone(hf_vit(), HF_BASE, tmp_path / "tiny")
    err = call(capsys, "check", world.adapter, "--model", HF_BASE, code=1)[1]
    assert err.startswith(f"error: peft-vpt check: {HF_BASE}: ")
    assert "give --library transformers" in err
    path = save_task_adapter(prompted(hf_vit()), tmp_path / "hf")
    err = call(capsys, "check", path, "--model", OTHER_WEIGHTS, code=1)[1]
    assert "is a model of timm, not of transformers; give --library timm." in err
    err = call(capsys, "check", world.adapter, "--model", "test_vti", code=1)[1]
    assert "Did you mean test_vit" in err


def test_a_decoder_is_no_classifier(world: World, tmp_path: Path, capsys: Capture) -> None:
    from peft_vpt.segmentation import Segmenter, save_segmenter

    model = Segmenter(timm_vit(), 3, "vpt-deep", channels=8, length=2).eval()
    path = save_segmenter(model, tmp_path / "decoder")
    err = call(capsys, "check", path, "--model", TIMM_BASE, code=1)[1]
    assert err.startswith("error: peft-vpt check: ")
    assert "load_segmenter in peft_vpt.segmentation" in err
    err = call(capsys, "predict", "--adapter", path, png(tmp_path / "a.png"), code=1)[1]
    assert "labels pixels and not images" in err
    err = call(capsys, "eval", path, "--data", tmp_path, code=1)[1]
    assert err.startswith("error: peft-vpt eval: ")
    assert "labels pixels and not images" in err


# push and pull


def test_push_and_pull_are_bit_equal(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ("--license", "mit", "--dataset", "user/a", "--dataset", "user/b", "--message", "hello")
    out, _ = call(capsys, "push", world.adapter.parent, REPO, *words)
    commit = world.hub.commits(REPO)[-1]
    assert out == f"{world.hub.url}/{REPO}/commit/{commit.oid}\n"
    assert commit.title == "hello"
    card = world.hub.files(REPO)["README.md"].decode()
    for part in ("license: mit", "- user/a", "- user/b"):
        assert part in card
    monkeypatch.chdir(tmp_path / "base")
    assert call(capsys, "pull", REPO)[0] == "pets/adapter.safetensors\n"
    assert Path("pets/adapter.safetensors").read_bytes() == world.adapter.read_bytes()
    for to in (tmp_path / "here", tmp_path / "deep/er/file.safetensors"):
        out, _ = call(capsys, "pull", REPO, "--to", to)
        assert Path(out.strip()).read_bytes() == world.adapter.read_bytes()


def test_pull_replaces_nothing_unasked(world: World, tmp_path: Path, capsys: Capture) -> None:
    world.hub.create(REPO, {"adapter.safetensors": world.adapter.read_bytes()})
    target = tmp_path / "mine" / "adapter.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"precious")
    out, err = call(capsys, "pull", REPO, "--to", target.parent, code=1)
    assert out == ""
    assert "--force" in err
    assert target.read_bytes() == b"precious"
    call(capsys, "pull", REPO, "--to", target.parent, "--force")
    assert target.read_bytes() == world.adapter.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_pull_writes_sound_adapters_only(world: World, tmp_path: Path, capsys: Capture) -> None:
    world.hub.create(REPO, {"adapter.safetensors": world.adapter.read_bytes()[:-1] + b"\x00"})
    old = world.hub.commits(REPO)[-1].oid
    target = tmp_path / "mine"
    assert REPO.replace("/", "--") in call(capsys, "pull", REPO, "--to", target, code=1)[1]
    assert not target.exists()
    world.hub.swap(REPO, "adapter.safetensors", world.adapter.read_bytes())
    call(capsys, "pull", REPO, "--to", target, "--revision", old, code=1)
    call(capsys, "pull", REPO, "--to", target)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written" in call(capsys, "pull", REPO, "--to", blocked, code=1)[1]
    call(capsys, "pull", "user/nothing", "--to", tmp_path / "none", code=1)
    assert not (tmp_path / "none").exists()


def test_push_options(world: World, capsys: Capture) -> None:
    out, _ = call(capsys, "push", world.adapter, "user/secret", "--private")
    assert world.hub.repos["user/secret"].private
    call(capsys, "push", world.adapter, "user/secret", "--revision", "trial")
    assert "adapter.safetensors" in world.hub.files("user/secret", "trial")
    out, _ = call(capsys, "push", world.adapter, "user/secret", "--create-pr", "--license", "mit")
    assert "discussions" in out


@pytest.mark.filterwarnings("default::UserWarning")
def test_push_warnings_and_errors(world: World, tmp_path: Path, capsys: Capture) -> None:
    nameless = save_task_adapter(prompted(hf_vit()), tmp_path / "nameless")
    out, err = call(capsys, "push", nameless, "user/nameless")
    assert out.startswith(world.hub.url)
    assert err.startswith("warning: peft-vpt push: ")
    assert "give --base-model owner/name" in err
    out, err = call(capsys, "push", nameless, "user/nameless", "--base-model", HF_BASE)
    assert "warning" not in err
    assert f"base_model: {HF_BASE}" in world.hub.files("user/nameless")["README.md"].decode()
    for source, name in ((tmp_path / "nothing", REPO), (world.adapter, "user/a b")):
        out, err = call(capsys, "push", source, name, code=1)
        assert out == ""
        assert err.startswith("error: peft-vpt push: ")
        assert "repo_id=" not in err


# predict


def png(path: Path, seed: int = 0) -> Path:
    """Write an RGB image."""
    array(seed).save(path)
    return path


def array(seed: int, channels: int = 3) -> Any:
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(seed).integers(0, 256, (50, 70, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def image_files(folder: Path) -> dict[str, Any]:
    """Write images of many kinds; return the 8-bit RGB image that each should be seen as."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    grey = np.asarray(array(5, channels=1))
    kinds = {
        "1-rgb.png": array(1),
        "2-palette.png": array(2).quantize(16),
        "3-cmyk.tiff": array(3).convert("CMYK"),
        "4-alpha.png": array(4, channels=4),
        # 257 times a byte is that byte at 16 bits.
        "5-deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
    }
    for name, kind in kinds.items():
        kind.save(folder / name)
    seen = {name: kind.convert("RGB") for name, kind in kinds.items()}
    return seen | {"5-deep.png": Image.fromarray(grey).convert("RGB")}


def softmax_of(model: nn.Module, pictures: dict[str, Any]) -> torch.Tensor:
    """Return probabilities by timm's own transform and the model of this test."""
    import timm.data

    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad():
        return model(torch.stack([transform(image) for image in pictures.values()])).softmax(-1)


def test_predict_images_of_every_kind(world: World, tmp_path: Path, capsys: Capture) -> None:
    pictures = image_files(tmp_path / "images")
    expected = softmax_of(world.model, pictures)
    words = ("predict", "--adapter", world.adapter, "--json", "--top-k", "9")
    for size in ("1", "2", "16"):
        out, _ = call(capsys, *words, "--batch-size", size, tmp_path / "images")
        rows = [json.loads(line) for line in out.splitlines()]
        assert [row["file"] for row in rows] == [str(tmp_path / "images" / n) for n in pictures]
        for row, wanted in zip(rows, expected, strict=True):
            best = row["predictions"]
            assert [p["index"] for p in best] == wanted.argsort(descending=True).tolist()
            assert [p["label"] for p in best] == [LABELS[p["index"]] for p in best]
            found = torch.tensor([p["probability"] for p in best])
            # Float32 sums in another order in another batch; measured 1e-7.
            assert torch.allclose(found, wanted.sort(descending=True).values, rtol=0, atol=1e-5)
    assert len({tuple(row.tolist()) for row in expected}) == len(pictures)


def test_predict_a_table(world: World, tmp_path: Path, capsys: Capture) -> None:
    image = png(tmp_path / "a.png")
    wanted = softmax_of(world.model, {"a": array(0)})[0].sort(descending=True)
    out, err = call(capsys, "predict", "--adapter", world.adapter, image)
    best = f"{image}\t{LABELS[wanted.indices[0]]}\t{wanted.values[0]:.4f}"
    assert out == f"file\tlabel\tprobability\n{best}\n"
    assert err == ""
    out, _ = call(capsys, "predict", "--adapter", world.adapter, image, "--top-k", 2)
    assert [line.split("\t")[1] for line in out.splitlines()[1:]] == [
        LABELS[index] for index in wanted.indices[:2]
    ]


def test_predict_on_a_terminal(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    paths = [png(tmp_path / f"{seed}.png", seed) for seed in range(3)]
    out, err = call(capsys, "predict", "--adapter", world.adapter, *paths)
    assert all(str(path) in out for path in paths)
    assert "│" in out
    assert "images" in err
    assert "100%" in err
    out, err = call(capsys, "predict", "--adapter", world.adapter, "--json", *paths)
    assert len([json.loads(line) for line in out.splitlines()]) == 3
    assert "100%" not in err


def test_what_cannot_be_read_stops_no_other(world: World, tmp_path: Path, capsys: Capture) -> None:
    good = [png(tmp_path / f"good{seed}.png", seed) for seed in range(2)]
    broken, text = tmp_path / "broken.png", tmp_path / "text\x1b.png"
    broken.write_bytes(good[0].read_bytes()[:200])
    text.write_text("no image")
    empty = tmp_path / "empty"
    empty.mkdir()
    files = (good[0], broken, tmp_path / "missing.png", text, empty, good[1])
    out, err = call(capsys, "predict", "--adapter", world.adapter, "--json", *files, code=1)
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(path) for path in good]
    for name in ("broken.png", r"text\x1b.png", "missing.png", "empty"):
        assert any(line.split(": ")[0].endswith(name) for line in err.splitlines()), name
    assert "\x1b" not in err
    assert err.splitlines()[-1] == "4 of 6 could not be predicted"
    out, err = call(capsys, "predict", "--adapter", world.adapter, empty, code=1)
    assert out == ""


def test_folders_are_walked_and_files_taken_once(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    paths = [png(folder / "more" / "b.PNG"), png(folder / "z.png")]
    (folder / "notes.txt").write_text("no image")
    png(folder / ".hidden.png")
    out, _ = call(capsys, "predict", "--adapter", world.adapter, "--json", folder, paths[1])
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(path) for path in paths]


def test_predict_by_hub_id_with_another_backbone_or_none(
    world: World, tmp_path: Path, capsys: Capture
) -> None:
    image = png(tmp_path / "a.png")
    world.hub.create(REPO, {"adapter.safetensors": world.adapter.read_bytes()})
    by_file = call(capsys, "predict", "--adapter", world.adapter, image)
    assert call(capsys, "predict", "--adapter", REPO, image) == by_file
    world.hub.requests.clear()
    assert call(capsys, "predict", "--adapter", REPO, "--offline", image) == by_file
    assert not world.hub.requests
    upload_backbone(timm_vit(seed=1), OTHER_WEIGHTS, tmp_path / "other")
    words = ("predict", "--adapter", REPO, image, "--model")
    assert call(capsys, *words, TIMM_BASE) == by_file
    assert "weights" in call(capsys, *words, OTHER_WEIGHTS, code=1)[1]
    nameless = save_task_adapter(prompted(hf_vit()), tmp_path / "nameless")
    assert "--model" in call(capsys, "predict", "--adapter", nameless, image, code=1)[1]


def test_predict_with_a_transformers_backbone_without_labels(
    hub: Hub, tmp_path: Path, capsys: Capture
) -> None:
    from PIL import Image

    model = hf_vit()
    upload_backbone(model, HF_BASE, tmp_path / "tiny")
    path = save_task_adapter(prompted(model), tmp_path / "hf")
    image = tmp_path / "grey.png"
    Image.new("RGB", (32, 32), (51, 51, 51)).save(image)
    out, _ = call(capsys, "predict", "--adapter", path, "--json", image)
    best = json.loads(out)["predictions"][0]
    # ViT's processor: a byte / 255, less 0.5, by 0.5.
    with torch.no_grad():
        wanted = model(torch.full((1, 3, 32, 32), 51 / 255 * 2 - 1)).logits.softmax(-1)[0]
    assert best["label"] is None
    assert best["index"] == int(wanted.argmax())
    assert best["probability"] == pytest.approx(float(wanted.max()), abs=1e-5)
    out, _ = call(capsys, "predict", "--adapter", path, image)
    assert out.splitlines()[1].split("\t")[1] == str(best["index"])


# supported


def facts(out: str) -> dict[str, str]:
    """Return what stands in two columns."""
    return {line[:15].strip(): line[15:] for line in out.splitlines()}


def test_a_vit_is_supported(capsys: Capture) -> None:
    out, err = call(capsys, "supported", "timm/vit_tiny_patch16_224.augreg_in21k")
    assert err == ""
    found = facts(out)
    assert found["architecture"] == "timm vit_tiny_patch16_224"
    assert found["takes prompts"] == "yes"
    assert found["form"] == "kv in all blocks"
    assert found["shallow"] == "yes"
    assert found["locations"] == "prepend, add, prepend-pixel, concat-channel, pad"


def test_what_supported_says_holds(capsys: Capture) -> None:
    import timm

    from peft_vpt.errors import VPTError

    found = json.loads(call(capsys, "supported", "swin_tiny_patch4_window7_224", "--json")[0])
    model = inject_prompts(timm.create_model(found["name"]), 2)
    assert found["forms"] == {"kv": list(range(model.prompts.encoder.depth))}
    refused = [name for name, reason in found["locations"].items() if reason]
    assert refused == ["prepend-pixel"]
    with pytest.raises(VPTError, match="prepend-pixel"):
        inject_prompts(timm.create_model(found["name"]), 2, location="prepend-pixel")


def test_a_convolutional_net_is_not_supported(capsys: Capture) -> None:
    out, err = call(capsys, "supported", "resnet18", code=1)
    assert err == ""
    found = facts(out)
    assert found["takes prompts"] == "no"
    assert "no attention" in found["reason"]
    assert found["locations"] == "pad"
    assert found["not at"] == "prepend, add, prepend-pixel, concat-channel"
    assert json.loads(call(capsys, "supported", "resnet18", "--json", code=1)[0])["forms"] == {}


@pytest.mark.parametrize(
    ("name", "takes"), [("ViTModel", "yes"), ("CLIPModel", "yes, each of its encoders")]
)
def test_transformers_classes(name: str, takes: str, capsys: Capture) -> None:
    found = facts(call(capsys, "supported", name)[0])
    assert found["architecture"] == f"transformers {name}"
    assert found["takes prompts"] == takes


@pytest.mark.parametrize(
    ("name", "close"),
    [("vit_tniy_patch16_224", "vit_tiny_patch16_224"), ("ViTModle", "ViTM"), ("BertConfig", "")],
)
def test_a_name_that_nobody_knows(name: str, close: str, capsys: Capture) -> None:
    out, err = call(capsys, "supported", name, code=1)
    assert out == ""
    assert err.startswith(f"error: peft-vpt supported: '{name}' is no architecture")
    assert close in err.partition("Did you mean")[2]


def test_the_page_names_every_command_and_option() -> None:
    from typer.main import get_command

    from peft_vpt.cli import app

    page = (ROOT / "docs" / "cli.md").read_text()
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    assert len(commands) == 11
    for name, command in commands.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                if option.startswith("--"):
                    assert f"`{option}" in section or f" {option}" in section, f"{name} {option}"
