"""Transfer protocols: what trains, how many parameters that is, files, removal, modes."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import timm_to_transformers
from test_fingerprint import swin
from test_segmentation import whole
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import TinyFeatures, build, image, logits, perturb

from peft_vpt import (
    apply_protocol,
    count_parameters,
    disable_prompts,
    is_prompted,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt.adapter.file import read_adapter
from peft_vpt.errors import (
    AdapterError,
    AdapterMismatchError,
    AlreadyPromptedError,
    SpecError,
    UnsupportedArchitectureError,
    VPTError,
)
from peft_vpt.segmentation import apply_to_encoder

Options = dict[str, Any]
PROTOCOLS: dict[str, Options] = {
    "linear": {},
    "full": {"keep_original": True},
    "partial-1": {},
    "partial-2": {},
    "mlp-3": {},
    "sidetune": {},
    "bias": {},
    "adapter": {"reduction": 4},
    "vpt-shallow": {"length": 3},
    "vpt-deep": {"length": 3},
    "vpt+bias": {"length": 3},
    "cls": {},
    "prompt-fixed": {"length": 3},
}


def resnet() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return perturb(model).eval()


def hf_convnext() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 2], num_labels=5, image_size=32
    )
    return perturb(transformers.ConvNextForImageClassification(config).double()).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm/cls": lambda: build("timm/cls"),
    "transformers/vit": lambda: build("transformers/vit"),
    "transformers/dinov2": lambda: build("transformers/dinov2"),
    "swin": lambda: swin().double(),
    "resnet": resnet,
    "convnext": hf_convnext,
}
CONVNETS = ("resnet", "convnext")
REFUSED = {
    ("swin", "cls"): "no CLS token",
    ("resnet", "cls"): "no CLS token",
    ("convnext", "cls"): "no CLS token",
    ("resnet", "adapter"): "no transformer blocks",
    ("convnext", "adapter"): "no transformer blocks",
}


def pixels(name: str, seed: int = 0, protocol: str = "") -> Tensor:
    size = 64 if name == "swin" else 32
    if name in CONVNETS and ("vpt" in protocol or "prompt" in protocol):
        size = {"resnet": 176, "convnext": 32}[name]
    return image(3, size=size, seed=seed)


def options_for(name: str, protocol: str) -> Options:
    options = PROTOCOLS[protocol]
    if protocol == "sidetune":
        options = {"features": TinyFeatures().double()}
    if name in CONVNETS and (protocol.startswith("vpt") or protocol == "prompt-fixed"):
        return {"length": 4}
    return options


def apply(name: str, protocol: str, num_classes: int | None = 4) -> nn.Module:
    torch.manual_seed(1)
    options = options_for(name, protocol)
    return apply_protocol(MODELS[name](), protocol, num_classes=num_classes, **options)


def test_a_hidden_layer_of_an_mlp_head_is_relu_norm_and_dropout() -> None:
    head = apply("timm/cls", "mlp-3").train().head
    *hidden, last = (layer for layer in head if isinstance(layer, nn.Linear))
    features = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    found = head(features)
    torch.manual_seed(0)
    for layer in hidden:
        features = torch.relu(layer(features))
        features = features - features.mean(0)
        features = features / (features.square().mean(0) + 1e-5).sqrt()
        features = nn.functional.dropout(features, 0.1)
    # Double precision, in another order of sums.
    torch.testing.assert_close(found, last(features), rtol=1e-10, atol=1e-10)


def train_a_little(model: nn.Module, name: str, steps: int = 2, protocol: str = "") -> None:
    optimizer = torch.optim.SGD(list(trainable_parameters(model).values()), lr=0.05)
    model.train()
    for step in range(steps):
        out = logits(model(pixels(name, step, protocol)))
        (out.square().sum() + out.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def pairs(refused: bool = False) -> list[Any]:
    found = [(m, p) for m in MODELS for p in PROTOCOLS]
    return [pair for pair in found if (pair in REFUSED) == refused]


@pytest.mark.parametrize(("name", "protocol"), pairs())
def test_train_save_load_remove(name: str, protocol: str, tmp_path: Path) -> None:
    bare = MODELS[name]()
    x = pixels(name, 0, protocol)
    before, bare_out = state(bare), logits(bare(x))
    flags = {n: p.requires_grad for n, p in bare.named_parameters()}
    model = apply(name, protocol)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    kept = {n: p.detach().clone() for n, p in frozen.items()}
    moving = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    train_a_little(model, name, protocol=protocol)
    assert all(torch.equal(p, kept[n]) for n, p in frozen.items())
    # Keys have no bias that acts: softmax does not see what is added to all keys alike.
    still = [n for n, p in trainable_parameters(model).items() if torch.equal(p, moving[n])]
    assert all(re.search(r"(k_proj|key)\.bias|k_bias", n) for n in still)

    path = save_task_adapter(model, tmp_path, labels=["a", "b", "c", "d"])
    if protocol == "sidetune":
        with pytest.raises(AdapterMismatchError, match=r"first call apply_protocol\(model, 'side"):
            load_task_adapter(MODELS[name](), path)
    else:
        again = load_task_adapter(MODELS[name](), path)
        assert torch.equal(logits(again(x)), logits(model(x)))
        assert set(trainable_parameters(again)) == set(trainable_parameters(model))
        assert save_task_adapter(again, tmp_path / "again").read_bytes() == path.read_bytes()
    remove_prompts(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(logits(model(x)), bare_out)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not is_prompted(model)


@pytest.mark.parametrize(("name", "protocol"), pairs(refused=True))
def test_where_a_protocol_has_no_place(name: str, protocol: str) -> None:
    model = MODELS[name]()
    before = state(model)
    with pytest.raises(UnsupportedArchitectureError, match=REFUSED[name, protocol]):
        apply_protocol(model, protocol, num_classes=4, **PROTOCOLS[protocol])
    assert list(model.state_dict()) == list(before)
    assert not hasattr(model, "prompts")


@pytest.mark.parametrize("protocol", ["linear", "bias", "adapter", "cls", "full", "partial-2"])
@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
def test_nothing_changes_before_training(name: str, protocol: str) -> None:
    model = apply(name, protocol, num_classes=None)
    assert torch.equal(logits(model(pixels(name))), logits(MODELS[name]()(pixels(name))))


@pytest.mark.parametrize("protocol", ["bias", "adapter", "partial-1", "cls", "linear", "vpt+bias"])
def test_files_cross_from_timm_to_transformers_and_back(protocol: str, tmp_path: Path) -> None:
    ours = apply("timm/cls", protocol)
    train_a_little(ours, "timm/cls")
    save_task_adapter(ours, tmp_path / "timm")
    port = build("transformers/vit", layer_norm_eps=1e-6, intermediate_size=128)
    port.load_state_dict(timm_to_transformers(build("timm/cls").state_dict()))
    load_task_adapter(port, tmp_path / "timm")
    # Other kernels for the same sums in float64.
    x = pixels("timm/cls")
    torch.testing.assert_close(logits(port(x)), logits(ours(x)), rtol=1e-9, atol=1e-10)
    save_task_adapter(port, tmp_path / "back")
    back = load_task_adapter(build("timm/cls"), tmp_path / "back")
    assert torch.equal(logits(back(x)), logits(ours(x)))


def vit_b() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_base_patch16_224", num_classes=0)


def swin_b() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("swin_base_patch4_window7_224", num_classes=0)


HEAD = r"head\..*"
FFN_B, D_B = 3072, 768
VIT_B_BIAS = 12 * (3 * D_B + D_B + FFN_B + D_B + 2 * D_B) + D_B + D_B
SWIN = [(128, 2), (256, 2), (512, 18), (1024, 2)]
SWIN_BLOCK = {w: 12 * w * w + 13 * w + 169 * (w // 32) for w, _ in SWIN}
SWIN_BIAS = sum(n * 11 * w for w, n in SWIN) + 2 * 128 + 256 * 2 + 512 * 2 + 1024 * 2 + 1024
COUNTS: dict[str, tuple[Options, str, int, str, int]] = {
    "linear": ({}, r"$^", 0, r"$^", 0),
    "partial-1": (
        {}, r"(blocks\.11|norm)\..*", 12 * D_B * D_B + 13 * D_B + 2 * D_B,
        r"(layers\.3\.blocks\.1|norm)\..*", SWIN_BLOCK[1024] + 2 * 1024,
    ),
    "partial-4": (
        {}, r"(blocks\.(8|9|10|11)|norm)\..*", 4 * (12 * D_B * D_B + 13 * D_B) + 2 * D_B,
        r"(layers\.3|layers\.2\.blocks\.1[67]|norm)\..*",
        2 * SWIN_BLOCK[512] + 2 * SWIN_BLOCK[1024] + 4 * 512 * 1024 + 2 * 2048 + 2 * 1024,
    ),
    "bias": ({}, r".*\.bias", VIT_B_BIAS, r".*\.bias", SWIN_BIAS),
    "adapter": (
        {"reduction": 64}, r"prompts\.delta\..*", 12 * (2 * D_B * 12 + 12 + D_B),
        r"prompts\.delta\..*", sum(n * (2 * w * (w // 64) + w // 64 + w) for w, n in SWIN),
    ),
    "vpt-shallow": ({"length": 50}, r"prompts\.0", 50 * D_B, r"prompts\.0", 50 * 128),
    "vpt-deep": (
        {"length": 50}, r"prompts\.\d+", 12 * 50 * D_B,
        r"prompts\.\d+", 50 * sum(n * w for w, n in SWIN),
    ),
    "vpt+bias": (
        {"length": 5}, r"prompts\.\d+|.*\.bias", 12 * 5 * D_B + VIT_B_BIAS,
        r"prompts\.\d+|.*\.bias", 5 * sum(n * w for w, n in SWIN) + SWIN_BIAS,
    ),
    "prompt-fixed": ({"length": 5}, r"$^", 0, r"$^", 0),
    "cls": ({}, r"cls_token", D_B, "", 0),
    "sidetune": (
        {}, r"prompts\.delta\.side\..*", 2_469_696 + 9216 * D_B + 1,
        r"prompts\.delta\.side\..*", 2_469_696 + 9216 * 1024 + 1,
    ),
    "full": ({"keep_original": True}, r"(?!head).*", 85_798_656, r"(?!head).*", 86_743_224),
    "mlp-3": ({}, r"$^", 2 * (D_B * D_B + 3 * D_B), r"$^", 2 * (1024 * 1024 + 3 * 1024)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("protocol", COUNTS)
def test_names_and_counts_of_vit_b_and_swin_b(protocol: str) -> None:
    options, vit_names, vit_count, swin_names, swin_count = COUNTS[protocol]
    classes = 37
    found = [(vit_b, vit_names, vit_count, 768)]
    if swin_names:
        found.append((swin_b, swin_names, swin_count, 1024))
    for make, names, count, width in found:
        model = make()
        everything = [n for n, _ in model.named_parameters()]
        apply_protocol(model, protocol, num_classes=classes, **options)
        head = (width + 1) * classes
        trains = trainable_parameters(model)
        assert count_parameters(model).trainable == count + head
        rest = {n for n in trains if not re.fullmatch(r"head(\.fc)?\..*", n)}
        assert {n for n in rest if re.fullmatch(names, n)} == rest
        assert {n for n in everything if re.fullmatch(names, n)} <= rest


def test_backbone_dropout_and_statistics_move_only_with_what_trains_as_a_whole() -> None:
    model = apply("resnet", "bias")
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert any(norm.bias.requires_grad for norm in norms)
    means = [norm.running_mean.clone() for norm in norms]
    train_a_little(model, "resnet")
    assert all(torch.equal(n.running_mean, m) for n, m in zip(norms, means, strict=True))

    model = apply("resnet", "partial-1").train()
    modes = {n: m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n.startswith("layer4") for n, on in modes.items() if on} == {True}
    assert not any(on for n, on in modes.items() if not n.startswith("layer4"))

    full = apply_protocol(build("timm/cls", proj_drop_rate=0.5), "full", num_classes=4).train()
    drops = [m for m in full.modules() if isinstance(m, nn.Dropout)]
    assert drops
    assert all(drop.training for drop in drops)
    bias = apply_protocol(build("timm/cls", proj_drop_rate=0.5), "bias", num_classes=4).train()
    assert not any(m.training for m in bias.modules() if isinstance(m, nn.Dropout))


def test_statistics_of_a_partly_trained_convnet_are_saved_and_put_back(tmp_path: Path) -> None:
    model = apply("resnet", "partial-1")
    train_a_little(model, "resnet")
    moved = {n: b.clone() for n, b in model.named_buffers() if "running_" in n}
    original = {n: b for n, b in MODELS["resnet"]().named_buffers() if "running_" in n}
    assert not all(torch.equal(moved[n], original[n]) for n in original)
    save_task_adapter(model, tmp_path)
    again = load_task_adapter(MODELS["resnet"](), tmp_path)
    assert all(torch.equal(again.get_buffer(n), b) for n, b in moved.items())


def test_full_without_the_original_cannot_be_put_back(tmp_path: Path) -> None:
    model = apply_protocol(build("timm/cls"), "full", num_classes=4)
    save_task_adapter(model, tmp_path)
    with pytest.raises(VPTError, match="keep_original=True"):
        remove_prompts(model)
    assert hasattr(model, "prompts")
    other = apply("timm/cls", "vpt-deep")
    save_task_adapter(other, tmp_path / "prompts")
    with pytest.raises(VPTError, match="keep_original=True"):
        load_task_adapter(model, tmp_path / "prompts")


def test_the_file_says_which_backbone_it_came_from_not_what_became_of_it(tmp_path: Path) -> None:
    model = apply("timm/cls", "full")
    train_a_little(model, "timm/cls")
    save_task_adapter(model, tmp_path)
    with pytest.raises(AdapterMismatchError, match="has others"):
        load_task_adapter(build("timm/cls", seed=1), tmp_path)
    # Over a protocol that has moved the weights: they are put back first.
    other = apply("timm/cls", "bias")
    train_a_little(other, "timm/cls", 3)
    load_task_adapter(other, tmp_path)
    x = pixels("timm/cls")
    assert torch.equal(logits(other(x)), logits(model(x)))


@pytest.mark.parametrize("protocol", ["linear", "bias", "adapter", "vpt+bias", "mlp-3", "full"])
def test_over_one_another(protocol: str, tmp_path: Path) -> None:
    x = pixels("timm/cls")
    for first in ("vpt-deep", "adapter", "bias"):
        target = apply("timm/cls", protocol)
        train_a_little(target, "timm/cls")
        path = save_task_adapter(target, tmp_path / first)
        model = apply("timm/cls", first, num_classes=7)
        train_a_little(model, "timm/cls")
        load_task_adapter(model, path)
        assert torch.equal(logits(model(x)), logits(target(x)))
        if protocol != "full":
            remove_prompts(model)
            assert torch.equal(logits(model(x)), logits(MODELS["timm/cls"]()(x)))


def test_copies_and_checkpoints_of_a_model_under_a_protocol() -> None:
    x = pixels("timm/cls")
    for protocol in ("adapter", "sidetune", "vpt+bias"):
        model = apply("timm/cls", protocol)
        train_a_little(model, "timm/cls")
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin(x)), logits(model(x)))
        with torch.no_grad():
            for parameter in model.prompts.parameters():
                parameter.add_(1.0)
        assert not torch.equal(logits(twin(x)), logits(model(x)))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(logits(twin(x)), logits(model(x)))
        remove_prompts(twin)
        assert torch.equal(logits(twin(x)), logits(MODELS["timm/cls"]()(x)))


def test_disabling() -> None:
    x = pixels("timm/cls")
    model = apply("timm/cls", "adapter", num_classes=None)
    train_a_little(model, "timm/cls")
    head = {n: t.clone() for n, t in model.head.state_dict().items()}
    with disable_prompts(model):
        off = logits(model(x))
    bare = MODELS["timm/cls"]()
    bare.head.load_state_dict(head)
    assert torch.equal(off, logits(bare(x)))
    with pytest.raises(VPTError, match="backbone itself"):
        disable_prompts(apply("timm/cls", "bias"))


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
@pytest.mark.parametrize("protocol", ["adapter", "bias", "partial-2"])
def test_gradients_survive_reentrant_checkpointing(name: str, protocol: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = apply(name, protocol).train()
        if checkpointing and name == "timm/cls":
            model.set_grad_checkpointing()
        elif checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model.train()
        logits(model(pixels(name))).square().sum().backward()
        grads.append({n: p.grad for n, p in trainable_parameters(model).items()})
    for key, value in grads[0].items():
        torch.testing.assert_close(grads[1][key], value, rtol=1e-9, atol=1e-12)


def test_what_the_adapter_does_to_a_block() -> None:
    model = apply("timm/cls", "adapter")
    with torch.no_grad():
        for parameter in model.prompts.parameters():
            parameter.normal_(0, 0.1)
    block, part = model.blocks[1], model.prompts.delta.adapters["1"]
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    h = hidden + block.attn(block.norm1(hidden))
    y = nn.functional.linear(nn.functional.gelu(
        nn.functional.linear(block.norm2(h), block.mlp.fc1.weight, block.mlp.fc1.bias)
    ), block.mlp.fc2.weight, block.mlp.fc2.bias)  # fmt: skip
    change = nn.functional.gelu(y @ part.down.weight.T + part.down.bias)
    wanted = h + y + change @ part.up.weight.T + part.up.bias
    torch.testing.assert_close(block(hidden), wanted, rtol=1e-10, atol=1e-12)


def test_sidetune_blends_by_alpha() -> None:
    model = apply("timm/cls", "sidetune")
    x, side = pixels("timm/cls"), model.prompts.delta.side
    with torch.no_grad():
        side.alpha.fill_(0.7)
    seen = []
    model.head.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(x)
    with disable_prompts(model):
        model(x)
    share = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(seen[0], share * seen[1] + (1 - share) * side(x))


class Normed(TinyFeatures):
    """Features with statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(256)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.norm(super().forward(pixels))
        return found


@pytest.mark.parametrize("num_classes", [4, 7])
def test_sidetune_with_own_features_loads_beside_such_features(
    num_classes: int, tmp_path: Path
) -> None:
    """Whether the head is as large as the file's, or the whole has to be made anew."""

    def make(classes: int) -> nn.Module:
        features = Normed().double()
        return apply_protocol(
            MODELS["timm/cls"](), "sidetune", num_classes=classes, features=features
        )

    model, x = make(4), pixels("timm/cls")
    train_a_little(model, "timm/cls")
    path = save_task_adapter(model, tmp_path)
    other = make(num_classes)
    assert load_task_adapter(other, path) is other
    assert torch.equal(logits(other(x)), logits(model(x)))
    remove_prompts(other)
    assert torch.equal(logits(other(x)), logits(MODELS["timm/cls"]()(x)))
    with pytest.raises(AdapterMismatchError, match=r"norm\.bias.* first call apply_protocol"):
        load_task_adapter(apply("timm/cls", "sidetune"), path)


@pytest.mark.parametrize("fails", [False, True])
def test_sidetune_lets_the_images_go(fails: bool) -> None:
    model = apply("timm/cls", "sidetune")
    x = pixels("timm/cls")
    seen = weakref.ref(x)
    if fails:
        model.blocks[1].register_forward_pre_hook(lambda m, args: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError) if fails else nullcontext():
        model(x)
    del x
    gc.collect()
    assert seen() is None


def residual_inside(name: str) -> tuple[nn.Module, Tensor]:
    """Build models whose feed-forward module adds the residual itself."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    if name == "dpt":
        config = transformers.DPTConfig(
            **size, backbone_out_indices=[0, 1, 1, 1], neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=8, is_hybrid=False,
        )  # fmt: skip
        return transformers.DPTModel(config), torch.randn(1, 3, 32, 32)
    if name == "yolos":
        config = transformers.YolosConfig(**size | {"image_size": [32, 32]})
        return transformers.YolosModel(config), torch.randn(1, 3, 32, 32)
    config = transformers.VideoMAEConfig(**size, num_frames=2, num_labels=3)
    model = transformers.VideoMAEForVideoClassification(config)
    return model, torch.randn(1, 2, 3, 32, 32)


@pytest.mark.parametrize("name", ["dpt", "yolos", "videomae"])
def test_the_adapter_stands_in_front_of_the_residual_sum(name: str) -> None:
    model, x = residual_inside(name)
    apply_protocol(model.eval(), "adapter", reduction=4)
    outputs = [
        m
        for m in model.modules()
        if type(m).__name__.endswith("Output") and "Self" not in type(m).__name__
    ]
    found: list[Tensor] = []
    for part in model.prompts.delta.adapters.values():
        part.down.register_forward_pre_hook(lambda m, args: found.append(args[0]))
    with torch.no_grad():
        for output in outputs:
            for parameter in output.dense.parameters():
                parameter.zero_()
        model(x)
    assert len(found) == 2
    # Nothing of what the block hands on beside its feed-forward layer.
    assert not any(hidden.any() for hidden in found)


@pytest.mark.parametrize("protocol", ["linear", "bias", "partial-1", "full"])
def test_the_norm_of_a_model_that_pools_first_stands_behind_the_pooling(
    protocol: str, tmp_path: Path
) -> None:
    def make() -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        return residual_inside("videomae")

    model, x = make()
    assert model.videomae.layernorm is None
    apply_protocol(model.eval(), protocol)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = save_task_adapter(model, tmp_path)
    assert any(read_adapter(path).metadata["backbone"]["fingerprint"]["norm"])
    assert ("fc_norm.bias" in trainable_parameters(model)) == (protocol != "linear")
    assert ("delta.norm.bias" in read_adapter(path).tensors) == (protocol != "linear")
    again = load_task_adapter(make()[0].eval(), path)
    assert torch.equal(logits(again(x)), logits(model(x)))


def test_stages_of_a_resnet_are_those_with_weights() -> None:
    timm = pytest.importorskip("timm")
    model = apply_protocol(timm.create_model("resnet18", num_classes=3), "partial-4")
    assert {n.split(".")[0] for n in trainable_parameters(model)} == {
        "layer1", "layer2", "layer3", "layer4", "fc",
    }  # fmt: skip
    with pytest.raises(SpecError, match="has 4 stages"):
        apply_protocol(timm.create_model("resnet18", num_classes=3), "partial-5")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("partial", {}, "partial-k"),
        ("partial-0", {}, "partial-k"),
        ("partial-4", {}, "has 3 blocks"),
        ("linear", {"reduction": 8}, "only 'adapter'"),
        ("adapter", {"reduction": 0}, "integer >= 1"),
        ("adapter", {"reduction": True}, "integer >= 1"),
        ("bias", {"keep_original": True}, "only 'full'"),
        ("linear", {"length": 4}, "no options length"),
        ("vpt-deep", {"deep": False}, "the name says"),
        ("vpt-deep", {"lenght": 4}, "no options lenght"),
        ("lora", {}, "must be one of full"),
        ("mlp-2", {"num_classes": 0}, "give their number"),
        (3, {}, "must be one of"),
    ],
)
def test_wrong_options_leave_the_model_alone(name: Any, options: Options, message: str) -> None:
    model = build("timm/cls")
    before = list(model.state_dict())
    with pytest.raises(SpecError, match=message):
        apply_protocol(model, name, **options)
    assert list(model.state_dict()) == before
    assert not hasattr(model, "prompts")


def test_twice_and_wrong_files(tmp_path: Path) -> None:
    model = apply("timm/cls", "linear")
    with pytest.raises(AlreadyPromptedError):
        apply_protocol(model, "bias")
    path = save_task_adapter(apply("timm/cls", "adapter"), tmp_path / "adapter")
    assert read_adapter(path).metadata["protocol"] == {"name": "adapter", "reduction": 4}
    assert read_adapter(path).metadata["spec"] is None
    with pytest.raises(AdapterMismatchError, match="does not fit this model"):
        load_task_adapter(build("timm/parallel-things"), path, strict=False)
    path = save_task_adapter(apply("timm/cls", "mlp-3"), tmp_path / "mlp")
    with pytest.raises(AdapterError, match="nothing else"):
        load_task_adapter(build("timm/cls"), path, strict="prompts")


class CopiesToCpu(TorchFunctionMode):
    """Counts the tensors that are copied to the CPU, wherever they are."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.to and args[1:] == ("cpu",) and bool(kwargs.get("copy"))
        return func(*args, **(kwargs or {}))


def test_what_is_put_back_is_kept_on_the_cpu() -> None:
    model = whole("segformer")
    with CopiesToCpu() as seen:
        apply_to_encoder(model, "linear")
    assert seen.count == len(model.prompts.undo["decoder"]) > 0
    with torch.device("meta"):
        meta = whole("segformer")
    apply_to_encoder(meta, "linear")
    assert all(t.is_meta for t in meta.prompts.undo["decoder"].values())
