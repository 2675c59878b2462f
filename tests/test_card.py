"""The model card: its metadata, its merge with an edited one, its code block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub_server import Hub
from test_hub import HF_BASE, LABELS, REPO, TIMM_BASE, hf_vit, prompted, timm_vit
from test_hub import upload_backbone as upload
from zoo import image, logits

from peft_vpt import inject_prompts, push_task_adapter, save_task_adapter
from peft_vpt.adapter.file import read_adapter
from peft_vpt.errors import AdapterError, AdapterMismatchError
from peft_vpt.hub import load_backbone_with_adapter
from peft_vpt.hub.card import write_card
from peft_vpt.segmentation import Segmenter, apply_to_encoder, save_segmenter

ROOT = Path(__file__).parent.parent


def card_of(hub: Hub) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard(hub.files(REPO)["README.md"].decode())


def push(model: Any, **options: Any) -> None:
    options = {"task": "pets", "labels": LABELS, "metrics": {"accuracy": 0.5}} | options
    push_task_adapter(model, REPO, **options)


def test_metadata_in_the_words_of_the_hub(hub: Hub) -> None:
    push(prompted(timm_vit()), license="apache-2.0", datasets="lab/pets")
    card = card_of(hub)
    card.validate()
    data = card.data
    assert data.library_name == "peft-vpt"
    assert (data.base_model, data.base_model_relation) == (TIMM_BASE, "adapter")
    assert data.pipeline_tag == "image-classification"
    assert (data.license, data.datasets, data.metrics) == ("apache-2.0", ["lab/pets"], ["accuracy"])
    assert data.model_name == "pets"
    result = data.eval_results[0]
    assert (result.dataset_type, result.metric_type, result.metric_value) == (
        "lab/pets", "accuracy", 0.5,
    )  # fmt: skip
    total = sum(p.numel() for p in prompted(timm_vit()).parameters())
    assert f"{total:,}" in card.text
    for label in LABELS:
        assert label in card.text


def test_an_edited_card_is_kept_and_its_metadata_merged(hub: Hub) -> None:
    model = prompted(timm_vit())
    push(model)
    text = hub.files(REPO)["README.md"].decode()
    edited = text.replace("library_name", "language: nl\nlicense: mit\nlibrary_name", 1)
    edited = edited.replace("tags:", "tags:\n- mine", 1).replace(
        "## Use", "My own words.\n\n## Use"
    )
    hub.swap(REPO, "README.md", edited.encode())
    push(model, metrics={"accuracy": 0.75}, datasets=["lab/pets"])
    card = card_of(hub)
    assert "My own words." in card.text
    assert (card.data.language, card.data.license) == ("nl", "mit")
    assert {"mine", "peft-vpt"} <= set(card.data.tags)
    assert [r.metric_value for r in card.data.eval_results] == [0.75]
    assert card.data.datasets == ["lab/pets"]


def test_a_card_of_ours_is_written_anew(hub: Hub) -> None:
    model = prompted(timm_vit())
    push(model)
    push(model, labels=["one", "two", "three"], metrics={"accuracy": 0.9})
    card = card_of(hub)
    assert "three" in card.text
    assert "owl" not in card.text
    assert "0.9" in card.text


def test_a_card_with_metadata_alone_gets_its_text(hub: Hub) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(REPO)
    hub.swap(REPO, "README.md", b"---\nlicense: mit\n---\n")
    push(prompted(timm_vit()))
    card = card_of(hub)
    assert card.data.license == "mit"
    assert "## Use" in card.text


def test_a_broken_card_stops_the_push(hub: Hub) -> None:
    model = prompted(timm_vit())
    push(model)
    hub.swap(REPO, "README.md", b"---\ntags: [unclosed\n---\nwords\n")
    count = len(hub.commits(REPO))
    with pytest.raises(AdapterError, match=r"README\.md"):
        push(model)
    assert len(hub.commits(REPO)) == count


def test_names_cannot_break_out_of_the_card(hub: Hub, tmp_path: Path) -> None:
    task = "pets\n---\n<script>|x|</script>"
    path = save_task_adapter(
        prompted(timm_vit()), tmp_path, task=task, labels=["a|b", "`c`", "# d\n\n```"],
        metrics={"accuracy": 0.5},
    )  # fmt: skip
    from huggingface_hub import ModelCard

    text = write_card(read_adapter(path), REPO)
    card = ModelCard(text)
    assert card.data.eval_results[0].dataset_name == task
    assert "<script>" not in card.text.replace("\\<script", "")
    assert card.text.count("```") == 2


def test_an_unknown_backbone_is_said(hub: Hub) -> None:
    with pytest.warns(UserWarning, match="base_model"):
        push(prompted(hf_vit()))
    card = card_of(hub)
    assert card.data.base_model is None
    assert "load_task_adapter(model" in card.text


@pytest.mark.parametrize(("make", "base"), [(timm_vit, TIMM_BASE), (hf_vit, HF_BASE)])
def test_the_code_block_runs_as_it_stands(make: Any, base: str, hub: Hub, tmp_path: Path) -> None:
    model = make()
    upload(model, base, tmp_path / "base")
    push(prompted(model))
    block = re.search(r"```python\n(.*?)```", card_of(hub).text, re.DOTALL)
    assert block is not None
    done = subprocess.run(
        [sys.executable, "-c", block.group(1)],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "fresh"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    label, score = done.stdout.split()[-2:]
    assert label in LABELS
    assert 1 / 3 <= float(score) <= 1


def test_a_number_measured_anew_takes_the_place_of_the_old_one(hub: Hub) -> None:
    model = prompted(timm_vit())
    push(model, metrics={"accuracy": 0.5, "f1": 0.25})
    push(model, metrics={"accuracy": 0.75})
    results = [(r.metric_type, r.metric_value) for r in card_of(hub).data.eval_results]
    assert sorted(results) == [("accuracy", 0.75), ("f1", 0.25)]


def test_a_push_from_a_folder_keeps_the_number_of_all_parameters(hub: Hub, tmp_path: Path) -> None:
    model = prompted(timm_vit())
    total = f" of {sum(p.numel() for p in model.parameters()):,} ("
    push(model)
    save_task_adapter(model, tmp_path / "same")
    push(tmp_path / "same", metrics={"accuracy": 0.75})
    assert total in card_of(hub).text
    assert "0.75" in card_of(hub).text
    # As many are not known of another backbone, or with other prompts.
    other = save_task_adapter(inject_prompts(timm_vit(), 2, num_classes=3), tmp_path / "other")
    push(other)
    assert " of " not in re.findall(r"\| trained parameters \|.*", card_of(hub).text)[0]


def block_of(hub: Hub) -> str:
    found = re.search(r"```python\n(.*?)```", card_of(hub).text, re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize("make", [timm_vit, hf_vit])
def test_code_for_a_backbone_without_a_name(make: Any, hub: Hub, tmp_path: Path) -> None:
    model = make()
    if make is timm_vit:
        model.pretrained_cfg = {**model.pretrained_cfg, "hf_hub_id": None}
        weights = tmp_path / "weights.pt"
        torch.save(model.state_dict(), weights)
    else:
        weights = tmp_path / "weights"
        model.save_pretrained(weights)
    with pytest.warns(UserWarning, match="base_model"):
        push(prompted(model))
    names: dict[str, Any] = {}
    exec(block_of(hub).replace('"..."', repr(str(weights)), 1), names)
    pixels = image(1, torch.float32, 160 if make is timm_vit else 32)
    assert torch.equal(logits(names["model"].eval()(pixels)), logits(model(pixels)))


def segmenter(tmp_path: Path) -> Path:
    """Save a decoder around a timm ViT that is on the Hub."""
    model = Segmenter(timm_vit(), 3, "vpt-deep", channels=8, length=2).eval()
    return save_segmenter(model, tmp_path / "a", labels=LABELS)


def segformer(tmp_path: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        id2label=dict(enumerate(LABELS)), hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, image_size=32,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config).eval()


@pytest.mark.parametrize("kind", ["segmenter", "segformer"])
def test_a_decoders_card_labels_pixels(
    kind: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "segmenter":
        upload(timm_vit(), TIMM_BASE, tmp_path / "base")
        push(segmenter(tmp_path))
    else:
        model = segformer(tmp_path)
        upload(model, HF_BASE, tmp_path / "base")
        push(apply_to_encoder(model, "vpt-deep", length=2))
    card = card_of(hub)
    assert card.data.pipeline_tag == "image-segmentation"
    assert (
        card.data.to_dict()["model-index"][0]["results"][0]["task"]["type"] == "image-segmentation"
    )
    assert "and a decoder for" in card.text
    capsys.readouterr()
    exec(block_of(hub), {})
    shares = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {label for label, _ in shares} <= set(LABELS)
    # Shares of the pixels of one image, each a float32 mean.
    assert sum(float(share) for _, share in shares) == pytest.approx(1, abs=1e-5)


def test_a_decoder_that_a_backbone_has_no_place_for(hub: Hub, tmp_path: Path) -> None:
    upload(timm_vit(), TIMM_BASE, tmp_path / "base")
    path = segmenter(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"segmentation\.load_segmenter"):
        load_backbone_with_adapter(path)
    # Its prompts alone are another matter.
    load_backbone_with_adapter(path, strict="prompts")
