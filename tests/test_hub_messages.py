"""What is said where an argument, an answer of the Hub, or a folder is not what it should be."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hub_server import Hub
from test_hub import HF_BASE, REPO, hf_vit, prompted, timm_vit, upload_backbone
from torch import nn

from peft_vpt import inject_prompts, load_task_adapter, push_task_adapter, save_task_adapter
from peft_vpt.adapter.file import read_adapter
from peft_vpt.adapter.source import hub_errors
from peft_vpt.errors import AdapterError
from peft_vpt.hub import load_backbone_with_adapter

SECRET = "hf_very-secret"
# More than a name, a reason and an advice ever take.
LONGEST = 900


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved adapter of a tiny timm ViT."""
    return save_task_adapter(prompted(timm_vit()), tmp_path_factory.mktemp("saved"))


def said(call: Any, *arguments: Any, **options: Any) -> str:
    """Return the message of the `AdapterError` that a call raises."""
    with pytest.raises(AdapterError) as caught:
        call(*arguments, **options)
    assert len(str(caught.value)) < LONGEST
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((999, 999)), "of type ndarray"),
        (torch.zeros(99, 99), "of type Tensor"),
        ({"prompts.0": torch.zeros(4, 64)}, "of type dict; a plain state dict does not say how"),
        (None, "must be a path or a Hub id 'owner/name', not of type NoneType"),
        ("x" * 5000, "no such adapter|cannot be looked up"),
        ("a\0b", "no such adapter|cannot be looked up"),
    ],
)
@pytest.mark.parametrize("call", [load_task_adapter, load_backbone_with_adapter])
def test_a_source_that_is_none(call: Any, source: Any, words: str) -> None:
    first = () if call is load_backbone_with_adapter else (nn.Linear(1, 1),)
    text = said(call, *first, source)
    assert text.startswith(f"{call.__name__}: ")
    assert re.search(words, text)


def test_swapped_arguments(saved: Path) -> None:
    model = timm_vit()
    assert "swapped? The model comes first" in said(load_task_adapter, saved, model)
    text = said(push_task_adapter, REPO, model)
    assert "swapped? The model comes first: push_task_adapter(model, 'owner/name')" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": None}, "model must be a prompted model, or the path of a saved adapter"),
        ({"repo_id": 5}, "(repo_id=5): must be the name of a repository"),
        ({"repo_id": {"a": torch.zeros(99)}}, "(repo_id={'a': tensor("),
        ({"base_model": "vit"}, "(base_model='vit'): must be the name of a repository"),
        (
            {"base_model": "a/b", "base_revision": "../x"},
            "(base_revision='../x'): must be a branch, tag or commit",
        ),
        ({"revision": 5}, "(revision=5): give the name of a branch or tag, or a commit"),
        ({"revision": ""}, "(revision=''): "),
        ({"token": 5}, "(token=...): got a int; give the token as text"),
        ({"task": 5}, "(task=5): must be the name of the task as text"),
        ({"labels": torch.zeros(3)}, "(labels=<Tensor>): give a list of names"),
        ({"labels": ["a"]}, "(labels=...): 1 names, and the adapter has 3 classes"),
        ({"datasets": 5}, "(datasets=5): must be a Hub id"),
        ({"datasets": ["a/b", 5]}, "(datasets=['a/b', 5]): must be a Hub id"),
        ({"metrics": {"x": object()}}, "(metrics=...): must be a dict of plain, finite JSON"),
        ({"metrics": {"x": float("nan")}}, "(metrics=...): must be a dict of plain, finite JSON"),
        ({"preprocessing": {"sise": 3}}, "the file has no field for sise"),
        ({"preprocessing": {"mean": [0.5], "std": [0.5, 0.5]}}, "unlike numbers of means"),
    ],
)
def test_a_push_names_its_argument_and_reaches_no_hub(
    options: dict[str, Any], words: str, saved: Path, hub: Hub
) -> None:
    given = {"model": saved, "repo_id": REPO} | options
    text = said(push_task_adapter, **given)
    assert text.startswith("push_task_adapter")
    assert words in text
    assert "/tmp" not in text.replace(str(saved), "")
    assert not hub.requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": 5}, "(backbone=5): give the Hub id of the backbone"),
        ({"backbone": ""}, "(backbone=''): "),
        ({"backbone": np.zeros(3)}, "(backbone=<ndarray>): "),
        ({"revision": 5}, "(revision=5): give the name of a branch"),
        ({"strict": "prompt"}, "(strict='prompt'): must be True, False or 'prompts'"),
        ({"strict": np.zeros(3)}, "(strict=<ndarray>): "),
        ({"backbone": "vit_tniy_patch16_224"}, "Did you mean vit_tiny_patch16_224"),
        ({"backbone": "vit_tiny_patch16_224.augrge_in21k"}, "vit_tiny_patch16_224.augreg_in21k"),
    ],
)
def test_options_of_a_load_by_name(options: dict[str, Any], words: str, saved: Path) -> None:
    text = said(load_backbone_with_adapter, saved, **options)
    assert text.startswith("load_backbone_with_adapter")
    assert words in text


def test_a_revision_is_of_no_use_for_a_file(saved: Path) -> None:
    with pytest.warns(UserWarning, match="revision='main' is of no use: .* is a local file"):
        load_task_adapter(timm_vit(), saved, revision="main")


@pytest.mark.parametrize("token", ["", f"{SECRET}\n", f" {SECRET}", "hf_\u00e9", "hf a"])
def test_a_token_with_white_space_is_told_and_not_shown(token: str, saved: Path) -> None:
    for call, first in (
        (load_task_adapter, (nn.Linear(1, 1), REPO)),
        (push_task_adapter, (saved, REPO)),
    ):
        text = said(call, *first, token=token)
        assert "pass token.strip()" in text
        assert not token.strip() or token.strip() not in text


@pytest.mark.parametrize("token", [SECRET, None])
@pytest.mark.parametrize("deep", [False, True])
def test_no_traceback_shows_a_token(token: str | None, deep: bool) -> None:
    def fail() -> None:
        try:
            raise ValueError(f"Illegal header value b'Bearer {SECRET}'")
        except ValueError as error:
            if not deep:
                raise
            raise OSError("it cannot be had") from error

    with pytest.raises(AdapterError) as caught, hub_errors("call", "a/b", token):
        fail()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


class Answer(Exception):
    """An exception of the client, with the status of an answer."""

    def __init__(self, status: int, text: str = "no") -> None:
        super().__init__(text)
        self.response = type("Response", (), {"status_code": status})()


class ConnectError(ConnectionError):
    """What the client raises where nobody answers."""


@pytest.mark.parametrize(
    ("error", "pushing", "advice"),
    [
        (Answer(401), False, "the token is not valid, or not any more: log in with"),
        (Answer(401), True, "nobody is logged in, or the token is not valid: log in with"),
        (Answer(403), False, "the token does not allow it"),
        (Answer(403), True, "the token may not write there"),
        (Answer(412), True, "somebody committed in between: push again"),
        (Answer(429), True, "too many requests"),
        (Answer(503), True, "a problem of its own: try again later"),
        (ConnectError("refused"), True, "the Hub was not reached: check the network"),
        (ValueError("Invalid metadata in README.md.\nlicense"), True, "mend what it names"),
    ],
)
def test_advice(error: Exception, pushing: bool, advice: str) -> None:
    with (
        pytest.raises(AdapterError, match=advice) as caught,
        hub_errors("call", "a/b", pushing=pushing),
    ):
        raise error
    assert caught.value.__cause__ is error


def test_the_loopback_hub_answers_a_stranger(saved: Path, hub: Hub) -> None:
    push_task_adapter(saved, REPO)
    text = said(push_task_adapter, saved, REPO, token="hf_wrong")
    assert "the token may not write there: use one with write access" in text
    text = said(push_task_adapter, saved, REPO, license="No Licence")
    assert "mend what it names: license=" in text


def test_somebody_committed_in_between(
    saved: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft_vpt.hub.verbs as module

    push_task_adapter(saved, REPO)
    original = module._former_card

    def slow(*args: Any) -> Any:
        found = original(*args)
        hub.swap(REPO, "notes.txt", b"hello")
        return found

    monkeypatch.setattr(module, "_former_card", slow)
    assert "push again" in said(push_task_adapter, saved, REPO, task="other")


def test_a_backbone_of_the_other_library(saved: Path, hub: Hub, tmp_path: Path) -> None:
    upload_backbone(hf_vit(), HF_BASE, tmp_path / "hf")
    text = said(load_backbone_with_adapter, saved, backbone=HF_BASE)
    assert "it is one of transformers; build the model yourself and call load_task_adapter" in text
    upload_backbone(timm_vit(), "lab/timm", tmp_path / "timm")
    path = save_task_adapter(prompted(hf_vit()), tmp_path / "a")
    text = said(load_backbone_with_adapter, path, backbone="lab/timm")
    assert "is a model of timm, not of transformers; build the model yourself" in text


def test_a_folder_of_a_whole_model_is_told(tmp_path: Path) -> None:
    model = hf_vit()
    model.save_pretrained(tmp_path / "whole")
    text = said(load_task_adapter, model, tmp_path / "whole")
    assert "This folder holds model.safetensors, config.json" in text
    assert "strict=False if it holds only what trains" in text
    (tmp_path / "empty").mkdir()
    assert "This folder holds nothing." in said(load_task_adapter, model, tmp_path / "empty")


def test_a_hand_saved_state_dict_is_told_how_to_be_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = prompted(timm_vit())
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, tmp_path / "mine.safetensors")
    torch.save(trained, tmp_path / "mine.pt")
    for name in ("mine.safetensors", "mine.pt"):
        text = said(load_task_adapter, timm_vit(), tmp_path / name)
        assert "model.load_state_dict(...), with strict=False if it holds only what trains" in text
    # The advice works.
    again = inject_prompts(timm_vit(), 4, num_classes=3)
    assert not again.load_state_dict(trained, strict=False).unexpected_keys


def test_other_weights_and_why_that_may_be(saved: Path) -> None:
    text = said(load_task_adapter, timm_vit(seed=1), saved)
    for cause in ("pretrained=True was left out", "was fine-tuned", "another revision"):
        assert cause in text


def test_metrics_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    metrics = {
        "a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": np.float64(1.0),
        "e": [np.array(2.0)],
    }  # fmt: skip
    path = save_task_adapter(prompted(timm_vit()), tmp_path, metrics=metrics)
    found = read_adapter(path).metadata["metrics"]
    assert found == {"a": 0.5, "b": 3, "c": 0.25, "d": 1.0, "e": [2.0]}
    for bad in (5, {"a": np.zeros(3)}, {"a": np.float32("nan")}):
        text = said(save_task_adapter, prompted(timm_vit()), tmp_path / "b", metrics=bad)
        assert text.startswith("save_task_adapter(metrics=...)")
    assert not (tmp_path / "b").exists()
