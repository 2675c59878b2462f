"""Life with transformers: Trainer, resume, best model, pipeline, save_pretrained, labels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from zoo import build, image, logits

from peft_vpt import apply_protocol, inject_prompts, trainable_parameters

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Squares(Dataset):  # type: ignore[type-arg]
    """Twenty random images of four classes that differ in their mean colour."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = image(1, torch.float32, seed=index)[0] + index % 4
        return {"pixel_values": pixels, "labels": index % 4}


def model_with_prompts() -> nn.Module:
    model = build("transformers/vit", torch.float32)
    return inject_prompts(model, 3, num_classes=4, generator=torch.Generator().manual_seed(0))


PROTOCOLS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("linear", "full", "partial-1", "mlp-2", "sidetune", "bias", "cls")},
    **{name: {"length": 3} for name in ("vpt-shallow", "vpt-deep", "vpt+bias", "prompt-fixed")},
    "adapter": {"reduction": 4},
}


def under(protocol: str) -> nn.Module:
    torch.manual_seed(0)
    options = PROTOCOLS[protocol]
    if protocol == "sidetune":
        features = nn.Sequential(nn.Conv2d(3, 256, 8, 8), nn.BatchNorm2d(256), nn.ReLU())
        options = {"features": features}
    model = build("transformers/vit", torch.float32)
    return apply_protocol(model, protocol, num_classes=4, **options)


def convnet() -> nn.Module:
    """Statistics of batch norms move with what trains around them."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = transformers.ResNetForImageClassification(config)
    return apply_protocol(model, "partial-1", num_classes=4)


MOVING: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(under, name) for name in PROTOCOLS},
    "resnet": convnet,
}


BEST_AT_END: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the worst epoch, so that it is not simply the last one
}


def trainer(model: nn.Module, folder: Path, epochs: int = 2, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"learning_rate": 0.05} | options,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Squares(), eval_dataset=Squares()
    )


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainable_parameters(model).items()}


def test_trainer_checkpoints_hold_what_trains_and_resume_is_exact(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = model_with_prompts()
    backbone = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    whole = trainer(model, tmp_path / "whole", save_strategy="epoch")
    result = whole.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    for n, p in model.named_parameters():
        if n in backbone:
            assert torch.equal(p, backbone[n])
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) == set(trainable_parameters(model))
    resumed = model_with_prompts()
    trainer(resumed, tmp_path / "whole", save_strategy="epoch").train(
        resume_from_checkpoint=str(checkpoint)
    )
    for n, p in trainable_parameters(resumed).items():
        assert torch.equal(p, values(model)[n]), n


@pytest.mark.parametrize("name", MOVING)
def test_under_every_protocol_a_resumed_run_ends_like_an_uninterrupted_one(
    name: str, tmp_path: Path
) -> None:
    whole = MOVING[name]()
    began = {n: t.clone() for n, t in whole.state_dict().items()}
    trainer(whole, tmp_path, save_strategy="steps", save_steps=4, learning_rate=0.01).train()
    resumed = MOVING[name]()
    trainer(resumed, tmp_path, save_strategy="no", learning_rate=0.01).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    state = resumed.state_dict()
    assert any(not torch.equal(t, began[n]) for n, t in whole.state_dict().items())
    for n, t in whole.state_dict().items():
        assert torch.equal(state[n], t), n


@pytest.mark.parametrize("name", MOVING)
def test_under_every_protocol_the_best_weights_come_back(name: str, tmp_path: Path) -> None:
    model = MOVING[name]()
    run = trainer(model, tmp_path, learning_rate=0.01, **BEST_AT_END)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    keep = run._save_checkpoint

    def spy(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        seen[run.state.global_step] = {n: t.clone() for n, t in model.state_dict().items()}
        keep(model, *args, **kwargs)

    run._save_checkpoint = spy
    run.train()
    assert len(seen) == 2
    best = seen[run.state.best_global_step]
    assert run.state.best_global_step < run.state.global_step
    for n, t in model.state_dict().items():
        assert torch.equal(t, best[n]), n


def test_trainer_leaves_the_backbone_in_eval_and_trains_under_checkpointing(tmp_path: Path) -> None:
    model = model_with_prompts()
    modes: list[bool] = []
    model.vit.layers[1].mlp.register_forward_pre_hook(
        lambda m, a: modes.append(m.training) if torch.is_grad_enabled() else None
    )
    before = values(model)
    trainer(model, tmp_path, epochs=1, save_strategy="no", gradient_checkpointing=True).train()
    assert modes
    assert not any(modes)
    assert all(not torch.equal(p, before[n]) for n, p in values(model).items())


def test_the_new_head_works_with_loss_labels_and_pipeline() -> None:
    pil = pytest.importorskip("PIL.Image")
    bare, model = build("transformers/vit", torch.float32), model_with_prompts()
    loss = model(image(dtype=torch.float32), labels=torch.tensor([0, 3])).loss
    loss.backward()
    assert model.prompts.stored(0).grad is not None
    assert model.config.num_labels == 4
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl", 3: "fox"}
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    picture = pil.new("RGB", (32, 32), (200, 30, 90))

    def pipe(net: nn.Module, top_k: int) -> dict[str, float]:
        task = transformers.pipeline("image-classification", model=net, image_processor=processor)
        return {row["label"]: row["score"] for row in task(picture, top_k=top_k)}

    scores = pipe(model.eval(), 4)
    assert set(scores) == {"cat", "dog", "owl", "fox"}
    inputs = processor(images=picture, return_tensors="pt")
    direct = logits(model(**inputs)).softmax(-1)[0]
    for index, label in model.config.id2label.items():
        assert scores[label] == pytest.approx(float(direct[index].detach()), abs=1e-6)
    same_head = inject_prompts(build("transformers/vit", torch.float32), 3)
    plain, prompted = pipe(bare, 5), pipe(same_head, 5)
    assert plain.keys() == prompted.keys()
    assert any(abs(plain[label] - prompted[label]) > 1e-3 for label in plain)


def test_save_pretrained_of_a_removed_model_is_whole_again(tmp_path: Path) -> None:
    from peft_vpt import remove_prompts

    model = model_with_prompts()
    expected = logits(build("transformers/vit", torch.float32)(image(dtype=torch.float32)))
    remove_prompts(model).save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded(image(dtype=torch.float32))), expected)
    remove_prompts(apply_protocol(loaded, "bias")).save_pretrained(tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_eager_attention_set_after_injection() -> None:
    model = inject_prompts(build("transformers/vit"), 3)
    expected = logits(model(image()))
    model.set_attn_implementation("eager")
    out = model(image(), output_attentions=True)
    # The softmax of transformers' eager attention is float32 inside.
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    assert out.attentions[0].shape[-2:] == (17, 20)
