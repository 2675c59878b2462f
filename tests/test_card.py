"""The model card: its metadata, its merge with an edited one, its code block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, client
from test_hub import HF_BASE, LABELS, REPO, TIMM_BASE, TOKEN, hf_vit, prompted, timm_vit
from test_hub import upload_backbone as upload

from peft_vpt import push_task_adapter, save_task_adapter
from peft_vpt.adapter_file import read_adapter
from peft_vpt.card import write_card
from peft_vpt.errors import AdapterError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub(tokens={TOKEN}) as server:
        client(server, monkeypatch, tmp_path / "cache", token=TOKEN)
        yield server


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
