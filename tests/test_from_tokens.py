"""Prompts that begin as tokens of images: which tokens, of which size, and what else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from peft_vpt import VPTError, inject_prompts, remove_prompts, save_task_adapter
from peft_vpt.adapter.file import read_adapter
from peft_vpt.backbones.find import encoder_for
from peft_vpt.errors import NotPromptedError, SpecError, UnsupportedArchitectureError
from peft_vpt.training.from_tokens import fewest_tokens, prompts_from_tokens


def images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, zoo.SIZE, zoo.SIZE, generator=torch.Generator().manual_seed(seed))


def inputs(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Return what enters each block of a bare model, prefix tokens left out, as rows."""
    encoder, kept = encoder_for(model, "prepend"), []
    handles = [
        model.get_submodule(block.path).register_forward_pre_hook(
            lambda _, args, kwargs: kept.append((args or tuple(kwargs.values()))[0]),
            with_kwargs=True,
        )
        for block in encoder.blocks
    ]
    with torch.no_grad():
        model.eval()(pixels)
    for handle in handles:
        handle.remove()
    return [
        (x[:, encoder.prefix_tokens :] if x.dim() == 3 else x).reshape(-1, x.shape[-1])
        for x in kept
    ]


def prompted(kind: str, **options: Any) -> nn.Module:
    model = zoo.build(kind, torch.float32)
    draw = torch.Generator().manual_seed(3)
    return inject_prompts(model, **{"length": 4, "generator": draw, **options})


FAMILIES = ("timm/cls", "timm/registers", "timm/gap", "transformers/vit", "transformers/deit")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("deep", [True, False])
def test_each_prompt_is_a_token_of_its_own_block_at_the_size_it_had(kind: str, deep: bool) -> None:
    model = prompted(kind, deep=deep)
    entries = model.prompts.entries
    before = {e: model.prompts.stored(e).detach().clone() for e in entries}
    prompts_from_tokens(model, images(), generator=torch.Generator().manual_seed(5))
    bare = inputs(zoo.build(kind, torch.float32), images())
    for entry in entries:
        values = model.prompts.stored(entry).detach()
        near = nn.functional.cosine_similarity(values[:, None], bare[entry][None], dim=-1)
        # Directions are equal but for single precision; a token of another block is far off.
        assert (near.max(dim=1).values > 1 - 1e-6).all()
        assert len(set(near.argmax(dim=1).tolist())) == len(values)
        size = before[entry].square().mean().sqrt()
        rms = values.square().mean(dim=-1).sqrt()
        torch.testing.assert_close(rms, size.expand(len(rms)), rtol=1e-5, atol=0)


def test_windows_give_tokens_of_each_stage() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    swin = timm.models.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4),
        num_classes=3,
    )  # fmt: skip
    bare = inputs(zoo.perturb(swin), images())
    inject_prompts(swin, length=3, deep=True)
    prompts_from_tokens(swin, images())
    for entry in swin.prompts.entries:
        values = swin.prompts.stored(entry).detach()
        near = nn.functional.cosine_similarity(values[:, None], bare[entry][None], dim=-1)
        assert (near.max(dim=1).values > 1 - 1e-6).all()


def test_the_draw_follows_the_generator_and_nothing_else_changes() -> None:
    first, second, third = (prompted("timm/cls") for _ in range(3))
    seen: list[int] = []
    first.train()
    first.blocks[1].register_forward_pre_hook(lambda *_: seen.append(1))
    names = {n: p.detach().clone() for n, p in first.named_parameters() if "prompts" not in n}
    state = torch.get_rng_state()
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        prompts_from_tokens(model, images(), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.prompts.stored(2), second.prompts.stored(2))
    assert not torch.equal(first.prompts.stored(2), third.prompts.stored(2))
    assert first.training
    assert first.prompts.stored(0).requires_grad
    assert not seen
    own = dict(first.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in names.items())
    first.eval()(images(1))
    assert seen
    bare = zoo.build("timm/cls", torch.float32).eval()
    remove_prompts(first)
    assert torch.equal(first.eval()(images(2)), bare(images(2)))


def test_without_a_generator_the_global_one_is_drawn_from() -> None:
    model, found = prompted("timm/cls"), []
    torch.manual_seed(7)
    for _ in range(2):
        prompts_from_tokens(model, images())
        found.append(model.prompts.stored(1).detach().clone())
    torch.manual_seed(7)
    prompts_from_tokens(model, images())
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(model.prompts.stored(1).detach(), found[0], rtol=1e-5, atol=1e-7)


def test_tokens_come_from_all_images() -> None:
    # More than one forward takes at once, each image of one colour of its own.
    pixels = torch.linspace(-2, 2, 40).view(-1, 1, 1, 1).expand(-1, 3, zoo.SIZE, zoo.SIZE)
    model = prompted("timm/cls", length=200)
    prompts_from_tokens(model, pixels, generator=torch.Generator().manual_seed(0))
    bare = inputs(zoo.build("timm/cls", torch.float32), pixels)[2].view(40, 16, -1)
    values = model.prompts.stored(2).detach()
    near = nn.functional.cosine_similarity(values[:, None], bare.reshape(640, -1)[None], dim=-1)
    assert (near.max(dim=1).values > 1 - 1e-6).all()
    # 200 of 640 tokens leave out all 16 of an image once in 500 images.
    assert len(set((near.argmax(dim=1) // 16).tolist())) >= 38
    assert fewest_tokens(model, pixels[:2]) == 16


def test_outputs_follow_at_once() -> None:
    model = prompted("timm/cls").eval()
    with torch.no_grad():
        before = model(images(2))
        prompts_from_tokens(model, images())
        after = model(images(2))
    # Keys and values of the former prompts are not kept.
    assert not torch.allclose(before, after, atol=1e-4)


def test_shared_prompts_come_from_the_first_of_their_blocks() -> None:
    model = prompted("timm/cls", deep=True, sharing="inter")
    prompts_from_tokens(model, images())
    bare = inputs(zoo.build("timm/cls", torch.float32), images())
    values = model.prompts.stored(2).detach()
    near = nn.functional.cosine_similarity(values[:, None], bare[0][None], dim=-1)
    assert (near.max(dim=1).values > 1 - 1e-6).all()


def test_a_file_says_that_values_were_given(tmp_path: Any) -> None:
    model = prompted("timm/cls")
    prompts_from_tokens(model, images())
    assert read_adapter(save_task_adapter(model, tmp_path, task="land")).spec.init == "tensor"


def refused(change: Callable[[], Any], error: type[VPTError], match: str) -> None:
    with pytest.raises(error, match=match):
        change()


def test_what_cannot_begin_as_tokens_is_refused() -> None:
    refused(
        lambda: prompts_from_tokens(zoo.build("timm/cls", torch.float32), images()),
        NotPromptedError,
        "inject_prompts",
    )
    for options, match in (
        ({"project": 8}, "without projection"),
        ({"location": "add", "length": 1}, "location='add'"),
        ({"init": "zeros"}, "all zero"),
    ):
        model = prompted("timm/cls", **options)
        before = {n: p.detach().clone() for n, p in model.prompts.named_parameters()}
        refused(lambda model=model: prompts_from_tokens(model, images()), SpecError, match)
        after = dict(model.prompts.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())
    model = prompted("timm/cls")
    for pixels in (images(0), images()[0], [1]):
        refused(lambda pixels=pixels: prompts_from_tokens(model, pixels), SpecError, "images")
    many = prompted("timm/cls", length=17)
    refused(lambda: prompts_from_tokens(many, images(1)), SpecError, "16 tokens, fewer than its 17")
    assert many.prompts.spec.init == "xavier"
    broken = images()
    broken[:] = torch.nan
    refused(lambda: prompts_from_tokens(model, broken), SpecError, "not finite")
    assert model.prompts.stored(0).isfinite().all()


def test_what_is_no_image_or_no_longer_here_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=2, tubelet_size=1, intermediate_size=32, **sizes
    )
    video = inject_prompts(transformers.VideoMAEModel(config), length=2)
    pixels = torch.rand(2, 3, 16, 16)
    refused(
        lambda: prompts_from_tokens(video, pixels), UnsupportedArchitectureError, "not take images"
    )
    model = prompted("timm/cls").to("meta")
    refused(lambda: prompts_from_tokens(model, images()), SpecError, "before the model is sharded")


def test_a_map_as_wide_as_its_channels_is_one_of_tokens() -> None:
    timm = pytest.importorskip("timm")
    sizes = {
        "img_size": 64,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (2, 2),
    }
    swin = timm.models.SwinTransformer(window_size=4, num_classes=3, **sizes)
    inject_prompts(swin, length=2)
    before = {name: value.clone() for name, value in swin.state_dict().items()}
    prompts_from_tokens(swin, torch.rand(2, 3, 64, 64))
    moved = [name for name, value in swin.state_dict().items() if not value.equal(before[name])]
    assert len(moved) == 2
    assert all("prompt" in name for name in moved)


def test_maps_with_channels_first_are_no_rows_of_tokens() -> None:
    pytest.importorskip("timm")
    import timm

    davit = timm.create_model("davit_tiny", num_classes=2)
    inject_prompts(davit, length=2, layers=[0])
    refused(
        lambda: prompts_from_tokens(davit, torch.rand(1, 3, 384, 384)),
        UnsupportedArchitectureError,
        "where tokens of the width 96",
    )
