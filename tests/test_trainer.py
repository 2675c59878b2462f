"""Life with transformers: Trainer, resume, best model, pipeline, save_pretrained, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from zoo import build, image, logits

from peft_vpt import inject_prompts, trainable_parameters

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


def trainer(model: nn.Module, folder: Path, epochs: int = 2, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
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


def test_load_best_model_at_end(tmp_path: Path) -> None:
    model = model_with_prompts()
    run = trainer(
        model,
        tmp_path,
        epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst epoch, so that it is not simply the last one
        save_total_limit=3,
    )
    run.train()
    from safetensors.torch import load_file

    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    assert not run.state.best_model_checkpoint.endswith("checkpoint-15")
    for n, p in trainable_parameters(model).items():
        assert torch.equal(p, best[n]), n


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


def test_eager_attention_set_after_injection() -> None:
    model = inject_prompts(build("transformers/vit"), 3)
    expected = logits(model(image()))
    model.set_attn_implementation("eager")
    out = model(image(), output_attentions=True)
    # The softmax of transformers' eager attention is float32 inside.
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    assert out.attentions[0].shape[-2:] == (17, 20)
