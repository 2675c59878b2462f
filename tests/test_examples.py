"""The quickstart and the backbone that it ships with, on very little data and offline."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import sklearn.datasets
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from support.images import draw_task

pytest.importorskip("timm")

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.py"
ASSET = ROOT / "examples" / "assets" / "vit_tiny_glyphs.safetensors"
ROWS = ("linear probing", "VPT-shallow", "VPT-deep", "full fine-tuning")


def check_output(text: str) -> None:
    """All methods have a row, and each loaded adapter predicts what was saved."""
    for method in ROWS:
        assert re.search(rf"^{method} +class +[\d.]+% +[\d,]+ +[\d.]+ kB +[\d.]+ ms$", text, re.M)
    verdicts = re.findall(r"equal to the bit: (\w+)", text)
    assert len(verdicts) >= 2
    assert set(verdicts) == {"True"}


def run_script(folder: Path, *arguments: str) -> str:
    """Run the quickstart as a user would, in a folder of its own, and return what it prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(QUICKSTART), *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_on_few_digits(tmp_path, monkeypatch, capsys):
    digits = sklearn.datasets.load_digits()
    digits.images, digits.target = digits.images[:60], digits.target[:60]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: digits)
    monkeypatch.setattr(sys, "argv", [str(QUICKSTART), "--epochs", "1"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(QUICKSTART), run_name="__main__")
    check_output(capsys.readouterr().out)
    assert len(list(tmp_path.glob("runs/quickstart/*/adapter.safetensors"))) >= 2


def test_quickstart_on_an_image_folder(tmp_path):
    draw_task(tmp_path / "pets", (3, 0, 3), dict.fromkeys(("bird", "cat", "dog"), 0), noise=256)
    for file in tmp_path.glob("pets/*/cat/*.png"):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    output = run_script(tmp_path, "--data", "pets", "--epochs", "1", "--seed", "1")
    check_output(output)
    assert re.search(r"^linear probing +class +[\d.]+% +291 ", output, re.M)


@pytest.mark.slow
def test_quickstart_as_it_is(tmp_path):
    output = run_script(tmp_path)
    check_output(output)
    scores = re.findall(r"class +([\d.]+)%", output)
    assert min(map(float, scores)) > 90


def test_push_and_load_offline_prints_the_card(monkeypatch, capsys):
    script = ROOT / "examples" / "push_and_load.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    card = capsys.readouterr().out
    assert "base_model: timm/test_vit.r160_in1k" in card
    assert "library_name: peft-vpt" in card


def test_push_and_load_through_a_hub(monkeypatch, tmp_path, capsys):
    from support.hub_server import Hub, client
    from test_hub import TIMM_BASE, TOKEN, timm_vit, upload_backbone

    script = ROOT / "examples" / "push_and_load.py"
    with Hub(tokens={TOKEN}) as hub:
        client(hub, monkeypatch, tmp_path / "cache", token=TOKEN)
        upload_backbone(timm_vit(), TIMM_BASE, tmp_path / "base")
        monkeypatch.setattr(sys, "argv", [str(script), "--repo", "user/pets"])
        runpy.run_path(str(script), run_name="__main__")
        assert set(hub.files("user/pets")) >= {"adapter.safetensors", "config.json", "README.md"}
    scores = re.findall(r"^(?:cat|dog): ([\d.]+)$", capsys.readouterr().out, re.M)
    # Two probabilities, each rounded to three digits.
    assert abs(sum(map(float, scores)) - 1) <= 1e-3


def test_quickstart_is_short():
    lines = QUICKSTART.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 100


def test_asset_is_small_and_loads_strictly():
    assert ASSET.stat().st_size <= 2_000_000
    # Read, not imported: the script needs matplotlib.
    source = (ROOT / "examples" / "pretrain_tiny_backbone.py").read_text(encoding="utf-8")
    with safe_open(ASSET, "pt") as file:
        arguments = json.loads(file.metadata()["model_args"])
    for name, value in arguments.items():
        assert f'"{name}": {value},' in source
    from timm.models.vision_transformer import VisionTransformer

    VisionTransformer(**arguments).load_state_dict(load_file(ASSET), strict=True)
