"""Real weights and real images: a pretrained ViT-Ti/16 on an aerial task, in both libraries.

Needs the folder of measurements, named by the environment variable ``PEFT_VPT_DATA`` or found as
``../shared/data`` beside the repository; every test is skipped where it is absent. About eight
minutes of one core.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from peft_vpt import is_prompted, load_task_adapter, save_task_adapter
from peft_vpt.errors import AdapterMismatchError

pytest.importorskip("PIL")
pytest.importorskip("timm")
pytest.importorskip("transformers")
example = importlib.import_module("examples.finetune_folder")

pytestmark = pytest.mark.slow
NAME, SIZE, LENGTH, EPOCHS = "vit_tiny_patch16_224", 112, 20, 6
LIBRARIES = ["timm", "transformers"]
METHODS = ("linear", "shallow", "deep")


class Trained(NamedTuple):
    model: nn.Module
    logits: torch.Tensor  # of the test images
    accuracy: float


Train = Callable[[str, str], Trained]


@pytest.fixture(scope="module")
def folder() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("PEFT_VPT_DATA") or beside)
    if not (path / "backbones").exists() or not (path / "vtab-mini" / "ucmerced").exists():
        pytest.skip("the folder of real weights and images is not here (PEFT_VPT_DATA)")
    return path


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    return folder / "backbones" / f"{NAME}.augreg_in21k_ft_in1k.safetensors"


@pytest.fixture(scope="module")
def splits(folder: Path) -> tuple[Any, Any]:
    task = folder / "vtab-mini" / "ucmerced"
    return tuple(example.read_split(task, f"{s}.txt", SIZE) for s in ("train800val200", "test"))


@pytest.fixture(scope="module")
def names(folder: Path, splits: tuple[Any, Any]) -> list[str]:
    return example.class_names(folder / "vtab-mini" / "ucmerced", splits[0].labels)


@pytest.fixture(scope="module")
def train(weights: Path, splits: tuple[Any, Any], names: list[str]) -> Train:
    """Return what trains a model by library and method, once each."""
    done: dict[tuple[str, str], Trained] = {}

    def run(library: str, method: str) -> Trained:
        if (library, method) not in done:
            model = example.build_backbone(weights, NAME, SIZE, library)
            example.adapt(model, method, len(names), LENGTH, seed=0)
            seconds = example.train(model, splits[0], rate=example.RATES[method], epochs=EPOCHS)
            logits = example.all_logits(model, splits[1].images)
            score = example.accuracy(logits, splits[1].labels)
            print(f"\n{library} {method}: accuracy {score:.3f}, {seconds:.1f} s per epoch")
            done[library, method] = Trained(model, logits, score)
        return done[library, method]

    return run


@pytest.mark.parametrize("library", LIBRARIES)
def test_pretrained_outputs_are_the_published_ones(
    folder: Path, weights: Path, library: str
) -> None:
    expected = json.loads((folder / "backbones" / "vit_tiny_fixture.json").read_text())
    pixels = torch.arange(3 * 224 * 224, dtype=torch.float32) * 0.618034 % 1
    pixels = pixels.reshape(1, 3, 224, 224) * 2 - 1
    model = example.build_backbone(weights, NAME, 224, library).eval()
    with torch.no_grad():
        if library == "timm":
            logits, tokens = model(pixels)[0], model.forward_features(pixels)[0]
        else:
            logits, tokens = model(pixels).logits[0], model.vit(pixels).last_hidden_state[0]
    top = logits.topk(5)
    assert top.indices.tolist() == expected["top5_index"]
    assert top.values.tolist() == pytest.approx(expected["top5_logit"], abs=1e-4)
    assert logits.mean().item() == pytest.approx(expected["logits_mean"], abs=1e-5)
    assert logits.std().item() == pytest.approx(expected["logits_std"], abs=1e-5)
    assert tokens[0, :8].tolist() == pytest.approx(expected["cls_feature_first8"], abs=3e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_prompts_beat_linear_probing(
    train: Train, library: str, record_property: Callable[[str, object], None]
) -> None:
    scores = {method: train(library, method).accuracy for method in METHODS}
    for method, score in scores.items():
        record_property(f"accuracy/{library}/{method}", round(score, 4))
    assert scores["linear"] > 0.7
    assert scores["shallow"] > scores["linear"]
    assert scores["deep"] > scores["linear"] + 0.04


@pytest.mark.parametrize("method", ["shallow", "deep"])
@pytest.mark.parametrize(("source", "target"), [LIBRARIES, LIBRARIES[::-1]])
def test_adapter_moves_between_libraries(
    tmp_path: Path,
    train: Train,
    weights: Path,
    splits: tuple[Any, Any],
    names: list[str],
    method: str,
    source: str,
    target: str,
) -> None:
    trained = train(source, method)
    file = save_task_adapter(trained.model, tmp_path, task="ucmerced", labels=names)
    assert file.stat().st_size < 1_000_000
    twin = load_task_adapter(example.build_backbone(weights, NAME, SIZE, target), file)
    logits = example.all_logits(twin, splits[1].images)
    torch.testing.assert_close(logits, trained.logits, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(1), trained.logits.argmax(1))
    assert (twin.prompts.info["task"], twin.prompts.info["labels"]) == ("ucmerced", names)


@pytest.mark.parametrize("library", LIBRARIES)
def test_other_weights_are_refused(tmp_path: Path, train: Train, library: str) -> None:
    import timm

    file = save_task_adapter(train("timm", "deep").model, tmp_path)
    torch.manual_seed(0)
    stranger = timm.create_model(NAME, img_size=SIZE)
    if library == "transformers":
        stranger = example.port_to_transformers(stranger)
    with pytest.raises(AdapterMismatchError, match="fingerprints differ"):
        load_task_adapter(stranger, file)
    assert not is_prompted(stranger)
