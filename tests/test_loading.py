"""An adapter meets the models that people really have: wrapped, inside others, saved by hand."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support import damage
from test_adapters import out, trained
from torch import nn
from zoo import build, image, logits

from peft_vpt import (
    PromptSpec,
    VPTError,
    apply_protocol,
    inject_prompts,
    is_prompted,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt import spec as spec_module
from peft_vpt.adapter import install as adapter_install
from peft_vpt.adapter import schema as adapter_schema
from peft_vpt.adapter.file import read_adapter
from peft_vpt.adapter.head import LINEAR
from peft_vpt.errors import AdapterError, AdapterMismatchError

NAMES = ("timm/cls", "transformers/vit", "transformers/dinov2")


class Detector(nn.Module):
    """A larger model with a head of its own over a backbone."""

    def __init__(self, backbone: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.backbone = backbone
        self.boxes = nn.Linear(width, 4, dtype=torch.float64)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.boxes(logits(self.backbone(pixels)))


@pytest.mark.parametrize("name", NAMES)
def test_a_submodule_of_a_larger_model(name: str, tmp_path: Path) -> None:
    save_task_adapter(trained(name, classes=None), tmp_path)
    model = Detector(build(name))
    before = model(image())
    load_task_adapter(model.backbone, tmp_path)
    alone = load_task_adapter(build(name), tmp_path)
    assert torch.equal(model(image()), model.boxes(out(alone)))
    remove_prompts(model.backbone)
    assert torch.equal(model(image()), before)
    assert set(dict(model.named_parameters())) == set(
        dict(Detector(build(name)).named_parameters())
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [1, 9])
def test_another_class_count_gives_way(name: str, classes: int, tmp_path: Path) -> None:
    source = trained(name)
    save_task_adapter(source, tmp_path, labels=["a", "b", "c", "d"])
    changes = {"num_classes" if name.startswith("timm") else "num_labels": classes}
    model = build(name, **changes)
    body = build(name).state_dict().items()
    model.load_state_dict(
        {n: t for n, t in body if not n.startswith(("head", "classifier"))}, strict=False
    )
    load_task_adapter(model, tmp_path)
    assert torch.equal(out(model), out(source))
    if name.startswith("transformers"):
        assert model.config.num_labels == 4
        assert model.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}
    remove_prompts(model)
    assert out(model).shape[-1] == classes


@pytest.mark.parametrize("name", NAMES)
def test_over_another_task_with_other_options(name: str, tmp_path: Path) -> None:
    source = trained(name, classes=3, deep=False)
    save_task_adapter(source, tmp_path)
    model = trained(name, classes=6, layers=(1, 2), sharing="inter")
    load_task_adapter(model, tmp_path)
    assert torch.equal(out(model), out(source))
    assert set(trainable_parameters(model)) == set(trainable_parameters(source))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_saved_by_hand(name: str, tmp_path: Path) -> None:
    source = trained(name)
    torch.save(source.state_dict(), tmp_path / "whole.pt")
    torch.save(trainable_parameters(source), tmp_path / "task.pt")
    for file, strict in (("whole.pt", True), ("task.pt", False)):
        model = inject_prompts(build(name), 3, num_classes=4)
        state = torch.load(tmp_path / file, weights_only=True)
        assert not model.load_state_dict(state, strict=strict).unexpected_keys
        assert torch.equal(out(model.eval()), out(source))
    # From there it becomes an adapter as any other.
    save_task_adapter(model, tmp_path)
    assert torch.equal(out(load_task_adapter(build(name), tmp_path)), out(source))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_of_a_prompted_model_does_not_fit_a_bare_one(name: str) -> None:
    model = build(name)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*prompts\."):
        model.load_state_dict(trained(name, classes=None).state_dict())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_save_what_the_bare_one_saves(wrap: Any, tmp_path: Path) -> None:
    model = trained("timm/cls")
    bare = save_task_adapter(model, tmp_path / "bare").read_bytes()
    assert save_task_adapter(wrap(model), tmp_path / "wrapped").read_bytes() == bare


def test_a_user_who_moved_one_block_to_meta_is_told(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls"), tmp_path)
    model = build("timm/cls")
    model.blocks[2].to("meta")
    with pytest.raises(AdapterMismatchError, match="meta device"):
        load_task_adapter(model, tmp_path)
    assert not is_prompted(model)


def test_label_names_and_preprocessing_come_back_for_a_pipeline(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    from peft_vpt.preprocessing import image_processor

    labels = ["ant", "bee", "cat", "dog"]
    size = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
            "crop": None}  # fmt: skip
    source = trained("transformers/vit").float()
    save_task_adapter(source, tmp_path, labels=labels, preprocessing=size)
    model = load_task_adapter(build("transformers/vit", torch.float32), tmp_path)
    info = model.prompts.info
    assert info["labels"] == labels
    assert info["preprocessing"] == size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = transformers.pipeline(
            "image-classification", model=model, image_processor=image_processor(size), top_k=4
        )
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    found = {row["label"]: row["score"] for row in task(picture)}
    pixels = image_processor(size)(picture, return_tensors="pt")["pixel_values"]
    wanted = logits(source(pixels)).softmax(-1)[0]
    assert found == pytest.approx(dict(zip(labels, wanted.tolist(), strict=True)), rel=1e-5)


# A load that fails leaves everything as it was, and one that succeeds leaves nothing of before


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed call could leave changed, by identity where there is one."""
    found: dict[str, Any] = {"modules": [(n, id(m)) for n, m in model.named_modules()]}
    for name, module in model.named_modules():
        own = vars(module)
        hooks = {k: list(v) for k, v in own.items() if k.endswith("_hooks")}
        rest = {k: id(v) for k, v in own.items() if not k.startswith("_") and k != "training"}
        found[name] = (hooks, rest, module.training)
    config = getattr(model, "config", None)
    found["config"] = (id(config), dict(vars(config)) if config is not None else None)
    return found


def values_of(model: nn.Module) -> dict[str, Any]:
    return {n: (id(p), p.requires_grad, id(p.grad)) for n, p in model.named_parameters()}


def gap(**options: Any) -> nn.Module:
    return inject_prompts(build("timm/gap"), 2, num_classes=3, **options)


def refused(case: str, tmp_path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a prompted model and the arguments of a load that it cannot take."""
    if case == "no classifier of its own":
        save_task_adapter(trained("timm/cls"), tmp_path)
        inner = build("timm/cls")
        inner.reset_classifier(0)
        return inject_prompts(Detector(inner, 32), 2), {}
    if case == "no CLS token":
        save_task_adapter(trained("timm/cls", pooling="cls"), tmp_path)
        return gap(), {"strict": False}
    raise AssertionError(case)


@pytest.mark.parametrize("case", ["no classifier of its own", "no CLS token"])
def test_a_refused_load_leaves_a_trained_model_to_the_last_object(
    case: str, tmp_path: Path
) -> None:
    model, options = refused(case, tmp_path)
    model(image()).sum().backward()
    model.train()
    before, kept, own = state_of(model), values_of(model), copy.deepcopy(model.state_dict())
    drawn = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterMismatchError, match=re.escape(str(tmp_path))):
            load_task_adapter(model, tmp_path, **options)
    assert is_prompted(model)
    assert state_of(model) == before
    assert values_of(model) == kept
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.mark.parametrize("protocol", ["vpt-deep", "bias", "adapter", "mlp-2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_load_that_breaks_half_way_is_undone(
    name: str, protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_task_adapter(trained(name, 6), tmp_path / "other")
    model = apply_protocol(build(name), protocol, num_classes=4)
    out(model).sum().backward()
    before, kept, own = state_of(model), values_of(model), copy.deepcopy(model.state_dict())
    expected = out(model)
    copied = adapter_install._copy

    def breaks(*args: Any) -> None:
        copied(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_install, "_copy", breaks)
    with pytest.raises(KeyboardInterrupt):
        load_task_adapter(model, tmp_path / "other")
    assert state_of(model) == before
    assert values_of(model) == kept
    assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())
    assert torch.equal(out(model), expected)
    monkeypatch.undo()
    bare, fresh = build(name).state_dict(), load_task_adapter(build(name), tmp_path / "other")
    assert torch.equal(out(load_task_adapter(model, tmp_path / "other")), out(fresh))
    remove_prompts(model)
    assert all(torch.equal(t, bare[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
def test_an_adapter_without_a_head_takes_the_models_head_out(name: str, tmp_path: Path) -> None:
    source = trained(name, classes=0)
    save_task_adapter(source, tmp_path / "headless", task="features")
    save_task_adapter(trained(name, classes=7), tmp_path / "seven", labels=list("abcdefg"))
    bare = build(name)
    classes = out(bare).shape[-1]
    for model in (bare, load_task_adapter(build(name), tmp_path / "seven")):
        load_task_adapter(model, tmp_path / "headless")
        assert torch.equal(out(model), out(source))
        assert model.prompts.info["labels"] is None
        remove_prompts(model)
        assert out(model).shape[-1] == classes
    # The prompts alone leave a head where it is.
    kept = load_task_adapter(build(name), tmp_path / "headless", strict="prompts")
    assert out(kept).shape[-1] == classes


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
def test_prompts_alone_leave_head_and_label_names(name: str, tmp_path: Path) -> None:
    labels = ["a", "b", "c", "d"]
    save_task_adapter(trained(name), tmp_path / "first", labels=labels)
    save_task_adapter(trained(name, classes=6, deep=False), tmp_path / "second")
    model = load_task_adapter(build(name), tmp_path / "first")
    head = LINEAR.tensors(model, model.prompts.encoder)["head.weight"].clone()
    load_task_adapter(model, tmp_path / "second", strict="prompts")
    assert torch.equal(LINEAR.tensors(model, model.prompts.encoder)["head.weight"], head)
    saved = read_adapter(save_task_adapter(model, tmp_path / "both"))
    assert saved.metadata["head"]["labels"] == labels


def test_prompts_alone_do_not_replace_a_head_that_goes_with_its_protocol(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls"), tmp_path)
    model = apply_protocol(build("timm/cls"), "mlp-3", num_classes=7)
    before = state_of(model)
    with pytest.raises(AdapterMismatchError, match="mlp-3"):
        load_task_adapter(model, tmp_path, strict="prompts")
    assert state_of(model) == before


def test_gradients_of_the_task_before_are_gone(tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls"), tmp_path)
    model = trained("timm/cls")
    out(model).sum().backward()
    load_task_adapter(model, tmp_path)
    assert all(p.grad is None for p in model.parameters())


def test_label_names_that_a_user_edits_are_saved(tmp_path: Path) -> None:
    model = trained("transformers/vit")
    save_task_adapter(model, tmp_path, labels=["a", "b", "c", "d"])
    load_task_adapter(model, tmp_path)
    model.config.id2label = dict(enumerate("wxyz"))
    saved = read_adapter(save_task_adapter(model, tmp_path))
    assert saved.metadata["head"]["labels"] == list("wxyz")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    file = tmp_path / "group"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_parameters_that_a_wrapper_has_counted_are_not_replaced(tmp_path: Path) -> None:
    wrap = nn.parallel.DistributedDataParallel
    save_task_adapter(trained("timm/cls"), tmp_path / "task")
    same, other = trained("timm/cls"), trained("timm/cls", dropout=0.5)
    for model in (build("timm/cls"), other, trained("timm/cls", 6)):
        before = state_of(model)
        with pytest.raises(AdapterMismatchError, match="DistributedDataParallel"):
            load_task_adapter(wrap(model), tmp_path / "task")
        assert state_of(model) == before
    assert torch.equal(out(load_task_adapter(wrap(same), tmp_path / "task")), out(same))


@pytest.mark.parametrize("thing", ["text", 3, nn.Linear(2, 2), None])
def test_messages_name_this_call(thing: Any, tmp_path: Path) -> None:
    save_task_adapter(trained("timm/cls"), tmp_path)
    with pytest.raises(VPTError, match="load_task_adapter: ") as caught:
        load_task_adapter(thing, tmp_path)
    assert "inject_prompts" not in str(caught.value)


def test_what_a_file_asks_for_is_not_built_before_it_is_compared(tmp_path: Path) -> None:
    head = save_task_adapter(apply_protocol(build("timm/cls"), "mlp-2"), tmp_path / "head")
    one, path = read_adapter(head), tmp_path / "a.safetensors"
    many = {"protocol": one.metadata["protocol"] | {"name": "mlp-9999"}}
    wide = {"head": one.metadata["head"] | {"classes": 2**31, "labels": None}}
    for change in (many, wide):
        path.write_bytes(damage.signed(one.tensors, one.metadata | change))
        with pytest.raises(AdapterError, match=re.escape(str(path))):
            load_task_adapter(build("timm/cls"), path)
    border = inject_prompts(build("timm/cls-dynamic"), 2, location="pad", num_classes=3)
    one = read_adapter(save_task_adapter(border, tmp_path / "border"))
    long = {"spec": one.metadata["spec"] | {"length": 500}}
    path.write_bytes(damage.signed(one.tensors, one.metadata | long))
    with pytest.raises(AdapterError, match="is not of 500 prompts"):
        load_task_adapter(build("timm/cls-dynamic"), path)


def stays(call: Callable[[], object]) -> list[str]:
    """Return the modules of `adapter` that a file passes in a call: its path, metadata, tensors."""
    found: list[str] = []
    handed = {"adapter", "path", "source", "values", "metadata", "tensors", "about"}

    def watch(frame: Any, event: str, _: object) -> None:
        code, file = frame.f_code, Path(frame.f_code.co_filename)
        if event != "call" or file.parent.name != "adapter" or code.co_name.startswith("<"):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if handed & set(names) and found[-1:] != [file.stem]:
            found.append(file.stem)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_a_file_goes_the_way_that_the_page_shows(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "how-it-works.md").read_text()
    way = re.findall(r"^\| \d+ \| `(\w+)` \|", page, re.MULTILINE)
    saving = re.findall(r"`(\w+)`", page.partition("Saving goes ")[2].partition(":")[0])
    model, bare = trained("timm/cls"), build("timm/cls")
    assert stays(lambda: save_task_adapter(model, tmp_path)) == saving
    assert stays(lambda: load_task_adapter(bare, tmp_path)) == way
    # From the bottom up, in the order of imports.
    order = ["schema", "file", "source", "layout", "head", "match", "install", "verbs"]
    heights = [order.index(module) for module in way]
    assert sum(a < b for a, b in pairwise(heights)) <= 4
    assert all(way.count(module) <= 2 for module in order)


def test_an_option_to_come_loads_old_files_and_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new field of `PromptSpec` with a default is all that the format needs of an option."""
    model = trained("timm/cls")
    old = save_task_adapter(model, tmp_path / "old")

    @dataclasses.dataclass(frozen=True)
    class Later(PromptSpec):
        temperature: float = 1.0

    with monkeypatch.context() as release:
        for module in (adapter_schema, spec_module):
            release.setattr(module, "PromptSpec", Later)
        read = read_adapter(old)
        assert read.spec.temperature == 1.0
        assert read.metadata["spec"]["temperature"] == 1.0
        assert torch.equal(out(load_task_adapter(build("timm/cls"), old)), out(model))
        one = read_adapter(old)
        values = one.metadata | {"spec": one.metadata["spec"] | {"temperature": 2.0}}
        new = tmp_path / "new.safetensors"
        new.write_bytes(damage.signed(one.tensors, values))
        assert read_adapter(new).spec.temperature == 2.0
    with pytest.raises(AdapterError, match="temperature"):
        load_task_adapter(build("timm/cls"), new)
