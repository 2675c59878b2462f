"""What a backbone's fingerprint tells apart, what it forgives, and what it cannot see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import build, image, logits

from peft_vpt import inject_prompts, is_prompted, load_task_adapter, save_task_adapter
from peft_vpt.backbones.anatomy import Encoder
from peft_vpt.backbones.find import encoder_for
from peft_vpt.backbones.fingerprint import compare, fingerprint
from peft_vpt.backbones.projection import join
from peft_vpt.errors import AdapterMismatchError

FAMILIES = ("timm/cls", "transformers/dinov2", "swin")
Change = Callable[[nn.Module, Encoder], Any]


def swin(seed: int = 0) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(seed)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16,
        depths=(1, 1, 2), num_heads=(1, 2, 4), num_classes=5,
    )  # fmt: skip
    return perturbed(model, seed)


def perturbed(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make(family: str, seed: int = 0) -> nn.Module:
    return swin(seed) if family == "swin" else build(family, torch.float32, seed)


def blocks(model: nn.Module, encoder: Encoder) -> list[nn.Module]:
    return [model.get_submodule(block.path) for block in encoder.blocks]


def rows(model: nn.Module, encoder: Encoder, block: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of the rows of queries, keys and values."""
    attention = encoder.blocks[block].attentions[0]
    path = join(encoder.blocks[block].path, attention.path)
    return attention.projection.rows(model.get_submodule(path))


def noise(parameters: Any, size: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        scale = size * parameter.square().mean().sqrt()
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def exchange(one: Tensor, other: Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def matrices(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.dim() == 2]


def vectors(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.dim() < 2]


def first_norm(block: nn.Module) -> Any:
    return next(m for m in block.modules() if isinstance(m, nn.LayerNorm))


def final_norm(model: nn.Module, encoder: Encoder) -> Any:
    assert encoder.norm_weights is not None
    return model.get_submodule(encoder.norm_weights)


def merge_low_rank(weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, 2, generator=generator).to(weight) for n in weight.shape)
    weight.add_(0.1 * weight.std() * (a @ b.t()))


def set_one(weight: Tensor) -> None:
    weight[0, 0] = 10 * weight.abs().max()


# What somebody may have done to a backbone; the sizes stand in docs/adapter-format.md.
CHANGES: dict[str, Change] = {
    "fine-tuned, 0.1 % of every weight's size": lambda m, e: noise(m.parameters()),
    "last block fine-tuned, 0.1 %": lambda m, e: noise(blocks(m, e)[-1].parameters()),
    "biases and norms of one block fine-tuned, 0.5 %": lambda m, e: noise(
        vectors(blocks(m, e)[1]), 5e-3
    ),
    "one norm scaled by 1.01": lambda m, e: first_norm(blocks(m, e)[0]).weight.mul_(1.01),
    "one norm's bias scaled by 1.01": lambda m, e: first_norm(blocks(m, e)[0]).bias.mul_(1.01),
    "the final norm scaled by 1.01": lambda m, e: final_norm(m, e).weight.mul_(1.01),
    "q and k of one block exchanged": lambda m, e: exchange(*rows(m, e)[:2]),
    "k and v of one block exchanged": lambda m, e: exchange(*rows(m, e)[1:]),
    "keys of one block scaled by 1.01": lambda m, e: rows(m, e)[1].mul_(1.01),
    "one matrix scaled by 1.01": lambda m, e: matrices(blocks(m, e)[1])[-1].mul_(1.01),
    "one matrix pruned by half": lambda m, e: matrices(blocks(m, e)[1])[-1][::2].zero_(),
    "two weights of the last blocks exchanged": lambda m, e: exchange(
        matrices(blocks(m, e)[-1])[-1], matrices(blocks(m, e)[-2])[-1]
    ),
    "a low-rank update merged into one matrix": lambda m, e: merge_low_rank(
        matrices(blocks(m, e)[1])[-1]
    ),
    "one weight set to ten times the largest": lambda m, e: set_one(matrices(blocks(m, e)[1])[-1]),
    "one bias removed": lambda m, e: vectors(blocks(m, e)[1])[-1].zero_(),
}
SWIN_CHANGES: dict[str, Change] = {
    "one merging's norm scaled by 1.01": lambda m, e: m.layers[1].downsample.norm.weight.mul_(1.01),
    "one merging's bias scaled by 1.01": lambda m, e: m.layers[2].downsample.norm.bias.mul_(1.01),
    "one merging's reduction drawn anew": lambda m, e: nn.init.normal_(
        m.layers[1].downsample.reduction.weight
    ),
}
# What the fingerprint does not see, as the docs say.
BLIND: dict[str, Change] = {
    "signs of one matrix flipped": lambda m, e: matrices(blocks(m, e)[1])[-1].neg_(),
    "rows of one matrix reversed": lambda m, e: matrices(blocks(m, e)[1])[-1].copy_(
        matrices(blocks(m, e)[1])[-1].flip(0)
    ),
    "epsilon of a norm": lambda m, e: setattr(first_norm(blocks(m, e)[1]), "eps", 1e-2),
    "patch embedding": lambda m, e: noise(
        next(c for c in m.modules() if isinstance(c, nn.Conv2d)).parameters(), 0.5
    ),
}


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = inject_prompts(make(family).to(dtype), 2)
    save_task_adapter(model, folder)
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_changes_are_told(family: str, change: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    other = make(family)
    with torch.no_grad():
        CHANGES[change](other, encoder_for(other, "prepend"))
    with pytest.raises(AdapterMismatchError, match="has others") as caught:
        load_task_adapter(other, tmp_path)
    assert "strict=False" in str(caught.value)
    assert not is_prompted(other)


@pytest.mark.parametrize("change", SWIN_CHANGES)
def test_changes_between_the_blocks_are_told(change: str, tmp_path: Path) -> None:
    saved("swin", tmp_path)
    other = make("swin")
    with torch.no_grad():
        SWIN_CHANGES[change](other, encoder_for(other, "prepend"))
    with pytest.raises(AdapterMismatchError, match="the rest of the encoder"):
        load_task_adapter(other, tmp_path)


# What stands around the blocks, under names that embeddings and heads have too.
AROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "patch_embed.backbone.": ("vit_tiny_r_s16_p8_224", {"depth": 1}),
    "patch_embeds.1.": ("twins_pcpvt_small", {"depths": (1, 1, 1, 1)}),
    "patch_embed2.": ("visformer_tiny", {"depth": (1, 1, 1)}),
    "head.pre_logits.": ("maxvit_tiny_tf_224", {"depths": (1, 1, 1, 1)}),
    "norm_pre.": ("vit_tiny_patch16_224", {"depth": 1, "pre_norm": True}),
}


@pytest.mark.parametrize("path", AROUND)
def test_layers_around_the_blocks_are_weights_of_the_backbone(path: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    name, options = AROUND[path]
    model = timm.create_model(name, num_classes=3, **options).eval()
    own = encoder_for(model, "prepend")
    saved_one, other = fingerprint(model, own), copy.deepcopy(model)
    assert saved_one is not None
    other.reset_classifier(5)
    assert compare(saved_one, other, own).same
    with torch.no_grad():
        noise([p for n, p in other.named_parameters() if n.startswith(path)], 0.05)
    found = compare(saved_one, other, own)
    assert not found.same
    assert found.place == "the rest of the encoder"


def test_a_norm_that_only_one_side_has_is_told(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", depth=1)
    normed = timm.create_model("vit_tiny_patch16_224", depth=1, pre_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    save_task_adapter(inject_prompts(plain, 2), tmp_path)
    with pytest.raises(
        AdapterMismatchError, match=r"has others .*layers around the blocks, which one side lacks"
    ):
        load_task_adapter(normed, tmp_path)


FINAL_NORMS = {
    "CvtForImageClassification": "layernorm",
    "Data2VecVisionForImageClassification": "data2vec_vision.pooler.layernorm",
    "HieraForImageClassification": "hiera.pooler.layernorm",
    "VideoMAEForVideoClassification": "fc_norm",
    "Aimv2VisionModel": "rms_norm",
}


@pytest.mark.parametrize("name", FINAL_NORMS)
def test_the_final_norm_is_found_wherever_a_model_has_it(name: str) -> None:
    pytest.importorskip("transformers")
    from matrix import small_transformers

    model, _ = small_transformers.build(name)
    own = encoder_for(model, "prepend")
    assert own.norm_weights == FINAL_NORMS[name]
    saved_one = fingerprint(model, own)
    assert saved_one is not None
    with torch.no_grad():
        final_norm(model, own).weight.mul_(1.01)
    assert compare(saved_one, model, own).place == "the final norm"


# Sizes of images whose tables of positions inside the blocks differ.
RESIZED = {
    "beit_base_patch16_224": (32, 48, {"depth": 1, "embed_dim": 24, "num_heads": 2}),
    "mvitv2_tiny": (64, 96, {}),
    "maxvit_rmlp_pico_rw_256": (64, 64, {}),
    "coatnet_0_rw_224": (64, 96, {"depths": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (64, 128, {"depths": (1, 1), "window_size": None}),
}


@pytest.mark.parametrize("name", RESIZED)
def test_another_input_size_is_no_other_backbone(name: str) -> None:
    timm = pytest.importorskip("timm")
    here, there, options = RESIZED[name]
    window = options.pop("window_size", 0)
    models = []
    for size in (here, there):
        torch.manual_seed(0)
        own = options | ({"window_size": size // 16} if window is None else {})
        models.append(timm.create_model(name, img_size=size, num_classes=3, **own).eval())
    first, second = models
    kept = second.state_dict()
    same = {n: t for n, t in first.state_dict().items() if t.shape == kept[n].shape}
    second.load_state_dict(same, strict=False)
    assert here == there or set(kept) > set(same)
    saved_one = fingerprint(first, encoder_for(first, "prepend"))
    assert saved_one is not None
    assert compare(saved_one, second, encoder_for(second, "prepend")).same


def test_statistics_of_a_convnet_are_weights_too(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    other = copy.deepcopy(model)
    save_task_adapter(inject_prompts(model, 4, location="pad"), tmp_path)
    load_task_adapter(copy.deepcopy(other), tmp_path)
    next(m for m in other.modules() if isinstance(m, nn.BatchNorm2d)).running_var.mul_(1.02)
    with pytest.raises(AdapterMismatchError, match="has others"):
        load_task_adapter(other, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_that_is_not_finite_is_not_taken_for_the_right_one(
    family: str, value: float, tmp_path: Path
) -> None:
    saved(family, tmp_path)
    other = make(family)
    with torch.no_grad():
        final_norm(other, encoder_for(other, "prepend")).weight[0] = value
    with pytest.raises(AdapterMismatchError, match="the final norm holds weights"):
        load_task_adapter(other, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_pretraining_is_told_and_strict_false_warns_the_caller(
    family: str, tmp_path: Path
) -> None:
    model = saved(family, tmp_path)
    other = make(family, seed=1)
    with pytest.raises(AdapterMismatchError, match="has others"):
        load_task_adapter(other, tmp_path)
    with pytest.warns(UserWarning, match="has others") as told:
        load_task_adapter(other, tmp_path, strict=False)
    assert told[0].filename == __file__
    assert torch.equal(other.prompts.stored(0), model.prompts.stored(0))


def test_the_error_names_both_backbones(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    names = ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224.fb_in1k")
    here, there = (timm.create_model(name, depth=1) for name in names)
    save_task_adapter(inject_prompts(here, 2), tmp_path)
    with pytest.raises(AdapterMismatchError) as caught:
        load_task_adapter(there, tmp_path)
    assert all(f"timm/{name}" in str(caught.value) for name in names)


def resize(model: nn.Module) -> None:
    """Let a model take larger images, as its library does it."""
    if hasattr(model, "set_input_size"):
        window = {"window_size": 8} if hasattr(model, "layers") else {}
        model.set_input_size(img_size=128 if window else 64, **window)  # type: ignore[operator]
        return
    positions: Any = model.get_submodule("dinov2.embeddings").position_embeddings
    larger = torch.randn(1, 1 + 4 * (positions.shape[1] - 1), positions.shape[2])
    model.get_submodule("dinov2.embeddings").position_embeddings = nn.Parameter(larger)


HARMLESS: dict[str, Callable[[nn.Module], Any]] = {
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "float16": lambda m: m.half(),
    "train mode, all weights trainable": lambda m: m.train().requires_grad_(),
    "frozen": lambda m: m.requires_grad_(False),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "torch.compile": lambda m: torch.compile(m, backend="eager"),
    "a copy through a state_dict": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "gradient checkpointing": lambda m: (
        m.gradient_checkpointing_enable()
        if hasattr(m, "gradient_checkpointing_enable")
        else m.set_grad_checkpointing()
    ),
    "another patch embedding": lambda m: nn.init.normal_(
        next(c for c in m.modules() if isinstance(c, nn.Conv2d)).weight
    ),
    "another input size": lambda m: resize(m),
    "another head": lambda m: [
        nn.init.normal_(p) for n, p in m.named_parameters() if n.startswith(("head", "classifier"))
    ],
}


def load_in_silence(model: nn.Module, folder: Path, one: nn.Module) -> None:
    """Load what `one` saved, without a warning, and see that it is here, in the model's dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_task_adapter(model, folder)
    for here, there in zip(model.prompts.parameters(), one.prompts.parameters(), strict=True):
        assert torch.equal(here, there.to(here.dtype))


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_differences_are_not(family: str, change: str, tmp_path: Path) -> None:
    one, other = saved(family, tmp_path), make(family)
    with torch.no_grad():
        result = HARMLESS[change](other)
    load_in_silence(result if change == "torch.compile" else other, tmp_path, one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_saved_in_another_precision(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    load_in_silence(make(family), tmp_path, saved(family, tmp_path, dtype))


@pytest.mark.parametrize("here", [torch.float16, torch.float32])
def test_one_weight_on_the_edge_of_two_roundings(here: torch.dtype) -> None:
    # Rounded to bfloat16 it is the lower neighbour, through float16 the tie and so the upper one.
    edge = 1 + 2.0**-7 + 2.0**-8 - 2.0**-13
    one, other = make("timm/cls"), make("timm/cls")
    with torch.no_grad():
        for model in (one, other):
            model.blocks[0].mlp.fc1.weight[0, 0] = edge
    one, other = one.to(here), other.to(torch.float32 if here is torch.float16 else torch.float16)
    first = fingerprint(one, encoder_for(one, "prepend"))
    assert first is not None
    assert compare(first, other, encoder_for(other, "prepend")).same


@pytest.mark.parametrize("family", FAMILIES)
def test_some_blocks_in_float16(family: str) -> None:
    model = make(family)
    encoder = encoder_for(model, "prepend")
    first = fingerprint(model, encoder)
    assert first is not None
    for block in blocks(model, encoder)[1:]:
        block.half()
    assert compare(first, model, encoder).same


@pytest.mark.parametrize("change", BLIND)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_cannot_tell(family: str, change: str) -> None:
    model = make(family)
    encoder = encoder_for(model, "prepend")
    before = fingerprint(model, encoder)
    with torch.no_grad():
        BLIND[change](model, encoder)
    assert before is not None
    assert compare(before, model, encoder).difference < 1e-12


def test_swin_and_dinov2_across_the_libraries() -> None:
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 2], num_heads=[1, 2, 4],
        window_size=4, num_labels=5,
    )  # fmt: skip
    assert timm is not None
    pairs = [
        (swin(), transformers.SwinForImageClassification(config)),
        (
            build("timm/cls", torch.float32, init_values=0.1),
            build("transformers/dinov2", torch.float32, mlp_ratio=4),
        ),
        (build("timm/cls", torch.float32), build("transformers/vit", torch.float32,
                                                 intermediate_size=128)),
    ]  # fmt: skip
    for source, port in pairs:
        theirs, ours = encoder_for(source, "prepend"), encoder_for(port, "prepend")
        with torch.no_grad():
            for one, other in zip(blocks(source, theirs), blocks(port, ours), strict=True):
                fill(other, one)
            norm = final_norm(source, theirs).state_dict()
            final_norm(port, ours).load_state_dict(norm)
            for stage in (1, 2) if hasattr(port, "swin") else ():
                merging = source.layers[stage].downsample.state_dict()
                port.swin.encoder.layers[stage - 1].downsample.load_state_dict(merging)
        first = fingerprint(source, theirs)
        assert first is not None
        assert compare(first, port, ours).same
        assert compare(first, port, ours).allowed < 1e-5


def fill(port: nn.Module, source: nn.Module) -> None:
    """Copy a timm block into its transformers twin: same tensors in the same order, fused split."""
    values: list[Tensor] = []
    for name, value in source.named_parameters():
        values += value.chunk(3) if ".qkv." in name else [value]
    for parameter in port.parameters():
        place = next(i for i, v in enumerate(values) if v.shape == parameter.shape)
        parameter.copy_(values.pop(place))
    assert not values


class Quantized(nn.Module):
    """A layer that keeps its weight in 8 bits, with one scale per row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1) / 127
        rounded = (layer.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.weight.SCB = scale * 127
        self.bias = layer.bias

    def forward(self, hidden: Tensor) -> Tensor:
        scale = getattr(self.weight, "SCB")  # noqa: B009
        weight = self.weight.float() * (scale[:, None] / 127)
        return nn.functional.linear(hidden, weight, self.bias)


def quantize(model: nn.Module) -> nn.Module:
    """Put 8-bit layers into the blocks, in the layout of bitsandbytes."""
    for block in blocks(model, encoder_for(model, "prepend")):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Quantized(child))
    return model


def dynamic(model: nn.Module) -> nn.Module:
    for block in blocks(model, encoder_for(model, "prepend")):
        torch.ao.quantization.quantize_dynamic(block, {nn.Linear}, torch.qint8, inplace=True)
    return model


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("quantizer", [quantize, dynamic])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_quantized_backbone_is_compared_dequantized_with_a_warning(
    family: str, quantizer: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    source = saved(family, tmp_path)
    other = quantizer(make(family))
    with pytest.warns(UserWarning, match="as far as quantized weights can be compared"):
        load_task_adapter(other, tmp_path)
    pixels = image(dtype=torch.float32)
    with torch.no_grad():
        there, here = logits(source.eval()(pixels)), logits(other.eval()(pixels))
    # 8 bits move an output of this size by less than a tenth of its own spread.
    assert (there - here).abs().max() < 0.1 * there.std()
    with pytest.raises(AdapterMismatchError, match="has others"):
        load_task_adapter(quantizer(make(family, seed=1)), tmp_path)


def test_a_layer_that_does_not_show_its_weights_is_not_compared(tmp_path: Path) -> None:
    saved("timm/cls", tmp_path)
    other = make("timm/cls")
    other.blocks[1].mlp.fc1.weight = nn.Parameter(
        torch.zeros(1, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(AdapterMismatchError, match=r"mlp\.fc1 \(Linear\)"):
        load_task_adapter(other, tmp_path)
