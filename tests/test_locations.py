"""The locations beside "prepend", each written out in plain torch, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from test_bad_input import refused, state
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CLASSES, build, image, logits, perturb

from peft_vpt import (
    PromptSpec,
    VPTError,
    count_parameters,
    disable_prompts,
    inject_prompts,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
    trainable_parameters,
)
from peft_vpt.errors import (
    AdapterMismatchError,
    AlreadyPromptedError,
    SpecError,
    UnsupportedArchitectureError,
)

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
VITS = ["timm/cls", "timm/registers", "timm/gap", "transformers/vit", "transformers/dinov2"]
CONVNETS = ["timm/resnet", "timm/convnext", "transformers/resnet", "transformers/convnext"]
TOKENS = {"timm/cls": 17, "timm/registers": 21, "timm/gap": 16}
# One case per location, on a model that it suits.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("timm/cls", {"location": "add", "length": 1}),
    ("transformers/vit", {"location": "add", "length": 17}),
    ("timm/cls", {"location": "prepend-pixel", "length": 3}),
    ("transformers/vit", {"location": "prepend-pixel", "length": 3}),
    ("timm/cls", {"location": "concat-channel", "length": 2}),
    ("transformers/vit", {"location": "concat-channel", "length": 2}),
    ("timm/cls", {"location": "pad", "length": 3}),
    ("transformers/vit", {"location": "pad", "length": 3}),
    ("timm/resnet", {"location": "pad", "length": 3}),
    ("timm/convnext", {"location": "pad", "length": 4}),
    ("transformers/resnet", {"location": "pad", "length": 3}),
]
IDS = [f"{name}-{options['location']}-{options['length']}" for name, options in CASES]


def make(name: str, **changes: Any) -> nn.Module:
    """Build a ViT of the zoo or a small ConvNet, perturbed, in float64."""
    if name not in CONVNETS:
        return build(name, **changes)
    torch.manual_seed(0)
    library, _, kind = name.partition("/")
    package: Any = pytest.importorskip(library)
    if library == "timm":
        overlay = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        model = package.create_model(
            f"test_{kind}", num_classes=CLASSES, pretrained_cfg_overlay=overlay, **changes
        )
    else:
        sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": CLASSES} | changes
        prefix = {"resnet": "ResNet", "convnext": "ConvNext"}[kind]
        extra = {"embedding_size": 16} if kind == "resnet" else {"num_stages": 2}
        config = getattr(package, f"{prefix}Config")(**sizes, **extra, image_size=32)
        model = getattr(package, f"{prefix}ForImageClassification")(config)
    model = perturb(model).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def inject(model: nn.Module, **options: Any) -> nn.Module:
    options = {"dropout": 0.0, "generator": torch.Generator().manual_seed(1)} | options
    return inject_prompts(model, options.pop("length"), **options)


def pixels_for(model: nn.Module, batch: int = 2) -> Tensor:
    """Return images of the size that a prompted model calls for."""
    needed = model.prompts.place.image
    return image(batch, size=32 if needed is None else needed[1])


def leaves_of(model: nn.Module) -> dict[str, Tensor]:
    found = trainable_parameters(model).items()
    return {name: p.detach().clone().requires_grad_() for name, p in found}


def bordered(pixels: Tensor, tb: Tensor, lr: Tensor) -> Tensor:
    """Put a border around images, row by row and column by column."""
    p = lr.shape[2] // 2
    batch, channels, height, width = pixels.shape
    canvas = torch.zeros(batch, channels, height + 2 * p, width + 2 * p, dtype=pixels.dtype)
    canvas[:, :, p : p + height, p : p + width] = pixels
    for i in range(p):
        canvas[:, :, i, :] = tb[:, i]
        canvas[:, :, p + height + i, :] = tb[:, p + i]
        canvas[:, :, p : p + height, i] = lr[:, :, i]
        canvas[:, :, p : p + height, p + width + i] = lr[:, :, p + i]
    return canvas


def patch_conv(bare: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((n, m) for n, m in bare.named_modules() if isinstance(m, nn.Conv2d))


class MoreChannels(nn.Module):
    """A patch convolution of 3 + p inputs, fed with the concatenated image."""

    def __init__(self, conv: nn.Conv2d, channels: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.conv, self.leaves = (conv,), (channels, weight)
        self.weight = conv.weight

    def forward(self, pixels: Tensor) -> Tensor:
        conv, (channels, weight) = self.conv[0], self.leaves
        more = torch.cat([pixels, channels.expand(len(pixels), -1, -1, -1)], dim=1)
        weights = torch.cat([conv.weight, weight], dim=1)
        return F.conv2d(more, weights, conv.bias, conv.stride, conv.padding)


def add_by_hand(bare: nn.Module, pixels: Tensor, prompts: dict[int, Tensor]) -> Tensor:
    stem, blocks, _, norm, head = reference.anatomy(bare)
    tokens = stem(pixels)
    for i, block in enumerate(blocks):
        for j in range(tokens.shape[1]) if i in prompts else ():
            row = torch.zeros_like(tokens)
            row[:, j] = prompts[i][j if len(prompts[i]) > 1 else 0]
            tokens = tokens + row
        out = block(tokens)
        tokens = out[0] if isinstance(out, tuple) else out
    return head(norm(tokens))


def by_hand(location: str, bare: nn.Module, pixels: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """Return the logits of a bare model under a location, from the paper's definition."""
    reference.put_head(bare, leaves)
    prompts = {
        n.removeprefix("prompts.").removeprefix("pixel."): leaf
        for n, leaf in leaves.items()
        if n.startswith("prompts.")
    }
    if location == "add":
        return add_by_hand(bare, pixels, {int(n): leaf for n, leaf in prompts.items()})
    if location == "pad":
        return logits(bare(bordered(pixels, prompts["tb"], prompts["lr"])))
    name, conv = patch_conv(bare)
    if location == "concat-channel":
        owner, _, last = name.rpartition(".")
        more = MoreChannels(conv, prompts["channels"], prompts["weight"])
        setattr(bare.get_submodule(owner), last, more)
        return logits(bare(pixels))
    tokens = F.conv2d(prompts["patches"], conv.weight, conv.bias, conv.stride)
    depth = len(reference.anatomy(bare)[1])
    return reference.predict(bare, pixels, {0: tokens[:, :, 0, 0]}, [(0, depth - 1)])


def compare(name: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Inject, and compare logits and every gradient with the location written out."""
    bare = make(name) if model is None else model
    model = inject(copy.deepcopy(bare), **options).train()
    pixels = pixels_for(model)
    with disable_prompts(model), torch.no_grad():
        plain = None if options["location"] == "pad" else logits(model.eval()(pixels))
    ours = logits(model.train()(pixels))
    leaves = leaves_of(model)
    theirs = by_hand(options["location"], bare, pixels, leaves)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    if plain is not None:
        assert (ours - plain).abs().max() > 1e-4 * plain.abs().max(), "prompts have no effect"
    assert any(n.startswith("prompts.") for n in leaves)
    reference.same_gradients(ours, theirs, trainable_parameters(model), leaves, 1e-9, 1e-10)
    return model


@pytest.mark.parametrize("schedule", [{}, {"deep": False}, {"layers": (0, 2)}], ids=str)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", VITS)
def test_add(name: str, whole: bool, schedule: dict[str, Any]) -> None:
    model = compare(name, location="add", length=TOKENS.get(name, 17) if whole else 1, **schedule)
    entries = model.prompts.spec.layers
    assert [name for name, _ in model.prompts.named_parameters()] == [str(e) for e in entries]


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("name", VITS)
def test_prepend_pixel(name: str, deep: bool) -> None:
    model = compare(name, location="prepend-pixel", length=3, deep=deep)
    assert model.prompts.pixel.patches.shape == (3, 3, 8, 8)
    assert (model.prompts.spec.deep, model.prompts.spec.layers) == (False, (0,))


@pytest.mark.parametrize("name", VITS)
def test_concat_channel(name: str) -> None:
    model = compare(name, location="concat-channel", length=2)
    assert model.prompts.pixel.channels.shape == (2, 32, 32)
    assert model.prompts.pixel.weight.shape == (32, 2, 8, 8)


@pytest.mark.parametrize("name", VITS + CONVNETS)
def test_pad(name: str) -> None:
    p = 4 if name in ("transformers/dinov2", "timm/convnext", "transformers/convnext") else 3
    model = compare(name, location="pad", length=p)
    flexible = name in (*CONVNETS, "transformers/dinov2")
    side = 32 if flexible else 32 - 2 * p
    assert model.prompts.pixel.tb.shape == (3, 2 * p, side + 2 * p)
    assert model.prompts.pixel.lr.shape == (3, side, 2 * p)


def test_pad_of_a_vit_of_any_size() -> None:
    model = compare("timm/dynamic", location="pad", length=4)
    assert model.prompts.place.image == (3, 32, 32)
    border: dict[str, Any] = {"length": 5, "location": "pad"}
    text = "makes an image of 32 x 32 one of 42 x 42, which VisionTransformer cannot take"
    refused(build("timm/dynamic"), SpecError, text, **border)
    refused(build("timm/dynamic"), SpecError, "Lengths that do: 4, 8.", **border)


def test_add_where_the_number_of_tokens_depends_on_the_image() -> None:
    model = inject(build("timm/dynamic"), location="add", length=10)
    with pytest.raises(SpecError, match=r"length must be 1 .* or 17 \(one per token of block 0"):
        model(image())
    model(image(size=24))


def test_published_parameter_count() -> None:
    """Table 5's prompts at p=5 and 224 pixels."""
    timm = pytest.importorskip("timm")
    overlay = {"input_size": (3, 224, 224)}
    model = timm.create_model("test_resnet", num_classes=0, pretrained_cfg_overlay=overlay)
    inject_prompts(model, 5, location="pad")
    assert count_parameters(model).trainable == 13_740


@pytest.mark.parametrize("location", ["pad", "concat-channel", "prepend-pixel"])
def test_first_values(location: str) -> None:
    model = inject(build("timm/cls"), location=location, length=3)
    name, first = next(model.prompts.pixel.named_parameters())
    # U(0, 1) under mean 0.5 and std 0.5.
    first = first.detach()
    assert -1 <= float(first.min()) < -0.9, name
    assert 0.9 < float(first.max()) <= 1, name
    zero = inject(build("timm/cls"), location=location, length=3, init="zeros")
    normal = inject(build("timm/cls"), location=location, length=3, init="normal")
    assert not next(zero.prompts.pixel.parameters()).any()
    assert float(next(normal.prompts.pixel.parameters()).detach().abs().max()) > 2
    if location == "concat-channel":
        bound = (6 / (3 * 64 + 32)) ** 0.5
        assert 0.9 * bound < float(zero.prompts.pixel.weight.abs().max()) <= bound
    values = [torch.randn_like(p) for p in model.prompts.pixel.parameters()]
    given = inject(build("timm/cls"), location=location, length=3, init=values)
    for ours, value in zip(given.prompts.pixel.parameters(), values, strict=True):
        assert torch.equal(ours, value)


def test_first_values_follow_the_models_normalisation() -> None:
    model = inject(make("timm/resnet"), location="pad", length=9)
    tb = model.prompts.pixel.tb.detach()
    for channel, (mean, std) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):
        low, high = (0 - mean) / std, (1 - mean) / std
        assert low <= float(tb[channel].min()) < low + 0.2
        assert high - 0.2 < float(tb[channel].max()) <= high + 1e-6


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_round_trip_and_removal(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    bare = make(name)
    pixels, before, parts = image(), logits(bare(image())), state(bare)
    model = inject(copy.deepcopy(bare), **options, num_classes=4)
    given = pixels_for(model)
    expected = logits(model(given))
    assert expected.shape == (2, 4)
    path = save_task_adapter(model, tmp_path, task="a")
    assert path.read_bytes() == save_task_adapter(model, tmp_path / "b", task="a").read_bytes()
    load_task_adapter(bare, tmp_path)
    torch.testing.assert_close(logits(bare(given)), expected, rtol=0, atol=0)
    assert bare.prompts.spec == model.prompts.spec
    # Onto a model that carries other prompts, and onto one that carries the same.
    if "resnet" not in name and "convnext" not in name:
        other = inject(make(name), location="prepend", length=2, num_classes=3)
        torch.testing.assert_close(
            logits(load_task_adapter(other, tmp_path)(given)), expected, rtol=0, atol=0
        )
    load_task_adapter(bare, tmp_path)
    with disable_prompts(bare):
        assert logits(bare(pixels)).shape == (2, 4)
    remove_prompts(bare)
    after = state(bare)
    assert torch.equal(logits(bare(pixels)), before)
    for key, value in parts.items():
        if not key.startswith("p:"):
            assert after[key] == value, key


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_copies(name: str, options: dict[str, Any]) -> None:
    model = inject(make(name), **options)
    pixels = pixels_for(model)
    expected = logits(model(pixels))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin(pixels)), expected)
        with torch.no_grad():
            for parameter in twin.prompts.parameters():
                parameter.add_(1.0)
        assert not torch.equal(logits(twin(pixels)), expected)
        assert torch.equal(logits(model(pixels)), expected)
        remove_prompts(twin)
        assert not hasattr(twin, "prompts")


def gradients(model: nn.Module, pixels: Tensor, run: Callable[..., Any] | None = None) -> Any:
    model.zero_grad()
    out = logits((model if run is None else run)(pixels))
    out.square().sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in trainable_parameters(model).items()}


# transformers' ResNet cannot checkpoint.
CHECKPOINTED = [i for i, (name, _) in enumerate(CASES) if name != "transformers/resnet"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", CHECKPOINTED, ids=[IDS[i] for i in CHECKPOINTED])
def test_gradient_checkpointing(
    case: int, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = CASES[case]
    model = inject(make(name), **options).train()
    pixels = pixels_for(model)
    expected = gradients(model, pixels)
    if name.startswith("timm/"):
        config = pytest.importorskip("timm.layers.config")
        monkeypatch.setattr(config, "_USE_REENTRANT_CKPT", reentrant)
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, pixels), expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_compile(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = inject(make(name), **options).train()
    pixels = pixels_for(model)
    expected = gradients(model, pixels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(model, pixels, compiled), expected, **TOLERANCE)


@pytest.mark.parametrize("name", CONVNETS)
def test_a_convnet_stays_in_eval_under_train(name: str) -> None:
    model = inject(make(name), location="pad", length=4, num_classes=3).train()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    first = model.prompts.pixel.tb.detach().clone()
    for _ in range(2):
        gradients(model, pixels_for(model))
        optimizer.step()
    assert not torch.equal(first, model.prompts.pixel.tb)
    for name_, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name_]), name_
    for name_, parameter in model.named_parameters():
        if name_ in frozen:
            assert torch.equal(parameter, frozen[name_]), name_
    heads = {n.rpartition(".")[0] for n in trainable_parameters(model) if "pixel" not in n}
    assert len(heads) == 1


@pytest.mark.parametrize("name", CONVNETS)
def test_a_new_head_of_a_convnet(name: str) -> None:
    model = make(name)
    config = getattr(model, "config", None)
    inject(model, location="pad", length=4, num_classes=3)
    counted = model.num_classes if config is None else model.config.num_labels
    assert counted == 3
    assert logits(model(pixels_for(model))).shape == (2, 3)
    remove_prompts(model)
    assert (model.num_classes if config is None else model.num_labels) == CLASSES
    assert getattr(model, "config", None) is config
    assert logits(model(image())).shape == (2, CLASSES)
    inject(model, location="pad", length=4, num_classes=0)
    assert logits(model(pixels_for(model))).shape[0] == 2


@pytest.mark.parametrize("name", ["timm/cls", "timm/resnet", "timm/convnext"])
def test_every_entrance_of_timm_models(name: str) -> None:
    bare = make(name)
    model = inject(copy.deepcopy(bare), location="pad", length=4)
    pixels, pixel = pixels_for(model), model.prompts.pixel
    whole = bordered(pixels, pixel.tb, pixel.lr)
    assert torch.equal(model.forward_features(pixels), bare.forward_features(whole))
    assert torch.equal(model(x=pixels), bare(whole))
    for ours, theirs in (
        (model.forward_intermediates(pixels, indices=1), bare.forward_intermediates(whole, 1)),
        (model.forward_intermediates(x=pixels, indices=1), bare.forward_intermediates(whole, 1)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_keywords_and_inner_models_of_transformers() -> None:
    bare = make("transformers/vit")
    model = inject(copy.deepcopy(bare), location="pad", length=3)
    pixels, pixel = pixels_for(model), model.prompts.pixel
    whole = bordered(pixels, pixel.tb, pixel.lr)
    expected = bare(whole).logits
    assert torch.equal(model(pixel_values=pixels).logits, expected)
    assert torch.equal(model(output_hidden_states=True, pixel_values=pixels).logits, expected)
    inner = model.vit(pixel_values=pixels).last_hidden_state
    assert torch.equal(inner, bare.vit(whole).last_hidden_state)
    loss = model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
    assert loss.requires_grad


def test_hidden_states_under_add_are_the_tokens_in_front_of_the_prompts() -> None:
    bare = make("transformers/vit")
    model = inject(copy.deepcopy(bare), location="add", length=17)
    states = model(image(), output_hidden_states=True).hidden_states
    assert torch.equal(states[0], bare(image(), output_hidden_states=True).hidden_states[0])
    assert all(s.shape == (2, 17, 32) for s in states)


@pytest.mark.parametrize("sharing", ["inter", "intra", "all"])
@pytest.mark.parametrize("project", [None, 7])
def test_add_with_sharing_and_projection(sharing: str, project: int | None) -> None:
    options = {"location": "add", "length": 17, "sharing": sharing, "project": project}
    bare = build("timm/cls")
    model = inject(copy.deepcopy(bare), **options)
    tokens = {i: model.prompts(i, 2)[0] for i in range(3)}
    assert tokens[0].shape == (17, 32)
    torch.testing.assert_close(model(image()), add_by_hand(bare, image(), tokens), **TOLERANCE)
    gradients(model, image())


def test_dropout_of_add_has_one_mask_per_sample() -> None:
    model = inject(build("timm/cls"), location="add", length=1, dropout=0.5).train()
    out = model(image(1).expand(2, -1, -1, -1))
    assert not torch.equal(out[0], out[1])
    assert inject_prompts(build("timm/cls"), 1, location="add").prompts.spec.dropout == 0.1


@pytest.mark.parametrize("pooling", ["cls", "image"])
@pytest.mark.parametrize("location", ["add", "concat-channel", "pad", "prepend-pixel"])
def test_pooling(location: str, pooling: str) -> None:
    model = inject(build("timm/gap-with-cls"), location=location, length=1, pooling=pooling)
    plain = inject(build("timm/gap-with-cls"), location=location, length=1)
    tokens = plain.forward_features(pixels_for(plain))[:, :17]
    pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
    expected = plain.head(plain.fc_norm(pooled))
    torch.testing.assert_close(model(pixels_for(model)), expected, **TOLERANCE)


def test_the_resolved_spec() -> None:
    for location in ("pad", "concat-channel", "prepend-pixel"):
        spec = PromptSpec(location=location).resolve(12)
        layers = (0,) if location == "prepend-pixel" else ()
        assert (spec.deep, spec.layers, spec.dropout) == (False, layers, 0.0)
        assert spec.spans(12) == ([(0, 11)] if layers else [])
        assert PromptSpec.from_dict(spec.to_dict()) == spec == spec.resolve(12)
    assert PromptSpec(location="pad").resolve(0).spans(0) == []
    assert PromptSpec(location="add", deep=False).resolve(12).spans(12) == [(0, 0)]
    spec = PromptSpec(location="add", deep=False, layers=(1, 4)).resolve(12)
    assert spec.spans(12) == [(1, 1), (4, 4)]


def test_fixed_prompts_and_repr() -> None:
    model = inject(build("timm/cls"), location="pad", length=3, train_prompts=False)
    assert list(trainable_parameters(model)) == ["head.weight", "head.bias"]
    assert "location=pad, length=3, images 26 x 26, parameters=1,044" in repr(model.prompts)
    refused(model, AlreadyPromptedError, "carries prompts already", location="pad", length=3)
    outer = nn.Module()
    outer.backbone = build("timm/cls")
    inject_prompts(outer, 3, location="pad")
    refused(outer.backbone, AlreadyPromptedError, "carries prompts", location="pad", length=3)


def test_a_model_inside_another() -> None:
    outer = nn.Module()
    outer.backbone = make("timm/resnet")
    inject(outer, location="pad", length=3)
    names = "backbone.fc.bias backbone.fc.weight prompts.pixel.lr prompts.pixel.tb"
    assert " ".join(sorted(trainable_parameters(outer))) == names
    assert outer.backbone(image()).shape == (2, CLASSES)
    outer.other = make("timm/resnet")
    remove_prompts(outer)
    refused(outer, UnsupportedArchitectureError, "several encoders", location="pad", length=3)


def test_autocast_and_half_precision() -> None:
    for name, options in CASES:
        model = inject(make(name).float(), **options)
        pixels = pixels_for(model).float()
        expected = logits(model(pixels))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = logits(model(pixels))
        torch.testing.assert_close(
            out.float(), expected, rtol=0.3, atol=0.3 * float(expected.abs().max())
        )
        model.to(torch.bfloat16)
        assert all(p.dtype is torch.bfloat16 for p in model.prompts.parameters())
        assert logits(model(pixels.bfloat16())).isfinite().all()


def test_adapters_onto_a_model_on_meta(tmp_path: Path) -> None:
    for name, options in CASES:
        model = inject(make(name), **options)
        save_task_adapter(model, tmp_path)
        bare = make(name).to("meta")
        with pytest.warns(UserWarning, match="on the meta device"):
            load_task_adapter(bare, tmp_path, strict=False)
        for ours, theirs in zip(bare.prompts.parameters(), model.prompts.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    save_task_adapter(inject(build("timm/cls"), location="pad", length=3), tmp_path)
    larger = build("timm/cls", img_size=40)
    before = state(larger)
    with pytest.raises(AdapterMismatchError, match="made for another image size or patch size"):
        load_task_adapter(larger, tmp_path)
    assert state(larger) == before
    inject(larger, location="prepend", length=2)
    with pytest.raises(AdapterMismatchError, match="made for another image size or patch size"):
        load_task_adapter(larger, tmp_path)
    assert larger.prompts.spec.location == "prepend"
    save_task_adapter(inject(build("timm/cls"), location="add", length=17), tmp_path)
    with pytest.raises(AdapterMismatchError, match="or 26"):
        load_task_adapter(larger, tmp_path)
    assert larger.prompts.spec.location == "prepend"
    larger(image(size=40))


def test_an_adapter_of_another_convnet(tmp_path: Path) -> None:
    save_task_adapter(inject(make("timm/resnet"), location="pad", length=3), tmp_path)
    other = make("timm/resnet")
    with torch.no_grad():
        other.layer1[0].conv1.weight.mul_(1.001)
    with pytest.raises(AdapterMismatchError, match="fingerprints differ"):
        load_task_adapter(other, tmp_path)
    with torch.no_grad():
        other.layer1[0].conv1.weight.copy_(make("timm/resnet").layer1[0].conv1.weight)
        other.fc.weight.add_(1.0)
    load_task_adapter(other, tmp_path)


def test_preprocessing_names_the_size_that_pad_calls_for(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    save_task_adapter(inject_prompts(model, 5, location="pad"), tmp_path)
    load_task_adapter(remove_prompts(model), tmp_path)
    assert model.prompts.info["preprocessing"]["size"] == [214, 214]


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit", "timm/resnet"])
def test_wrong_images(name: str) -> None:
    model = inject(make(name), location="pad", length=3)
    side = 32 if name == "timm/resnet" else 26
    for size in (24, 40):
        text = f"got images of {size} x {size}, needs {side} x {side}, which the border makes the"
        with pytest.raises(VPTError, match=text):
            model(image(size=size))
    with pytest.raises(VPTError, match="got images of 1 channels, needs 3; convert them to RGB"):
        model(image(size=side)[:, :1])
    with pytest.raises(VPTError, match=r"needs images \(batch, channels, height, width\)"):
        model(image(size=side)[0])
    model = inject(build("timm/dynamic"), location="concat-channel", length=2)
    with pytest.raises(VPTError, match="got images of 40 x 40, needs 32 x 32"):
        model(image(size=40))


def test_a_border_that_the_patches_leave_out() -> None:
    text = "leave out the last 2 pixels of an image of 34 x 34, and with them the whole border"
    options: dict[str, Any] = {"location": "pad", "length": 1}
    refused(make("timm/convnext"), SpecError, text, **options)
    refused(make("timm/convnext"), SpecError, "Lengths that do: 2.", **options)
    refused(make("transformers/dinov2"), SpecError, "leave out the last 2 pixels", **options)
    with pytest.warns(UserWarning, match="so as many of the border's 3 rows or columns there do"):
        inject_prompts(make("timm/convnext"), 3, location="pad")


def test_a_classifier_that_is_a_convolution(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    small = {"layers": (1, 1, 1, 1), "channels": (128, 128, 128, 128), "stem_chs": 32}
    bare = timm.models.resnetv2.ResNetV2(**small, num_classes=CLASSES).eval()
    assert isinstance(bare.head.fc, nn.Conv2d)
    pixels = image(1, torch.float32, size=224)
    before = bare(pixels)
    model = inject(copy.deepcopy(bare), location="pad", length=5, num_classes=3)
    assert model(pixels).shape == (1, 3)
    save_task_adapter(model, tmp_path)
    load_task_adapter(bare, tmp_path)
    assert torch.equal(bare(pixels), model(pixels))
    assert torch.equal(remove_prompts(bare)(pixels), before)
    inject(bare, location="pad", length=5)
    save_task_adapter(bare, tmp_path)
    load_task_adapter(remove_prompts(bare), tmp_path)


def test_a_model_offloaded_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    for name, options in CASES:
        expected = inject(make(name), **options)
        model = accelerate.cpu_offload(make(name), execution_device=torch.device("cpu"))
        inject(model, **options)
        pixels = pixels_for(model)
        torch.testing.assert_close(logits(model(pixels)), logits(expected(pixels)), **TOLERANCE)


def test_injection_leaves_the_recording_of_hidden_states_alone() -> None:
    fresh = make("transformers/vit")
    model = inject(make("transformers/vit"), location="pad", length=3, init="zeros")
    assert "_output_capturing_hooks_installed" not in vars(model.vit)
    states = model(image(size=26), output_hidden_states=True).hidden_states
    whole = F.pad(image(size=26), (3, 3, 3, 3))
    expected = fresh(whole, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, expected, rtol=0, atol=0)
