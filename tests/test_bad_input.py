"""Bad input: a clear message, tested as text, and the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import build, image, logits

from peft_vpt import PromptSpec, VPTError, inject_prompts, is_prompted, remove_prompts
from peft_vpt.errors import (
    AlreadyPromptedError,
    NotPromptedError,
    SpecError,
    UnsupportedArchitectureError,
)

NAN = float("nan")
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"length": 0}, "inject_prompts(length=0): must be an integer from 1 to 65536."),
    ({"length": -3}, "inject_prompts(length=-3): must be an integer from 1 to 65536."),
    ({"length": 2.5}, "inject_prompts(length=2.5): must be an integer from 1 to 65536."),
    ({"length": True}, "inject_prompts(length=True): must be an integer from 1 to 65536."),
    ({"length": "5"}, "inject_prompts(length='5'): must be an integer from 1 to 65536."),
    ({"deep": 1}, "inject_prompts(deep=1): must be True or False."),
    ({"layers": (3,)}, "inject_prompts(layers=(3,)): block 3 is outside the model"),
    ({"layers": (0, 3)}, "whose blocks are 0 to 2"),
    ({"layers": (-1,)}, "must be block indices, each >= 0, in strictly rising order"),
    ({"layers": (1, 1)}, "inject_prompts(layers=(1, 1)): must be block indices"),
    ({"layers": (2, 1)}, "in strictly rising order"),
    ({"layers": ()}, "inject_prompts(layers=()): must name a block."),
    ({"layers": 1}, "inject_prompts(layers=1): must be block indices"),
    ({"layers": "01"}, "inject_prompts(layers='01'): must be block indices"),
    ({"layers": (0.5,)}, "in strictly rising order"),
    ({"location": "middle"}, "must be one of prepend, add"),
    (
        {"location": "add", "length": 2},
        "length must be 1 (one vector on all tokens) or 17 (one per",
    ),
    ({"location": "add", "length": 1, "form": "kv"}, "cannot serve blocks 0 to 0: location='add'"),
    (
        {"location": "add", "length": 1, "pooling": "prompt"},
        "needs prompt tokens, and with",
    ),
    ({"location": "pad", "pooling": "global"}, "needs prompt tokens, and with location="),
    ({"location": "pad"}, "border of 50 leaves nothing of them; length can be up to 15."),
    ({"location": "pad", "length": 16}, "VisionTransformer takes images of 32 x 32 only"),
    ({"location": "pad", "form": "kv"}, "can only be 'auto' or 'token' with location='pad'"),
    ({"location": "pad", "dropout": 0.1}, "can only be 0 with location='pad'"),
    ({"location": "pad", "sharing": "inter"}, "can only be 'none' with location='pad'"),
    ({"location": "pad", "project": 4}, "can only be None with location='pad'"),
    ({"location": "pad", "layers": (0,)}, "can only be None with location='pad'"),
    ({"location": "prepend-pixel", "layers": (1,)}, "can only be None with location="),
    ({"location": "prepend-pixel", "form": "kv"}, "can only be 'auto' or 'token' with"),
    ({"location": "concat-channel", "pooling": "prompt"}, "needs prompt tokens"),
    ({"location": "concat-channel", "dropout": 0.5}, "can only be 0 with location="),
    (
        {"location": "pad", "length": 3, "init": torch.ones(2, 3, 6, 32)},
        "needs 2 floating point tensors of the shapes [(3, 6, 32), (3, 26, 6)]",
    ),
    ({"sharing": "some"}, "must be one of none, inter, intra, all"),
    ({"sharing": None}, "must be one of none"),
    ({"init": "best"}, "must be one of xavier, normal, zeros, tensor"),
    ({"init": "tensor"}, "inject_prompts(init='tensor'): give the tensor itself."),
    ({"init": torch.ones(3, 50, 31)}, "needs 3 floating point tensors of the shapes [(50, 32)"),
    ({"init": torch.ones(2, 50, 32)}, "needs 3 floating point tensors"),
    ({"init": torch.ones(3, 50, 32, dtype=torch.int64)}, "needs 3 floating point tensors"),
    ({"init": [torch.ones(50, 32), None, 3]}, "got [(50, 32), 'NoneType', 'int']"),
    ({"init": torch.full((3, 50, 32), NAN)}, "holds values that are not finite"),
    ({"init": None}, "inject_prompts(init=None): must be a name, a tensor"),
    ({"init": 5}, "inject_prompts(init=5): must be a name, a tensor"),
    ({"init": torch.tensor(1.0)}, "needs 3 floating point tensors"),
    ({"generator": 5}, "inject_prompts(generator=5): must be a torch.Generator or None."),
    ({"layers": (True,)}, "in strictly rising order"),
    ({"dropout": 1.0}, "must be a finite number >= 0 and < 1 or None"),
    ({"dropout": -0.1}, "must be a finite number >= 0"),
    ({"dropout": NAN}, "must be a finite number >= 0"),
    ({"dropout": "0.1"}, "must be a finite number >= 0"),
    ({"project": 0}, "inject_prompts(project=0): must be an integer >= 1"),
    ({"pooling": "max"}, "must be one of default, cls, image, prompt, global"),
    ({"train_prompts": None}, "must be True or False"),
    ({"form": "fast"}, "must be one of auto, kv, token"),
    ({"form": "kv", "deep": False}, "cannot serve blocks 0 to 2: prompts are carried"),
    ({"form": "kv", "pooling": "prompt"}, "pooling='prompt' reads what the block computes"),
    ({"pooling": "prompt", "layers": (0,)}, "no prompts are left behind the last block"),
    ({"num_classes": -1}, "inject_prompts(num_classes=-1): must be an integer >= 0 or None."),
    ({"num_classes": 2.0}, "must be an integer >= 0 or None."),
    ({"num_classes": True}, "must be an integer >= 0 or None."),
]


def state(model: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = (dict(module._forward_hooks), dict(module._forward_pre_hooks))
        parts[name] = (id(module), hooks, set(vars(module)), module.training)
    parts |= {f"p:{n}": (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()}
    return parts


def refused(model: nn.Module, error: type[Exception], message: str, **options: Any) -> None:
    """Check the error, its text, and that nothing changed."""
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error) as caught:
        inject_prompts(model, **options)
    assert isinstance(caught.value, VPTError)
    assert isinstance(caught.value, ValueError)
    assert message in str(caught.value)
    if before is not None:
        assert state(model) == before


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(o) for o, _ in OPTIONS])
def test_options(options: dict[str, Any], message: str) -> None:
    model = build("timm/cls")
    before = model(image())
    refused(model, SpecError, message, **options)
    assert torch.equal(model(image()), before)


def test_kv_form_with_dropout_and_several_attentions() -> None:
    refused(
        build("timm/parallel-things"),
        SpecError,
        "must share one dropout mask",
        form="kv",
        dropout=0.1,
    )
    model = inject_prompts(build("timm/parallel-things"), dropout=0.1)
    assert "several attentions of a block share one dropout mask" in repr(model.prompts)


def test_models_that_are_not_made_for_images_of_three_channels() -> None:
    options = {"location": "pad", "length": 3}
    message = "needs a model for images of 3 channels, VisionTransformer takes 1; build it for 3."
    refused(build("timm/cls", in_chans=1), SpecError, message, **options)
    message = "needs a model for images of 3 channels, ViTModel takes 4"
    refused(build("transformers/vit", num_channels=4), SpecError, message, **options)


def test_locations_that_a_convnet_does_not_offer() -> None:
    timm = pytest.importorskip("timm")
    for location in ("prepend", "add", "prepend-pixel", "concat-channel"):
        refused(
            timm.create_model("test_resnet"),
            UnsupportedArchitectureError,
            "location='pad' works for every image model",
            location=location,
        )
    options = {"location": "pad", "length": 3, "pooling": "image"}
    refused(timm.create_model("test_resnet"), SpecError, "has no tokens that are known", **options)
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", depth=1, img_size=32)
    options = {"location": "prepend-pixel", "length": 2}
    refused(hybrid, UnsupportedArchitectureError, "use location='prepend'", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/gap", {"pooling": "cls"}, "the model has no CLS token"),
        ("timm/distilled", {"pooling": "image"}, "two classifiers (distillation)"),
        ("transformers/vit-model", {"num_classes": 3}, "ViTModel has no classifier to replace"),
        ("transformers/vit-model", {"num_classes": 0}, "ViTModel has no classifier to replace"),
        ("transformers/vit-model", {"pooling": "image"}, "has no classifier"),
        ("transformers/dinov2", {"pooling": "cls"}, "takes 64 features and this pooling gives 32"),
    ],
)
def test_options_that_need_the_model(name: str, options: dict[str, Any], message: str) -> None:
    refused(build(name), SpecError, message, **options)


def test_convnets_mixers_and_text_models() -> None:
    timm = pytest.importorskip("timm")
    for name in ("resnet10t", "mixer_s32_224", "convnext_atto"):
        model = timm.create_model(name)
        refused(
            model,
            UnsupportedArchitectureError,
            "it holds no softmax attention over tokens",
        )


def test_text_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    model = transformers.BertModel(config)
    refused(model, UnsupportedArchitectureError, "found no attention over image tokens")


def test_differential_attention() -> None:
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import DiffParallelScalingBlock
    from zoo import BASE

    diff = timm.models.vision_transformer.VisionTransformer(**BASE, attn_layer="diff")
    refused(diff, UnsupportedArchitectureError, "extra keys cancel out")
    diff = timm.models.vision_transformer.VisionTransformer(
        **BASE, block_fn=DiffParallelScalingBlock
    )
    refused(diff, UnsupportedArchitectureError, "extra keys cancel out")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("xcit_nano_12_p8_224", "its softmax runs over channels"),
        ("coat_tiny", "no softmax over keys"),
        ("efficientvim_m1", "state-space model"),
        ("efficientvit_m0", "cascaded heads"),
        ("shvit_s1", "runs over the whole map"),
        ("edgenext_xx_small", "its softmax runs over channels"),
    ],
)
def test_attention_without_a_place_for_prompts(name: str, reason: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name)
    refused(model, UnsupportedArchitectureError, reason)
    with pytest.raises(UnsupportedArchitectureError, match="location='pad'"):
        inject_prompts(model, 2)


def test_torchvision_is_told_apart_from_timm() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 1, 1, 8, 8)
    refused(model, UnsupportedArchitectureError, "found no attention over image tokens")


def test_a_block_that_changes_its_keys_is_caught_by_the_self_check() -> None:
    pytest.importorskip("timm")
    from timm.layers import Attention

    class Sharper(Attention):
        def forward(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
            b, n, _ = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            x = nn.functional.scaled_dot_product_attention(q, 1.1 * k, v)
            return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    class Silent(Attention):
        def forward(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
            return self.proj(x)

    model = build("timm/cls")
    model.blocks[2].attn.__class__ = Sharper
    refused(model, UnsupportedArchitectureError, "the keys that norm and projections give are not")
    model.blocks[2].attn.__class__ = Silent
    refused(model, UnsupportedArchitectureError, "met 0 softmaxes")


def test_the_guard_raises_where_a_later_forward_meets_no_softmax() -> None:
    model = inject_prompts(build("transformers/vit"), 2)
    model(image())
    from transformers import AttentionInterface

    def nothing(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        return v.transpose(1, 2).contiguous(), None

    AttentionInterface.register("nothing", nothing)
    model.vit.layers[1].attention.config._attn_implementation = "nothing"
    with pytest.raises(
        UnsupportedArchitectureError, match="no softmax was met inside ViTAttention"
    ):
        model(image())


def test_prompted_wrapped_compiled_scripted_and_empty_models() -> None:
    model = inject_prompts(build("timm/cls"), 2)
    refused(model, AlreadyPromptedError, "carries prompts already (at 'prompts')")
    outer = nn.Module()
    outer.vit = model
    refused(outer, AlreadyPromptedError, "carries prompts already (at 'vit.prompts')")
    refused(model.blocks, AlreadyPromptedError, "carries prompts already (at '0.attn')")
    bare = build("timm/cls")
    refused(nn.DataParallel(bare), UnsupportedArchitectureError, "wrapped or compiled already")
    refused(torch.compile(bare, backend="eager"), UnsupportedArchitectureError, "compiled already")
    bare.compile(backend="eager")
    refused(bare, UnsupportedArchitectureError, "wrapped or compiled already")
    script = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    refused(script, UnsupportedArchitectureError, "wrapped or compiled already")
    refused(nn.Identity(), UnsupportedArchitectureError, "has no parameters")
    refused("resnet", UnsupportedArchitectureError, "needs a torch.nn.Module, got str")  # type: ignore[arg-type]


def test_distributed_wrapper() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(build("timm/cls"))
        refused(wrapped, UnsupportedArchitectureError, "Inject into the bare model first")
    finally:
        dist.destroy_process_group()


def test_an_attribute_called_prompts() -> None:
    model = build("timm/cls")
    model.prompts = ["a photo of a"]
    refused(model, UnsupportedArchitectureError, "has an attribute prompts of its own")


def test_several_encoders() -> None:
    outer = nn.Module()
    outer.left, outer.right = build("timm/cls"), build("timm/gap")
    refused(
        outer,
        UnsupportedArchitectureError,
        "holds several encoders: 'left', 'right'. Pass the one to prompt, "
        "inject_prompts(model.left) or inject_prompts(model.right)",
    )


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_two_tower_model_and_its_vision_tower(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    vision = sizes | {"image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(
        text_config=sizes | {"vocab_size": 99}, vision_config=vision, projection_dim=8
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    refused(
        model, UnsupportedArchitectureError, "holds several encoders: 'text_model', 'vision_model'"
    )
    pixels = image(dtype=torch.float32)
    before = logits(model.vision_model(pixels))
    inject_prompts(model.vision_model, 3)
    assert model.text_model.encoder.layers[0].mlp.fc1.weight.requires_grad
    assert not torch.equal(logits(model.vision_model(pixels)), before)
    remove_prompts(model.vision_model)
    assert torch.equal(logits(model.vision_model(pixels)), before)


def test_verbs_on_bare_models() -> None:
    model = build("timm/cls")
    assert not is_prompted(model)
    for verb in ("remove_prompts", "disable_prompts"):
        import peft_vpt

        with pytest.raises(
            NotPromptedError, match=rf"{verb}: VisionTransformer carries no prompts"
        ):
            getattr(peft_vpt, verb)(model)


def test_spec_values() -> None:
    spec = PromptSpec(length=4, layers=[0, 2], deep=False)  # type: ignore[arg-type]
    assert spec.layers == (0, 2)
    assert spec.spans(12) == [(0, 1), (2, 11)]
    assert PromptSpec().spans(3) == [(0, 0), (1, 1), (2, 2)]
    assert PromptSpec(deep=False).spans(3) == [(0, 2)]
    assert PromptSpec(layers=range(9, 12)).spans(12) == [(9, 9), (10, 10), (11, 11)]  # type: ignore[arg-type]
    assert PromptSpec(deep=False).resolve(3).dropout == 0.0
    assert PromptSpec().resolve(3).dropout == 0.1
    assert PromptSpec.from_dict(spec.to_dict()) == spec
    assert PromptSpec.from_dict({"length": 3}) == PromptSpec(length=3)
    with pytest.raises(SpecError, match="does not know reach, size"):
        PromptSpec.from_dict({"length": 3, "size": 2, "reach": 1})
