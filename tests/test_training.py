"""Recipes, groups, schedule, the loop, resume, metrics: against closed forms and other code."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from zoo import SIZE, build

from peft_vpt import VPTError, apply_protocol, inject_prompts, remove_prompts, trainable_parameters
from peft_vpt.errors import SpecError

pytest.importorskip("accelerate")
pytest.importorskip("timm")

from peft_vpt.training import (
    DivergedError,
    Recipe,
    class_weights,
    classification_metrics,
    evaluate,
    fit,
    loader_batch_size,
    lr_factor,
    make_optimizer,
    paper_grid,
    parameter_groups,
    preset,
)
from peft_vpt.training.health import LossWatch
from peft_vpt.training.sweeps import finite, grid_points

ROOT = Path(__file__).parent.parent
CLASSES = 3
RECIPE = Recipe(
    base_lr=0.64, epochs=3, warmup_epochs=1, batch_size=4, prompt_lr_scale=2.0, weight_decay=0.01
)


class Colours(Dataset[Any]):
    """Noisy images whose mean tells the class; each one is shifted at random when it is read."""

    def __init__(self, images: int = 24, jitter: float = 0.1, bad: int | None = None) -> None:
        source = torch.Generator().manual_seed(5)
        self.labels = [index % CLASSES for index in range(images)]
        shift = torch.tensor(self.labels)[:, None, None, None] - 1.0
        self.pixels = torch.randn(images, 3, SIZE, SIZE, generator=source) + shift
        self.jitter = jitter
        if bad is not None:
            self.pixels[bad] = math.nan

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = torch.rand(()) + random.random()
        return self.pixels[index] + self.jitter * drawn, self.labels[index]


def loader(batch: int = 4, *, shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    workers = options.pop("num_workers", 0)
    return DataLoader(Colours(**options), batch_size=batch, shuffle=shuffle, num_workers=workers)


def prompted(name: str = "timm/cls", **options: Any) -> nn.Module:
    model = build(name, torch.float32)
    source = torch.Generator().manual_seed(0)
    return inject_prompts(model, 4, num_classes=CLASSES, generator=source, **options)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def stop_after(model: nn.Module, forwards: int) -> Any:
    """Let the model raise at a later forward in train mode."""
    seen = [0]

    def count(module: nn.Module, args: Any) -> None:
        seen[0] += module.training
        if seen[0] > forwards:
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(count)


# Recipes and presets


def test_recipe_round_trip() -> None:
    recipe = Recipe(optimizer="sgd", betas=(0.8, 0.95), clip_norm=1.0, class_weights="inv")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_dict({}) == Recipe()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adam"),
        ("class_weights", "inverse"),
        ("base_lr", 0.0),
        ("base_lr", math.inf),
        ("base_lr", "0.1"),
        ("prompt_lr_scale", -1.0),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("warmup_epochs", 100),
        ("warmup_epochs", -1),
        ("batch_size", 0),
        ("seed", -1),
        ("momentum", 1.0),
        ("betas", [0.9, 0.999]),
        ("betas", (0.9, 1.0)),
        ("clip_norm", 0.0),
        ("label_smoothing", 1.0),
    ],
)
def test_recipe_refuses(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=field):
        replace(Recipe(), **{field: value})


def test_unknown_fields_are_named() -> None:
    with pytest.raises(SpecError, match="learning_rate"):
        Recipe.from_dict({"learning_rate": 0.1})
    with pytest.raises(SpecError, match="lr"):
        preset("linear", lr=0.1)


# protocol, backbone, length: optimizer, base_lr, batch, epochs; from Tables 6 and 8 of the paper.
PAPER = [
    ("linear", None, None, "sgd", 1.0, 2048, 100),
    ("full", "vit_base_patch16_224", None, "adamw", 0.0005, 128, 100),
    ("partial-1", "google/vit-large-patch16-224", None, "adamw", 0.0005, 640, 50),
    ("mlp-3", None, None, "sgd", 1.0, 2048, 100),
    ("sidetune", None, None, "sgd", 1.0, 128, 100),
    ("bias", "vit_huge_patch14_224", None, "adamw", 0.0005, 28, 50),
    ("adapter", "convnext_base", None, "adamw", 0.0005, 128, 100),
    ("vpt-shallow", None, 50, "sgd", 1.0, 128, 100),
    ("vpt-deep", None, 100, "sgd", 1.0, 64, 100),
    ("vpt-deep", "swin_base_patch4_window7_224", 50, "sgd", 1.0, 80, 100),
    ("vpt-deep", "vit_large_patch16_224", 200, "sgd", 1.0, 32, 50),
    ("vpt-deep", "resnet50", None, "sgd", 1.0, 256, 100),
    ("vpt+bias", None, 10, "adamw", 0.0005, 128, 100),
    ("prompt-fixed", None, 10, "sgd", 1.0, 128, 100),
    ("cls", None, None, "sgd", 1.0, 128, 100),
]


@pytest.mark.parametrize("row", PAPER, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_paper_presets(row: tuple[Any, ...]) -> None:
    protocol, backbone, length, optimizer, rate, batch, epochs = row
    recipe = preset(protocol, backbone=backbone, kind="paper", length=length)
    assert (recipe.optimizer, recipe.base_lr) == (optimizer, rate)
    assert (recipe.batch_size, recipe.epochs) == (batch, epochs)
    assert (recipe.warmup_epochs, recipe.momentum, recipe.weight_decay) == (10, 0.9, 0.0001)
    assert recipe.prompt_lr_scale == 1.0


def test_paper_grids() -> None:
    sgd = [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
    decays = [0.01, 0.001, 0.0001, 0.0]
    assert paper_grid("vpt-deep") == {"base_lr": sgd, "weight_decay": decays}
    wide = paper_grid("vpt-shallow", wide=True)["base_lr"]
    assert wide == [1000, 500, 250, 100, *sgd]
    assert sorted(paper_grid("bias")["base_lr"]) == [0.0001, 0.0005, 0.001, 0.005]
    with pytest.raises(SpecError, match="wide"):
        paper_grid("vpt-deep", wide=True)
    for call in (preset, paper_grid):
        with pytest.raises(SpecError, match=f"{call.__name__}.*vpt-deep"):
            call("vpt")


def test_default_presets_and_changes() -> None:
    for protocol in ("linear", "full", "partial-2", "mlp-3", "bias", "adapter", "vpt-deep"):
        assert preset(protocol).optimizer == "adamw"
    assert preset("vpt-deep").prompt_lr_scale > 1.0
    assert preset("vpt-deep").clip_norm == 1.0
    assert preset("linear").clip_norm is None
    assert preset("vpt-deep", epochs=20).warmup_epochs == pytest.approx(4.0)
    assert preset("linear", epochs=20).warmup_epochs == pytest.approx(2.0)
    assert preset("vpt-deep", epochs=20, warmup_epochs=1).warmup_epochs == 1
    with pytest.raises(SpecError, match="epochs"):
        preset("vpt-deep", epochs="many")
    with pytest.raises(SpecError, match="kind"):
        preset("vpt-deep", kind="papr")


# Schedule and groups


def test_schedule_by_hand() -> None:
    recipe = Recipe(epochs=3, warmup_epochs=1)
    root = math.sqrt(0.5)
    # Four steps of warm-up, then the cosine at eighths of pi.
    eighths = [1, math.cos(math.pi / 8), root, math.cos(3 * math.pi / 8), 0]
    eighths += [-math.cos(3 * math.pi / 8), -root, -math.cos(math.pi / 8)]
    expected = [0.25, 0.5, 0.75, 1.0, *((1 + c) / 2 for c in eighths)]
    found = [lr_factor(step, 4, recipe) for step in range(12)]
    assert found == pytest.approx(expected, abs=1e-15)
    assert lr_factor(12, 4, recipe) == pytest.approx(0, abs=1e-15)
    assert lr_factor(0, 4, replace(recipe, warmup_epochs=0)) == 1.0
    half = [lr_factor(step, 4, replace(recipe, warmup_epochs=0.5)) for step in range(3)]
    assert half == [0.5, 1.0, 1.0]


def test_schedule_agrees_with_timm_behind_the_warm_up() -> None:
    from timm.scheduler import CosineLRScheduler

    recipe, steps = Recipe(epochs=7, warmup_epochs=2), 5
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = CosineLRScheduler(
        optimizer, t_initial=25, warmup_t=10, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(10, 35):
        theirs.step_update(step)
        ours = lr_factor(step, steps, recipe)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


# optimizer: group -> (x peak rate, weight decay); peak = 0.64 * 4 / 256 = 0.01, prompts x 2.
GROUPS = {
    "adamw": {
        "prompts": (0.02, 0.01),
        "prompts-bias": (0.02, 0.0),
        "head": (0.01, 0.01),
        "head-bias": (0.01, 0.0),
        "backbone": (0.01, 0.01),
        "backbone-bias": (0.01, 0.0),
    },
    "sgd": {
        "prompts": (0.02, 0.01),
        "prompts-bias": (0.02, 0.01),
        "head": (0.01, 0.01),
        "head-bias": (0.01, 0.0),
        "backbone": (0.01, 0.01),
        "backbone-bias": (0.01, 0.01),
    },
}
MEMBERS = {
    "prompts": ["prompts.0", "prompts.1", "prompts.2", "prompts.project.32.weight"],
    "prompts-bias": ["prompts.project.32.bias"],
    "head": ["head.weight"],
    "head-bias": ["head.bias"],
    "backbone": ["blocks.2.mlp.fc2.weight"],
    "backbone-bias": ["blocks.2.mlp.fc2.bias", "norm.weight"],
}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_groups_by_hand(optimizer: str) -> None:
    model = prompted(project=8)
    names = dict(model.named_parameters())
    for name in (*MEMBERS["backbone"], *MEMBERS["backbone-bias"]):
        names[name].requires_grad_(True)
    recipe = replace(RECIPE, optimizer=optimizer)
    ids = {id(p): n for n, p in names.items()}
    found = parameter_groups(model, recipe)
    members = {g["name"]: sorted(ids[id(p)] for p in g["params"]) for g in found}
    assert members == MEMBERS
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in found}
    assert rates == {n: pytest.approx(v) for n, v in GROUPS[optimizer].items()}
    built = make_optimizer(model, recipe)
    assert type(built).__name__.lower() == optimizer
    assert [g["weight_decay"] for g in built.param_groups] == [g["weight_decay"] for g in found]


def test_groups_of_other_models() -> None:
    model = prompted("transformers/vit")
    found = {g["name"]: len(g["params"]) for g in parameter_groups(model, RECIPE)}
    assert found == {"prompts": 3, "head": 1, "head-bias": 1}
    bare = build("timm/cls", torch.float32)
    names = [g["name"] for g in parameter_groups(bare, RECIPE)]
    assert names == ["head", "head-bias", "backbone", "backbone-bias"]
    with pytest.raises(SpecError, match="requires gradients"):
        parameter_groups(bare.requires_grad_(False), RECIPE)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_first_step_in_closed_form(optimizer: str) -> None:
    """One step over all images, warm-up factor 1: the update follows from the gradient."""
    recipe = replace(RECIPE, optimizer=optimizer, epochs=1, warmup_epochs=0, batch_size=24)
    data = DataLoader(TensorDataset(Colours().pixels, torch.arange(24) % 3), batch_size=24)
    model, same = prompted(dropout=0.0), prompted(dropout=0.0)
    nn.functional.cross_entropy(same.train()(Colours().pixels), torch.arange(24) % 3).backward()
    fit(model, data, recipe=recipe, progress=False)
    table = GROUPS[optimizer]
    # 24 images in a batch, not 4.
    for name, before in trainable_parameters(same).items():
        group = "prompts" if name.startswith("prompts") else name.replace(".", "-")
        rate, decay = table["head" if group == "head-weight" else group]
        rate, grad = rate * 6, before.grad
        assert grad is not None
        if optimizer == "sgd":
            expected = before - rate * (grad + decay * before)
        else:
            expected = before * (1 - rate * decay) - rate * grad / (grad.abs() + recipe.eps)
        found = dict(model.named_parameters())[name]
        # float32 rounding of gradients near 0 changes AdamW's first step, a sign, the most.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


# Of a warm-up of three steps, then of a cosine at thirds of pi.
FACTORS = [1 / 3, 2 / 3, 1.0, 1.0, 0.75, 0.25]
STEPS: dict[str, Recipe] = {
    "sgd": replace(RECIPE, optimizer="sgd", momentum=0.6),
    "adamw": replace(RECIPE, betas=(0.7, 0.95), eps=1e-3),
}


@pytest.mark.parametrize("optimizer", STEPS)
def test_steps_in_closed_form(optimizer: str) -> None:
    """Momentum, betas, eps and the rate of every step, against formulas written out in float64."""
    recipe = replace(STEPS[optimizer], epochs=2, warmup_epochs=1, batch_size=8)
    data, model = Colours(jitter=0.0), prompted(dropout=0.0)
    same = trainable_parameters(copy := prompted(dropout=0.0).train())
    fit(model, DataLoader(data, batch_size=8), recipe=recipe, progress=False)
    first, second = ({name: 0.0 for name in same} for _ in range(2))
    beta1, beta2 = recipe.betas
    for step, factor in enumerate(FACTORS):
        images = slice(step % 3 * 8, step % 3 * 8 + 8)
        copy.zero_grad()
        nn.functional.cross_entropy(
            copy(data.pixels[images]), torch.tensor(data.labels[images])
        ).backward()
        for name, p in same.items():
            rate = factor * 0.02 * (2 if name.startswith("prompts") else 1)
            decay, grad = 0.0 if name == "head.bias" else 0.01, p.grad.double()
            now = p.detach().double()
            if optimizer == "sgd":
                first[name] = 0.6 * first[name] + grad + decay * now
                after = now - rate * first[name]
            else:
                first[name] = beta1 * first[name] + (1 - beta1) * grad
                second[name] = beta2 * second[name] + (1 - beta2) * grad**2
                mean, square = (
                    held[name] / (1 - beta ** (step + 1))
                    for held, beta in ((first, beta1), (second, beta2))
                )
                after = now * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-3)
            p.data.copy_(after)
    for name, p in same.items():
        found = model.get_parameter(name)
        # float32, over six steps.
        torch.testing.assert_close(found, p, rtol=1e-4, atol=1e-5, msg=name)


# The loop


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
def test_fit_learns_and_writes(name: str, tmp_path: Path) -> None:
    model = prompted(name)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    result = fit(
        model,
        loader(),
        loader(5, shuffle=False),
        recipe=RECIPE,
        folder=tmp_path,
        data={"task": "colours"},
        progress=False,
    )
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert [row["step"] for row in result.history] == [6, 12, 18]
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert result.best is not None
    assert result.best["val"]["top1"] == 1.0
    for n, p in model.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n])
    assert not model.training
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == result.config
    assert Recipe.from_dict(config["recipe"]) == RECIPE
    assert config["model"]["spec"]["length"] == 4
    assert config["data"] == {"task": "colours"}
    assert {"torch", "peft_vpt", "accelerate"} <= set(config["versions"])
    assert config["machine"]["device"] == "cpu"
    remove_prompts(model)


def test_evaluate_every() -> None:
    result = fit(
        prompted(),
        loader(),
        loader(shuffle=False),
        recipe=replace(RECIPE, epochs=5),
        evaluate_every=2,
        progress=False,
    )
    assert [row["val"] is not None for row in result.history] == [False, True, False, True, True]


def test_accumulation_is_one_large_batch() -> None:
    """Also where the last step of an epoch has fewer batches, and the last batch fewer images."""
    recipe = replace(RECIPE, batch_size=8, optimizer="sgd")
    one, two = prompted(dropout=0.0), prompted(dropout=0.0)
    first = fit(one, loader(8, images=21), recipe=recipe, progress=False)
    second = fit(two, loader(2, images=21), recipe=recipe, accumulation=4, progress=False)
    assert [row["step"] for row in second.history] == [row["step"] for row in first.history]
    for name, tensor in values(one).items():
        # float32 sums in another order, over nine steps.
        torch.testing.assert_close(values(two)[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_workers_change_nothing() -> None:
    """Order, augmentation and dropout follow from the seed alone."""
    one, two, three = prompted(), prompted(), prompted()
    fit(one, loader(), recipe=RECIPE, progress=False)
    random.seed(123)
    torch.manual_seed(123)
    fit(two, loader(num_workers=2), recipe=RECIPE, progress=False)
    assert_equal(values(one), values(two))
    fit(three, loader(), recipe=replace(RECIPE, seed=1), progress=False)
    assert not torch.equal(one.state_dict()["prompts.0"], three.state_dict()["prompts.0"])


def test_the_order_of_images_is_new_in_every_epoch() -> None:
    from peft_vpt.training.batches import training_loader

    given = DataLoader(Colours(), batch_size=4, shuffle=True, generator=torch.Generator())
    order: Any = training_loader(given, seed=3).sampler
    epochs = []
    for epoch in (0, 1, 1):
        torch.rand(5)
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert sorted(index for index, _ in epochs[0]) == list(range(24))
    assert not set(epochs[0]) & set(epochs[1])
    assert [index for index, _ in epochs[0]] != [index for index, _ in epochs[1]]
    assert epochs[1] == epochs[2]
    assert list(training_loader(given, seed=4).sampler) != epochs[0]


def test_images_are_drawn_by_one_seed_whatever_the_loader() -> None:
    """The recipe's, also where the loader has an order of its own."""
    from peft_vpt.data import Split
    from peft_vpt.data import loader as own_loader
    from peft_vpt.training.batches import training_loader

    held = Split((), (0, 1, 2), torch.zeros(3, 3, 4, 4))
    own = own_loader(held, None, batch_size=3, shuffle=True, seed=9)
    mine = training_loader(own, seed=3)
    assert mine.dataset is own.dataset
    foreign = DataLoader(own.dataset, batch_size=3, shuffle=True, generator=torch.Generator())
    assert list(mine.sampler) == list(training_loader(foreign, seed=3).sampler)
    assert list(mine.sampler) != list(own.sampler)


def test_mixed_precision() -> None:
    model = prompted()
    result = fit(model, loader(), recipe=RECIPE, mixed_precision="bf16", progress=False)
    assert result.config["mixed_precision"] == "bf16"
    assert model.get_parameter("prompts.0").dtype == torch.float32
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    again = fit(prompted(), loader(), recipe=RECIPE, progress=False)
    assert again.config["mixed_precision"] == "no"
    assert again.history[0]["train_loss"] != result.history[0]["train_loss"]


def test_clipping_and_smoothing_reach_the_loop() -> None:
    plain = fit(prompted(), loader(), recipe=RECIPE, progress=False)
    smooth = fit(prompted(), loader(), recipe=replace(RECIPE, label_smoothing=0.5), progress=False)
    assert smooth.history[-1]["train_loss"] > plain.history[-1]["train_loss"]
    before, model = prompted().state_dict(), prompted()
    # SGD without decay: the first step moves by at most rate x norm.
    recipe = Recipe(
        optimizer="sgd", base_lr=1.0, weight_decay=0, epochs=1, warmup_epochs=0, batch_size=24
    )
    fit(model, loader(24), recipe=replace(recipe, clip_norm=0.01), progress=False)
    moved = [(model.state_dict()[n] - t).norm() for n, t in before.items()]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01 * 24 / 256, rel=1e-3)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": ({"recipe": {"epochs": 1}}, "Recipe"),
    "evaluate_every": ({"evaluate_every": 0}, "evaluate_every"),
    "checkpoint_every": ({"checkpoint_every": -1}, "checkpoint_every"),
    "accumulation": ({"accumulation": 0}, "accumulation"),
    "precision": ({"mixed_precision": "fp8"}, "mixed_precision"),
    "fp16 on a CPU": ({"mixed_precision": "fp16"}, "mixed_precision"),
    "batch": ({"train": loader(2)}, "make a batch of 2"),
    "not a loader": ({"train": [1, 2]}, "DataLoader"),
    "no images": ({"train": DataLoader(Colours(2), 4, drop_last=True)}, "more images"),
    "weights without labels": ({"recipe": replace(RECIPE, class_weights="inv")}, "labels"),
    "data": ({"data": {"x": math.nan}}, "JSON"),
    "used up": ({"val": iter(loader())}, "is used up by one evaluation"),
}


@pytest.mark.parametrize("case", BAD)
def test_fit_refuses(case: str, tmp_path: Path) -> None:
    changes, match = BAD[case]
    model = prompted()
    before = values(model)
    with pytest.raises(SpecError, match=match):
        fit(
            model,
            changes.get("train", loader()),
            folder=tmp_path / "run",
            progress=False,
            **({"recipe": RECIPE} | {k: v for k, v in changes.items() if k != "train"}),
        )
    assert_equal(values(model), before)
    assert not (tmp_path / "run").exists()


def test_loader_batch_size() -> None:
    assert loader_batch_size(Recipe(batch_size=64)) == 64
    assert loader_batch_size(Recipe(batch_size=64), accumulation=4) == 16
    with pytest.raises(SpecError, match="multiple of 3"):
        loader_batch_size(Recipe(batch_size=64), accumulation=3)


# Resume


def head_with_statistics(model: nn.Module) -> nn.Module:
    """Give the model a head with a batch norm, whose statistics move too."""
    model.head = nn.Sequential(nn.BatchNorm1d(32), model.head)
    return model


@pytest.mark.parametrize(("optimizer", "parts"), [("adamw", 1), ("sgd", 2)])
def test_resume_is_exact(optimizer: str, parts: int, tmp_path: Path) -> None:
    recipe, train = replace(RECIPE, optimizer=optimizer), loader(4 // parts)
    val = loader(5, shuffle=False, jitter=0.0)
    whole = head_with_statistics(prompted())
    options: dict[str, Any] = {"recipe": recipe, "accumulation": parts, "progress": False}
    expected = fit(whole, train, val, **options)
    broken = head_with_statistics(prompted())
    stop_after(broken, 9 * parts)
    options |= {"folder": tmp_path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fit(broken, train, val, **options)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1
    torch.rand(7)
    fresh = head_with_statistics(prompted())
    counted: list[int] = []
    fresh.register_forward_pre_hook(lambda m, _: counted.append(1) if m.training else None)
    found = fit(fresh, train, val, **options)
    # Nine steps were done, the eighth was the last one kept, out of 18.
    assert len(counted) == 10 * parts
    assert_equal(values(fresh), values(whole))
    assert int(fresh.get_buffer("head.0.num_batches_tracked")) == 18 * parts

    def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert timeless(found.history) == timeless(expected.history)
    assert found.seconds >= found.history[0]["seconds"]


def test_resume_restores_the_scale_of_losses(tmp_path: Path) -> None:
    """A scaler, as fp16 has it on a GPU, that doubles its scale every four steps."""
    from accelerate import Accelerator

    def go(folder: Path, steps: int | None = None) -> dict[str, Any]:
        accelerator = Accelerator()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)  # type: ignore[attr-defined]
        model = prompted()
        if steps is not None:
            stop_after(model, steps)
        try:
            fit(model, loader(), recipe=RECIPE, folder=folder, accelerator=accelerator)
        except KeyboardInterrupt:
            assert steps is not None
        content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
        return content

    whole = go(tmp_path / "a")
    go(tmp_path / "b", 8)
    resumed = go(tmp_path / "b")
    assert whole["scaler"]["scale"] == resumed["scaler"]["scale"] == 8.0 * 2 ** (18 // 4)
    assert_equal(whole["tensors"], resumed["tensors"])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(
    terminal: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    fit(prompted(), loader(), loader(), recipe=RECIPE)
    out, err = capfd.readouterr()
    assert not out
    assert ("val top1" in err) == terminal
    assert bool(err) == terminal


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    one, two = prompted(), prompted()
    first = fit(one, loader(), loader(), recipe=RECIPE, folder=tmp_path, progress=False)
    stop_after(two, 0)
    second = fit(two, loader(), loader(), recipe=RECIPE, folder=tmp_path, progress=False)
    assert second == first
    assert_equal(values(two), values(one))
    third = prompted()
    options: dict[str, Any] = {"folder": tmp_path, "resume": False, "progress": False}
    stop_after(third, 0)
    with pytest.raises(KeyboardInterrupt):
        fit(third, loader(), recipe=RECIPE, **options)
    assert (tmp_path / "checkpoint.pt").exists()
    third = prompted()
    stop_after(third, 1)
    with pytest.raises(KeyboardInterrupt):
        fit(third, loader(), recipe=RECIPE, **options)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_holds_only_what_trains(tmp_path: Path) -> None:
    model = prompted()
    fit(model, loader(), recipe=RECIPE, folder=tmp_path, progress=False)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(content["tensors"]) == set(trainable_parameters(model))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "config.json", "history.jsonl"}


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(prompted(), loader(), recipe=RECIPE, folder=tmp_path, data={"task": "a"}, progress=False)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other_backbone = prompted()
    with torch.no_grad():
        other_backbone.get_parameter("blocks.1.norm1.weight")[0] += 1e-3
    cases: list[tuple[nn.Module, DataLoader[Any], Recipe, str, str]] = [
        (prompted(), loader(), replace(RECIPE, base_lr=0.5), "a", r"recipe\.base_lr: 0\.64 there"),
        (prompted(), loader(), RECIPE, "b", r"data\.task: 'a' there, 'b' here"),
        (prompted(), loader(images=23), RECIPE, "a", r"loader\.images: 24 there, 23 here"),
        (prompted(), loader(shuffle=False), RECIPE, "a", r"loader\.sampler"),
        (prompted(deep=False), loader(), RECIPE, "a", r"model\.spec\.deep"),
        (other_backbone, loader(), RECIPE, "a", r"model\.backbone"),
    ]
    for model, data, recipe, task, match in cases:
        before = values(model)
        with pytest.raises(SpecError, match=match):
            fit(model, data, recipe=recipe, folder=tmp_path, data={"task": task}, progress=False)
        assert_equal(values(model), before)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


@pytest.mark.parametrize("protocol", ["full", "partial-1", "bias", "linear"])
def test_a_checkpoint_of_other_weights_is_refused_whatever_trains(
    protocol: str, tmp_path: Path
) -> None:
    def model(change: float = 0.0) -> nn.Module:
        host = build("timm/cls", torch.float32)
        with torch.no_grad():
            host.get_parameter("blocks.1.norm1.bias")[0] += change
        return apply_protocol(host, protocol, num_classes=CLASSES)

    recipe = replace(RECIPE, optimizer="adamw", base_lr=1e-3)
    fit(model(), loader(), recipe=recipe, folder=tmp_path, progress=False)
    with pytest.raises(SpecError, match=r"model\.backbone"):
        fit(model(1e-3), loader(), recipe=recipe, folder=tmp_path, progress=False)
    # Another head at the start is no other run: the checkpoint has a later one.
    assert fit(model(), loader(), recipe=recipe, folder=tmp_path, progress=False).history


def test_a_checkpoint_of_other_statistics_or_other_class_weights_is_refused(tmp_path: Path) -> None:
    def model(change: float = 0.0) -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(3).eval().requires_grad_(False)
        norm.running_mean += change
        host = nn.Sequential(norm, nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))
        host.train = lambda mode=True: host  # type: ignore[method-assign]
        return host

    recipe = replace(RECIPE, class_weights="inv")
    labels = Colours().labels
    options: dict[str, Any] = {"recipe": recipe, "folder": tmp_path, "progress": False}
    fit(model(), loader(), labels=labels, **options)
    with pytest.raises(SpecError, match=r"model\.backbone"):
        fit(model(0.1), loader(), labels=labels, **options)
    with pytest.raises(SpecError, match=r"loader\.labels"):
        fit(model(), loader(), labels=[0, *labels[1:-1], 0], **options)
    assert fit(model(), loader(), labels=labels, **options).history


def test_what_a_killed_process_left_goes_away(tmp_path: Path) -> None:
    rest = tmp_path / ".checkpoint.pt.0123456789abcdef.tmp"
    rest.write_bytes(b"half")
    fit(prompted(), loader(), recipe=RECIPE, folder=tmp_path, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt", "config.json", "history.jsonl",
    ]  # fmt: skip


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    fit(prompted(), loader(), recipe=RECIPE, folder=tmp_path, progress=False)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(VPTError, match=r"checkpoint\.pt: cannot be read.*resume=False"):
        fit(prompted(), loader(), recipe=RECIPE, folder=tmp_path, progress=False)
    fit(prompted(), loader(), recipe=RECIPE, folder=tmp_path, resume=False, progress=False)


CHILD = """
import sys, time
sys.path.insert(0, "tests")
import conftest
from pathlib import Path
from test_training import RECIPE, fit, loader, prompted
model = prompted()
model.register_forward_pre_hook(lambda m, _: time.sleep(0.1))
fit(model, loader(), recipe=RECIPE, folder=Path(sys.argv[1]), checkpoint_every=1, progress=False)
"""


def test_kill_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    whole, resumed = prompted(), prompted()
    fit(whole, loader(), recipe=RECIPE, progress=False)
    folder = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], cwd=ROOT)
    limit, step = time.monotonic() + 120, 0
    while step < 8 and time.monotonic() < limit and child.poll() is None:
        time.sleep(0.02)
        if (folder / "checkpoint.pt").exists():
            content = torch.load(folder / "checkpoint.pt", weights_only=True)
            step = json.loads(content["about"])["position"]["step"]
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    step = json.loads(content["about"])["position"]["step"]
    assert 8 <= step < 12
    fit(resumed, loader(), recipe=RECIPE, folder=folder, progress=False)
    assert_equal(values(resumed), values(whole))


# When training goes wrong


def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path) -> None:
    """Without shuffling, the 10th image is in the third batch of each epoch."""
    data = loader(shuffle=False)
    kept, model = prompted(), prompted()
    options: dict[str, Any] = {"recipe": RECIPE, "folder": tmp_path, "progress": False}
    stop_after(kept, 8)
    with pytest.raises(KeyboardInterrupt):
        fit(kept, data, **options)
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    data.dataset.pixels[10] = math.nan  # type: ignore[attr-defined]
    with pytest.raises(DivergedError, match="epoch 2, step 3 of 6: the loss is nan"):
        fit(model, data, **options)
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint
    assert_equal(values(model), values(kept))


def test_weights_that_an_update_broke_end_the_run(tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimizer="sgd", base_lr=1e38, weight_decay=1e6, warmup_epochs=0)
    told = r"epoch 1, step 1 .* not finite\. The model is left .*Lower base_lr \(1e\+38\)"
    with pytest.raises(DivergedError, match=told):
        fit(prompted(), loader(), recipe=recipe, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_rising_loss_warns_once() -> None:
    wild = Recipe(
        optimizer="sgd", base_lr=2000.0, epochs=6, warmup_epochs=5, batch_size=4, weight_decay=0
    )
    with pytest.warns(UserWarning, match="learning rate is most likely too high") as seen:
        fit(prompted(), loader(), recipe=wild, progress=False)
    assert sum("learning rate" in str(w.message) for w in seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(prompted(), loader(), recipe=replace(RECIPE, epochs=6), progress=False)


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([1.4] + [1646.0] * 9, True),  # at once, in fewer steps than two windows
        ([1.1] + [30.0] * 4 + [10.0] * 40, True),  # inside the first window
        ([2.3] + [2.6] * 9, False),
        ([0.1, 0.4, 0.2, 0.5, 0.3, 0.4], False),  # small losses jump about
        ([2.3 - 0.1 * i for i in range(20)], False),
    ],
)
def test_a_leap_of_the_loss_is_told_however_short_the_run(
    losses: list[float], warned: bool
) -> None:
    watch = LossWatch(50)
    told = [message for loss in losses if (message := watch.see(loss))]
    assert len(told) == warned
    again = LossWatch(50, json.loads(json.dumps(LossWatch(50).state)))
    assert sum(again.see(loss) is not None for loss in losses) == warned


def test_a_rate_that_breaks_a_run_of_one_epoch_is_warned_of() -> None:
    recipe = replace(RECIPE, optimizer="sgd", base_lr=3e4, epochs=1, warmup_epochs=0)
    with pytest.warns(UserWarning, match="learning rate is most likely too high"):
        fit(prompted(), loader(images=48), recipe=recipe, progress=False)


class Normed(nn.Module):
    """A classifier with a batch norm that trains."""

    def __init__(self) -> None:
        super().__init__()
        width = 3 * SIZE * SIZE
        self.body = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(width), nn.Linear(width, CLASSES))

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.body(pixels)
        return found


def test_a_last_batch_of_one_image_is_refused_under_batch_norms(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"25 images in batches of 4 leave one .* drop_last"):
        fit(Normed(), loader(images=25), recipe=RECIPE, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    fit(Normed(), loader(images=26), recipe=replace(RECIPE, base_lr=1e-3), progress=False)
    dropped = DataLoader(Colours(25), batch_size=4, shuffle=True, drop_last=True)
    fit(Normed(), dropped, recipe=replace(RECIPE, base_lr=1e-3), progress=False)
    fit(prompted(), loader(images=25), recipe=RECIPE, progress=False)


def test_logits_that_are_not_finite_are_no_accuracy() -> None:
    model = Normed()
    with torch.no_grad():
        model.body[2].bias[1] = math.nan  # type: ignore[union-attr, operator]
    with pytest.raises(DivergedError, match="not finite on 24 of 24 images"):
        evaluate(model, loader())
    # What training makes of val ends the run in the same way.
    with pytest.raises(DivergedError):
        fit(prompted(), loader(), loader(bad=3), recipe=RECIPE, progress=False)


def test_of_equal_logits_the_first_counts() -> None:
    found = classification_metrics(torch.zeros(6, 10), torch.arange(6))
    assert found["top1"] == pytest.approx(1 / 6)


def test_accumulation_of_accelerates_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(SpecError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS unset"):
        fit(prompted(), loader(), recipe=RECIPE, progress=False)


class Hidden(Dataset[Any]):
    """A dataset that does not show its labels, or shows others than it gives."""

    def __init__(self, inner: Colours, shown: list[int] | None = None) -> None:
        self.inner = inner
        if shown is not None:
            self.targets = shown

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inner[index]


def bad_label(index: int, label: int = CLASSES) -> Colours:
    data = Colours()
    data.labels[index] = label
    return data


BAD_LABELS: dict[str, tuple[Dataset[Any], str]] = {
    "labels": (bad_label(7), r"1 of 24 labels .* index 7: 3\. The model has 3 classes"),
    "negative": (bad_label(20, -1), "index 20: -1"),
    "subset": (Subset(bad_label(23, 5), range(4, 24)), "1 of 20 labels .* index 19: 5"),
    "hidden": (Hidden(Colours(), bad_label(3).labels), ""),
}  # fmt: skip


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_out_of_range(case: str, part: str, tmp_path: Path) -> None:
    """Those that can be seen, before the first step; labels that only look wrong are taken."""
    dataset, match = BAD_LABELS[case]
    loaders = {"train": loader(), "val": loader(), part: DataLoader(dataset, 4, shuffle=True)}
    model, folder = prompted(), tmp_path / "run"
    before = values(model)
    if not match:
        fit(model, **loaders, recipe=RECIPE, folder=folder, progress=False)
        return
    with pytest.raises(VPTError, match=rf"fit\({part}=.*{match}"):
        fit(model, **loaders, recipe=RECIPE, folder=folder, progress=False)
    assert_equal(values(model), before)
    assert not folder.exists()


def test_labels_out_of_range_that_only_a_batch_shows(tmp_path: Path) -> None:
    data = DataLoader(Hidden(bad_label(2)), 4)
    with pytest.raises(VPTError, match=r"fit: .* label 3, but the model has 3 classes"):
        fit(prompted(), data, recipe=RECIPE, folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(VPTError, match=r"evaluate: .* label 3"):
        evaluate(prompted(), data)


# Losses and metrics


def test_class_weights_agree_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    labels = [0] * 10 + [1] * 5 + [2] * 1
    unique = torch.arange(3).numpy()
    theirs = sklearn.compute_class_weight("balanced", classes=unique, y=labels)
    ours = class_weights(labels, 3, "inv")
    assert ours is not None
    assert ours.tolist() == pytest.approx(theirs.tolist())
    root = class_weights(labels, 4, "inv_sqrt")
    assert root is not None
    assert root[3] == 0
    assert (root[2] / root[0]).item() == pytest.approx(math.sqrt(10))
    assert root[labels].mean().item() == pytest.approx(1.0)
    assert class_weights(labels, 3, "none") is None


def test_class_weights_reach_the_loss() -> None:
    """Weight 0 for all but one class would be another loss; equal counts change nothing."""
    recipe = replace(RECIPE, class_weights="inv", epochs=1, warmup_epochs=0)
    even = Colours().labels
    plain = fit(prompted(), loader(), recipe=replace(recipe, class_weights="none"), progress=False)
    same = fit(prompted(), loader(), recipe=recipe, labels=even, progress=False)
    uneven = [0] * 12 + [1] * 6 + [2] * 6
    other = fit(prompted(), loader(), recipe=recipe, labels=uneven, progress=False)
    # Weights of 1 multiply exactly.
    assert same.history[0]["train_loss"] == plain.history[0]["train_loss"]
    assert other.history[0]["train_loss"] != plain.history[0]["train_loss"]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([], "0 labels, but train has 24 images"),
        ([0, 1, 2], "3 labels, but train has 24"),
        ([0, 1, -1] * 8, "class numbers, from 0"),
        ([0.0, 1.0, 2.0] * 8, "class numbers, from 0"),
        (["a", "b", "c"] * 8, "class numbers"),
        ([0, 1, 5] * 8, "has the label 5, but the model has 3 classes"),
    ],
)
def test_labels_for_class_weights_are_checked(
    labels: list[Any], match: str, tmp_path: Path
) -> None:
    model, recipe = prompted(), replace(RECIPE, class_weights="inv")
    before = values(model)
    with pytest.raises(SpecError, match=match):
        fit(model, loader(), recipe=recipe, labels=labels, folder=tmp_path / "run", progress=False)
    assert_equal(values(model), before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_metrics_agree_with_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    # Scores of one decimal, so that two classes tie now and then.
    logits = torch.randn(97, classes, dtype=torch.float64)
    if classes == 2:
        logits = (logits * 2).round() / 2
        logits[:, 0] = 0.25
    labels = torch.randint(0, classes, (97,))
    found = classification_metrics(logits, labels)
    y, guess, scores = labels.numpy(), logits.argmax(1).numpy(), logits.softmax(1).numpy()
    every = range(classes)
    assert found["top1"] == pytest.approx(metrics.accuracy_score(y, guess))
    assert found["mean_class"] == pytest.approx(metrics.balanced_accuracy_score(y, guess))
    assert found["loss"] == pytest.approx(metrics.log_loss(y, scores, labels=[*every]))
    top5 = 1.0 if classes <= 5 else metrics.top_k_accuracy_score(y, scores, k=5, labels=[*every])
    assert found["top5"] == pytest.approx(top5)
    assert ("roc_auc" in found) == (classes == 2)
    if classes == 2:
        assert len(logits.unique()) < 20
        assert found["roc_auc"] == pytest.approx(metrics.roc_auc_score(y, scores[:, 1]))


def test_metrics_of_classes_that_are_absent() -> None:
    found = classification_metrics(torch.eye(4)[[0, 0, 1]], torch.tensor([0, 1, 1]))
    assert found["mean_class"] == pytest.approx((1.0 + 0.5) / 2)
    assert "roc_auc" not in classification_metrics(torch.eye(2), torch.tensor([1, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluate(dtype: torch.dtype) -> None:
    model = prompted().to(dtype).train()
    data = Colours(13, jitter=0.0)
    batches = DataLoader(data, batch_size=4)
    found = evaluate(model, batches)
    assert model.training
    assert model.prompts.training  # type: ignore[union-attr]
    with torch.no_grad():
        logits = model.eval()(data.pixels.to(dtype)).float()
    # Batches of another size round otherwise, in bfloat16 to about three digits.
    rough = 1e-5 if dtype == torch.float32 else 2e-2
    assert found == pytest.approx(
        classification_metrics(logits, torch.tensor(data.labels)), rel=rough
    )
    assert evaluate(model, list(batches)) == found
    with pytest.raises(VPTError, match="no images"):
        evaluate(model, [])


# Several processes

DISTRIBUTED = """
import sys
sys.path.insert(0, "tests")
import conftest, json, torch
from dataclasses import replace
from accelerate import Accelerator
from test_training import RECIPE, distributed, fit, loader, loader_batch_size, values
recipe = replace(RECIPE, batch_size=8, optimizer="sgd")
model = distributed(sys.argv[2])
size = loader_batch_size(recipe)
out = sys.argv[1]
val = loader(4, images=13, shuffle=False, jitter=0)
# 21 images: the last batch of one process has 1 image of its own, that of the other none.
labels = [0] * 12 + [1] * 5 + [2] * 4
recipe = replace(recipe, class_weights="inv_sqrt", label_smoothing=0.1)
train = loader(size, images=21)
result = fit(model, train, val, recipe=recipe, folder=out, labels=labels, progress=False)
assert type(model).__name__ != "DistributedDataParallel" and "forward" not in vars(model)
if Accelerator().is_main_process:
    torch.save(values(model), f"{out}/weights.pt")
    processes = result.config["machine"]["processes"]
    json.dump([size, processes, result.history], open(f"{out}/h.json", "w"))
# A group left open races with its peer's exit, which sometimes aborts the interpreter.
Accelerator().wait_for_everyone()
Accelerator().end_training()
"""


def distributed(what: str) -> nn.Module:
    if what == "prompts":
        return prompted(dropout=0.0)
    torch.manual_seed(0)
    model = build("transformers/dinov2", torch.float32)
    apply_protocol(model, "full", num_classes=CLASSES, generator=torch.Generator().manual_seed(0))
    # A protocol leaves it alone; here it shall train, though no forward uses it.
    mask = model.get_parameter("dinov2.embeddings.mask_token")
    assert not mask.requires_grad
    mask.requires_grad_(True)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("what", ["prompts", "full"])
def test_two_processes_are_one_with_the_doubled_batch(what: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)
    # `accelerate launch` itself starts several processes on a CPU through mpirun only.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    found: list[tuple[Any, dict[str, Tensor]]] = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1"}
        subprocess.run(
            [*launch, str(processes), str(script), str(out), what],
            cwd=ROOT,
            env=environment,
            check=True,
        )
        history = json.loads((out / "h.json").read_text())
        found.append((history, torch.load(out / "weights.pt", weights_only=True)))
    (size1, count1, rows1), (size2, count2, rows2) = found[0][0], found[1][0]
    assert (size1, count1, size2, count2) == (8, 1, 4, 2)
    for one, two in zip(rows1, rows2, strict=True):
        assert one["step"] == two["step"]
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert two["val"] == pytest.approx(one["val"], rel=1e-4)
    for name, tensor in found[0][1].items():
        # float32 sums in another order, over nine steps.
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


# Batches of other forms


class Named(Colours):
    """The same images as transformers' collators give them."""

    def __getitem__(self, index: int) -> Any:
        pixels, label = super().__getitem__(index)
        return {"pixel_values": pixels, "labels": label}


def test_mappings_are_batches_too() -> None:
    one, other = prompted(), prompted()
    fit(one, loader(), loader(shuffle=False), recipe=RECIPE, progress=False)
    named = DataLoader(Named(), batch_size=4, shuffle=True)
    held = DataLoader(Named(), batch_size=4)
    fit(other, named, held, recipe=RECIPE, progress=False)
    assert_equal(values(one), values(other))


PIXELS = torch.randn(4, 3, SIZE, SIZE)
FORMS: dict[str, tuple[Any, str]] = {
    "triples": ((PIXELS, torch.arange(4) % 3, torch.arange(4)), "list of Tensor, Tensor, Tensor"),
    "images alone": ((PIXELS,), "list of Tensor"),
    "float labels": ((PIXELS, torch.zeros(4)), "torch.float32"),
    "bool labels": ((PIXELS, torch.zeros(4, dtype=torch.bool)), "torch.bool"),
    "columns": ((PIXELS, torch.zeros(4, 1, dtype=torch.long)), r"shape \(4, 1\)"),
    "one-hot": ((PIXELS, torch.eye(4)[:, :3].long()), r"shape \(4, 3\)"),
    "shares of other classes": ((PIXELS, torch.rand(4, 4)), r"\(4, 4\)"),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_of_batches_are_refused(form: str) -> None:
    tensors, match = FORMS[form]
    model, wrong = prompted(), DataLoader(TensorDataset(*tensors), batch_size=4)
    before = values(model)
    with pytest.raises(VPTError, match=match):
        fit(model, wrong, recipe=RECIPE, progress=False)
    assert_equal(before, values(model))
    with pytest.raises(VPTError, match=match):
        evaluate(model, wrong)


def test_labels_may_be_shares_of_classes_in_training() -> None:
    model, labels = prompted(), torch.eye(CLASSES)[torch.arange(4) % CLASSES]
    data = DataLoader(TensorDataset(PIXELS, labels), batch_size=4)
    short = replace(RECIPE, epochs=1, warmup_epochs=0)
    found = fit(model, data, recipe=short, progress=False)
    whole = DataLoader(TensorDataset(PIXELS, torch.arange(4) % CLASSES), batch_size=4)
    wanted = fit(prompted(), whole, recipe=short, progress=False)
    assert found.history[0]["train_loss"] == pytest.approx(wanted.history[0]["train_loss"])
    weighted = replace(short, class_weights="inv")
    with pytest.raises(VPTError, match="class_weights='none'"):
        fit(prompted(), data, recipe=weighted, labels=[0, 1, 2, 0], progress=False)


class Stream(IterableDataset[Any]):
    """Batches that can be gone through again and again, of a length that nobody knows."""

    def __iter__(self) -> Any:
        yield PIXELS, torch.arange(4) % CLASSES


class Listed:
    """Batches by their number alone."""

    def __getitem__(self, index: int) -> Any:
        if index:
            raise IndexError
        return PIXELS, torch.arange(4) % CLASSES


@pytest.mark.parametrize("val", [Stream(), Listed(), DataLoader(Stream(), batch_size=None)])
def test_val_may_be_anything_that_gives_batches_again_and_again(val: Any) -> None:
    short = replace(RECIPE, epochs=2, warmup_epochs=0)
    found = fit(prompted(), loader(), val, recipe=short, progress=False)
    assert all(row["val"]["top1"] >= 0 for row in found.history)


def test_a_mapping_of_other_names_is_refused() -> None:
    with pytest.raises(VPTError, match="a mapping with 'image': Tensor, 'label': Tensor"):
        evaluate(prompted(), [{"image": PIXELS, "label": torch.zeros(4, dtype=torch.long)}])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_may_be_any_integers(dtype: torch.dtype) -> None:
    model = prompted()
    labels = torch.arange(4) % 3
    wanted = evaluate(model, [(PIXELS, labels)])
    assert evaluate(model, [(PIXELS, labels.to(dtype))]) == wanted
    data = DataLoader(TensorDataset(PIXELS, labels.to(dtype)), batch_size=4)
    short = replace(RECIPE, epochs=1, warmup_epochs=0)
    fit(model, data, data, recipe=short, progress=False)


@pytest.mark.parametrize(
    ("val", "match"),
    [
        (5, "holds no batches"),
        (TensorDataset(PIXELS, torch.zeros(4, dtype=torch.long)), "holds images, not batches"),
        ([], "is empty"),
        (DataLoader(Subset(Colours(), []), batch_size=4), "is empty"),
    ],
)
def test_val_without_batches_is_refused_before_the_first_step(val: Any, match: str) -> None:
    model = prompted()
    before = values(model)
    with pytest.raises(SpecError, match=match):
        fit(model, loader(), val, recipe=RECIPE, progress=False)
    assert_equal(before, values(model))


def test_what_is_no_model_and_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="must be a model"):
        fit(3, loader(), recipe=RECIPE)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="is no folder"):
        fit(prompted(), loader(), recipe=RECIPE, folder=tmp_path / "file", progress=False)
    for wrong in (0, -1, "2"):
        with pytest.raises(SpecError, match="accumulation"):
            loader_batch_size(RECIPE, wrong)  # type: ignore[arg-type]


def test_a_checkpoint_of_other_labels_is_refused(tmp_path: Path) -> None:
    fit(prompted(), loader(), recipe=RECIPE, folder=tmp_path, progress=False)
    other = Colours()
    other.labels = other.labels[::-1]
    data = DataLoader(other, batch_size=4, shuffle=True)
    with pytest.raises(SpecError, match="labels"):
        fit(prompted(), data, recipe=RECIPE, folder=tmp_path, progress=False)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_a_torn_checkpoint_is_named(share: float, tmp_path: Path) -> None:
    short = replace(RECIPE, epochs=1, warmup_epochs=0)
    fit(prompted(), loader(), recipe=short, folder=tmp_path, progress=False)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(VPTError, match=r"checkpoint\.pt: cannot be read as a checkpoint"):
        fit(prompted(), loader(), recipe=short, folder=tmp_path, progress=False)


def test_a_run_of_few_steps_warns_too() -> None:
    watch = LossWatch(1, total=4)
    told = [watch.see(loss) for loss in (1.1, 4160.0, 44482.0, 27152.0)]
    assert told[:3] == [None] * 3
    assert "the last 4 steps is 1.895e+04, above the 1.1" in str(told[3])


def test_batches_of_one_are_none_for_a_batch_norm() -> None:
    model = build("timm/cls", torch.float32)
    apply_protocol(model, "mlp-2", num_classes=CLASSES)
    for drop_last in (False, True):
        one = DataLoader(Colours(), batch_size=1, drop_last=drop_last)
        with pytest.raises(SpecError, match="batches of one image"):
            fit(model, one, recipe=RECIPE, accumulation=4, progress=False)


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([0.5])])
def test_an_objective_may_return_any_number(value: Any) -> None:
    assert finite(value, {}) == 0.5
    for wrong in ("0.5", torch.zeros(2), math.nan, None, 10**400):
        with pytest.raises(SpecError, match="finite number"):
            finite(wrong, {})
    with pytest.raises(SpecError, match="different numbers"):
        grid_points({"rate": [value]})


def test_a_rate_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(SpecError, match="float32"):
        Recipe(base_lr=1e300)
    with pytest.raises(SpecError, match="float32"):
        Recipe(base_lr=1e38, prompt_lr_scale=1e38)


def test_a_model_without_logits_is_named() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=16, patch_size=8, intermediate_size=32, **sizes)
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(VPTError, match="evaluate: the model returns"):
        evaluate(transformers.ViTModel(config), [(torch.rand(2, 3, 16, 16), labels)])
