"""SETR-PUP over prompted encoders, sliding windows, mean intersection over union."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import SIZE, build, image

from peft_vpt import (
    apply_protocol,
    inject_prompts,
    is_prompted,
    load_task_adapter,
    remove_prompts,
    save_task_adapter,
)
from peft_vpt.adapter.file import read_adapter, write_adapter
from peft_vpt.errors import (
    AdapterError,
    AdapterMismatchError,
    NotPromptedError,
    SpecError,
    UnsupportedArchitectureError,
    VPTError,
)
from peft_vpt.segmentation import (
    IGNORE,
    Confusion,
    PupHead,
    Segmenter,
    apply_to_encoder,
    load_segmenter,
    predict,
    save_segmenter,
    score,
)

NAMES = ("timm/cls", "timm/registers", "transformers/vit", "transformers/dinov2")
PROTOCOLS: dict[str, dict[str, Any]] = {
    "linear": {},
    "bias": {},
    "vpt-deep": {"length": 3},
    "vpt-shallow": {"length": 3},
    "vpt+bias": {"length": 3},
    "full": {},
}


def segmenter(name: str, protocol: str | None, **options: Any) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(build(name), 4, protocol, channels=8, **options).eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_sees_the_image_tokens_and_nothing_else(name: str) -> None:
    model = segmenter(name, "vpt-shallow", length=3, dropout=0.0)
    tokens: list[Tensor] = []
    model.decoder.register_forward_hook(lambda m, args, out: tokens.append(args[0]))
    x = image()
    assert model(x).shape == (2, 4, 32, 32)
    path = model.backbone.prompts.encoder.final_norm
    whole: list[Tensor] = []
    model.backbone.get_submodule(path).register_forward_hook(lambda m, args, out: whole.append(out))
    model(x)
    first = model.backbone.prompts.encoder.prefix_tokens
    assert tokens[0].shape == (2, 16, 32)
    assert torch.equal(tokens[1], whole[0][:, first : first + 16])


@pytest.mark.parametrize("name", NAMES[:3])
def test_forms_agree_and_auxiliary_heads_see_no_prompts(name: str) -> None:
    scores = []
    for form in ("kv", "token"):
        model = segmenter(
            name, "vpt-deep", length=3, dropout=0.0, form=form, auxiliary=(0, 1),
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        model.decoder.train()
        model.auxiliary.train()
        model.training = True
        scores.append(model._scores(image()))
    assert [s.shape for s in scores[0]] == [(2, 4, 32, 32)] * 3
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", ["vpt-deep", "vpt-shallow"])
def test_a_head_reads_the_image_tokens_of_its_own_block(name: str, protocol: str) -> None:
    model = segmenter(name, protocol, length=3, dropout=0.0, auxiliary=(1, 2)).train()
    read: dict[str, Tensor] = {}
    came: dict[str, Tensor] = {}

    def keep(into: dict[str, Tensor], key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = args[0] if into is read else output
            into[key] = value[0] if isinstance(value, tuple) else value

        return hook

    encoder = model.backbone.prompts.encoder
    for key, head in model.auxiliary.items():
        head.register_forward_hook(keep(read, key))
        block = model.backbone.get_submodule(encoder.blocks[int(key)].path)
        block.register_forward_hook(keep(came, key))
    model(image())
    first = encoder.prefix_tokens
    for key, tokens in came.items():
        # Carried prompts come out of every block but the last, behind the image's tokens.
        carried = protocol == "vpt-shallow" and key == "1"
        assert tokens.shape[1] == first + 16 + (3 if carried else 0)
        assert torch.equal(read[key], tokens[:, first : first + 16])


def test_an_auxiliary_head_counts_two_fifths() -> None:
    """SETR's weight: the mean entropy of the decoder, and 0.4 of that of each other head."""
    model = segmenter("timm/cls", "vpt-deep", length=2, dropout=0.0, auxiliary=(0, 1)).train()
    masks = torch.randint(0, 4, (2, 32, 32))
    masks[0, :9] = IGNORE
    main, *others = (F.cross_entropy(s, masks, ignore_index=IGNORE) for s in model._scores(image()))
    assert len(others) == 2
    torch.testing.assert_close(model.loss(image(), masks), main + 0.4 * sum(others))


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_trains(name: str, protocol: str) -> None:
    model = segmenter(name, protocol, **PROTOCOLS[protocol])
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    decoder = {n for n, _ in model.named_parameters() if n.startswith("decoder.")}
    # Here alone nothing but the decoder trains.
    assert decoder == trains if protocol == "linear" else decoder < trains
    inside = {n.removeprefix("backbone.") for n in trains - decoder}
    assert not any(n.startswith(("head", "classifier")) for n in inside)
    kinds = {
        "linear": set(),
        "bias": {"bias"},
        "vpt-deep": {"prompts"},
        "vpt-shallow": {"prompts"},
        "vpt+bias": {"prompts", "bias"},
        "full": None,
    }[protocol]
    found = {"prompts" if n.startswith("prompts.") else n.rpartition(".")[2] for n in inside}
    assert kinds is None or found == kinds
    model.train()
    masks = torch.zeros(2, 32, 32, dtype=torch.int64)
    masks[:, :, 16:], masks[0, :5] = 1, IGNORE
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trains}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.loss(image(), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], t) for n, t in frozen.items())


def vit(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(**(sizes | options)).double().eval()


class Places(nn.Module):
    """Stands for a decoder: the number of every token over its pixels."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        numbers = torch.arange(tokens.shape[1], dtype=tokens.dtype).reshape(1, 1, *grid)
        return numbers.repeat_interleave(self.stride, 2).repeat_interleave(self.stride, 3)


def numbered(size: tuple[int, int], columns: int, stride: int) -> Tensor:
    """Return the number of the token over every pixel."""
    y, x = (torch.arange(edge, dtype=torch.float64) // stride for edge in size)
    return y[:, None] * columns + x


@pytest.mark.parametrize("size", [(40, 61), (33, 32), (7, 50)])
def test_an_image_that_the_model_pads_lies_under_its_tokens(size: tuple[int, int]) -> None:
    bare = vit(dynamic_img_size=True, dynamic_img_pad=True)
    model = Segmenter(bare, 3, "vpt-deep", length=2, channels=8).double().eval()
    x = image(size=64)[..., : size[0], : size[1]]
    more = [-edge % 8 for edge in size]
    padded = model(F.pad(x, (0, more[1], 0, more[0])))
    # Zeros are what the model itself pads with, so both see the same pixels.
    assert torch.equal(model(x), padded[..., : size[0], : size[1]])
    model.decoder = Places(8)
    assert torch.equal(model(x)[0, 0], numbered(size, -(-size[1] // 8), 8))


def test_a_rest_that_the_model_leaves_out_gets_the_nearest_scores() -> None:
    model = segmenter("transformers/dinov2", "vpt-deep", length=2, dropout=0.0)
    x = image(size=40)[..., :37, :]
    found, seen = model(x), model(x[..., :32, :])
    assert torch.equal(found[..., :32, :], seen)
    assert torch.equal(found[..., 32:, :], seen[..., -1:, :].expand(-1, -1, 5, -1))


@pytest.mark.parametrize("name", ["timm/cls", "transformers/siglip"])
def test_a_size_that_the_patches_do_not_divide(name: str) -> None:
    size = "img_size" if name == "timm/cls" else "image_size"
    model = Segmenter(build(name, **{size: 37}), 3, "vpt-deep", length=2, channels=4).eval()
    model.decoder = Places(8)
    found = model(image(1, size=37))[0, 0]
    assert torch.equal(found[:32, :32], numbered((32, 32), 4, 8))
    nearest = torch.arange(37).clamp(max=31)
    assert torch.equal(found, found[nearest][:, nearest])


@pytest.mark.parametrize(
    ("name", "grid"), [("vit_tiny_r_s16_p8_224", (2, 2)), ("vit_base_mci_224", (4, 4))]
)
def test_a_stem_of_convolutions(name: str, grid: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    bare = timm.create_model(name, img_size=64, depth=1, dynamic_img_size=True)
    model = Segmenter(bare, 3, "vpt-shallow", length=2, channels=4, auxiliary=(0,)).eval()
    model.train()
    assert [s.shape for s in model._scores(image(1, torch.float32, 64))] == [(1, 3, 64, 64)] * 2
    step = 64 // grid[0]
    model.eval().decoder = Places(step)
    found = model(image(1, torch.float32, 64))[0, 0]
    assert torch.equal(found, numbered((64, 64), grid[1], step).float())
    with pytest.raises(SpecError, match=rf"tokens of {step} x {step} pixels.*multiples of these"):
        model(image(1, torch.float32, 64 + step // 2))


@pytest.mark.parametrize("location", ["add", "concat-channel", "prepend-pixel"])
def test_locations_that_leave_the_image_in_its_place(location: str) -> None:
    model = segmenter("timm/cls", "vpt-shallow", length=1, location=location, auxiliary=(0, 1))
    model.train()
    assert [s.shape for s in model._scores(image())] == [(2, 4, 32, 32)] * 3


def test_channels_in_place_do_not_hinder_the_dummy_image() -> None:
    timm = pytest.importorskip("timm")
    bare = timm.create_model("vit_tiny_patch16_224", depth=1, dynamic_img_size=True)
    host = inject_prompts(bare, 2, deep=False, location="concat-channel")
    assert host.prompts.place.image != host.prompts.encoder.input_size
    model = Segmenter(host, 3, None, channels=4)
    assert model(image(1, torch.float32, 224)).shape == (1, 3, 224, 224)


def test_tokens_that_training_drops_are_told() -> None:
    model = Segmenter(vit(patch_drop_rate=0.5), 3, "full", channels=4)
    assert model.eval()(image()).shape == (2, 3, 32, 32)
    with pytest.raises(SpecError, match="4 x 4 patches come out of a block as 8 tokens; switch"):
        model.train()(image())


def unlike(name: str) -> nn.Module:
    """Build a backbone whose tokens are no map, or a host that a decoder cannot use."""
    if name.startswith("mae"):
        return build("transformers/mae-model", mask_ratio=float(name[3:]))
    if name == "naflex":
        naflexvit = pytest.importorskip("timm").models.naflexvit
        sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        return naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**sizes))  # type: ignore[no-any-return]
    if name == "swin":
        timm = pytest.importorskip("timm")
        swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2)
        return inject_prompts(swin, 2)
    if name == "wrapped":
        return nn.DataParallel(build("timm/cls"))
    if name == "padded stem":
        timm = pytest.importorskip("timm")
        options = {"img_size": 48, "depth": 1, "dynamic_img_size": True, "dynamic_img_pad": True}
        return timm.create_model("vit_tiny_r_s16_p8_224", **options)  # type: ignore[no-any-return]
    if name == "uneven":
        return vit(img_size=30, embed_layer=Overlapping)
    option = {"pad": {"location": "pad", "deep": False}}.get(name)
    if option is not None:
        return inject_prompts(build("timm/cls"), 2, **option)
    return apply_protocol(build("timm/cls"), name, num_classes=3)


class Overlapping(nn.Module):
    """Patches that overlap, of an image that they do not divide."""

    num_patches = 9

    def __init__(self, embed_dim: int, **options: Any) -> None:
        super().__init__()
        self.img_size = (30, 30)
        self.proj = nn.Conv2d(3, embed_dim, 12, stride=8)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mae0.5", "drops and shuffles its tokens"),
        ("mae0.0", "drops and shuffles its tokens"),
        ("naflex", "no convolution makes the patches of NaFlexVit"),
        ("swin", "no one sequence of image tokens"),
        ("wrapped", "the backbone is wrapped"),
        ("uneven", "30 x 30 pixels make 3 x 3 tokens of 8 x 8 pixels, which do not lie over them"),
        ("padded stem", "pads maps behind a stem of convolutions"),
        ("pad", "with a border around the image"),
        ("sidetune", "added in front of the classifier, which a decoder does not read"),
        ("mlp-2", "its layers are the classifier, which"),
    ],
)
def test_backbones_without_a_map_of_tokens(name: str, message: str, tmp_path: Path) -> None:
    path = save_segmenter(segmenter("timm/cls", "vpt-deep", length=3), tmp_path)
    calls: list[Callable[[nn.Module], Any]] = [lambda host: Segmenter(host, 3, None, channels=8)]
    # A file is for one width, which is told first.
    if name != "padded stem":
        calls.append(lambda host: load_segmenter(host, path))
    for call in calls:
        host = unlike(name)
        refused_unchanged(host, message, lambda host=host, call=call: call(host))


def refused_unchanged(host: nn.Module, message: str, call: Callable[[], Any]) -> None:
    """Check that a call raises, and that the host is then as it was before."""

    def state() -> Any:
        modules = {n: (id(m), m.training, len(m._forward_hooks)) for n, m in host.named_modules()}
        return modules, {n: p.requires_grad for n, p in host.named_parameters()}

    before, values = state(), {n: t.clone() for n, t in host.state_dict().items()}
    with pytest.raises(VPTError, match=message):
        call()
    assert state() == before
    assert all(torch.equal(t, values[n]) for n, t in host.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"classes": n}, r"Segmenter\(classes=.*from 2 to 255") for n in
          (-1, 0, 1, 256, 2.5, "a", None, True)),
        *(({"channels": n}, r"Segmenter\(channels=.*integer >= 1") for n in
          (0, -1, "x", 2.5, None)),
        *(({"auxiliary": n}, "a list of blocks, each once; they are 0 to 2") for n in
          ((3,), (-1,), (0, 0), 1, ("a",), (1.0,), "a", None)),
        ({"protocol": "sidetune"}, "added in front of the classifier"),
        ({"protocol": "mlp-3"}, "its layers are the classifier"),
        ({"protocol": 5}, "must be one of full, linear"),
        ({"protocol": None, "length": 3}, "without a protocol there is nothing"),
        ({"length": 2, "location": "pad", "protocol": "vpt-shallow"}, "border around the image"),
        ({"num_classes": 7}, "about the backbone's classifier"),
        ({"pooling": "prompt"}, "about the backbone's classifier"),
        ({"length": 0}, "length=0"),
    ],
)  # fmt: skip
def test_wrong_options_of_a_segmenter(options: dict[str, Any], message: str) -> None:
    host = build("timm/cls")
    rest = {"classes": 3, "channels": 8} | options
    refused_unchanged(host, message, lambda: Segmenter(host, **rest))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("timm/cls", "vpt-deep"), ("transformers/vit", "full"), ("timm/gap", "full")],
)
def test_training_under_ddp(name: str, protocol: str, one_process: None, tmp_path: Path) -> None:
    wrap = nn.parallel.DistributedDataParallel
    masks = torch.randint(0, 4, (2, 32, 32))
    options: Any = {"length": 3, "dropout": 0.0} if protocol == "vpt-deep" else {}

    def train(call: Callable[[Segmenter], Any]) -> Segmenter:
        model = segmenter(
            name, protocol, auxiliary=(0, 2), generator=torch.Generator().manual_seed(1), **options
        ).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss = call(model)
        for _ in range(3):
            optimizer.zero_grad()
            loss(image(), masks).backward()
            optimizer.step()
        return model

    # The mean of a gap model goes through a norm that no decoder reads.
    unused = name == "timm/gap"
    models = train(lambda m: wrap(m, find_unused_parameters=unused)), train(lambda m: m.loss)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            models[0].state_dict().values(), models[1].state_dict().values(), strict=True
        )
    )
    paths = [
        save_segmenter(model, tmp_path / kind, labels=list("abcd"))
        for kind, model in (("ddp", wrap(models[0])), ("plain", models[1]))
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_counts_of_the_papers_decoder() -> None:
    # One decoder and three auxiliary heads over ViT-L, 150 classes: the 13.18 M of table 3, up to
    # 0.3 %.
    with torch.device("meta"):
        heads = [PupHead(1024, 150), *(PupHead(1024, 150, steps=2) for _ in range(3))]
    count = sum(p.numel() for head in heads for p in head.parameters())
    conv = 9 * 1024 * 256 + 2 * 256
    more = 9 * 256 * 256 + 2 * 256
    closed = 4 * (2 * 1024 + conv + 256 * 150 + 150) + (3 + 3) * more
    assert count == closed == 13_143_640
    assert abs(count / 13.18e6 - 1) < 0.003


def test_scores_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, (3, 9, 7)), rng.integers(0, 4, (3, 9, 7))
    truth[0, :2] = IGNORE
    known = truth != IGNORE
    pairs = [(torch.tensor(f), torch.tensor(t)) for f, t in zip(found, truth, strict=True)]
    result = score(pairs, 5)
    wanted = jaccard_score(truth[known], found[known], labels=range(4), average=None)
    assert result.iou[:4] == pytest.approx(list(wanted))
    assert np.isnan(result.iou[4])
    assert result.miou == pytest.approx(wanted.mean())
    assert result.pixel_accuracy == pytest.approx((truth[known] == found[known]).mean())


def test_windows_and_scales() -> None:
    model = segmenter("timm/cls", "vpt-deep", length=2)
    x = image()
    plain = model(x).softmax(1)
    torch.testing.assert_close(predict(model, x, window=(32, 32)), plain)
    both = predict(model, x, window=(32, 32), flip=True)
    mirrored = model(x.flip(-1)).softmax(1).flip(-1)
    torch.testing.assert_close(both, (plain + mirrored) / 2)
    seen: list[torch.Size] = []
    model.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    large = predict(model, image(size=50), window=(32, 32), scales=(0.5, 1.0, 1.75))
    assert large.shape == (2, 4, 50, 50)
    torch.testing.assert_close(large.sum(1), torch.ones(2, 50, 50, dtype=torch.float64))
    # 32, 50 and 88 pixels in steps of 21: 1, 2 and 4 windows a side, of two images, 8 at once.
    assert [tuple(s) for s in seen] == [(2 * n, 3, 32, 32) for n in (1, 4, 8, 8)]


class Oracle(nn.Module):
    """Scores every pixel by its own value, so that windows must be put together in place."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack([pixels[:, 0], -pixels[:, 0]], 1)


def test_windows_are_put_together_in_place() -> None:
    x = image(size=53)
    found = predict(Oracle(), x, window=(32, 24))
    torch.testing.assert_close(found, Oracle()(x).softmax(1))


def slowly(model: nn.Module, x: Tensor, edge: int, scales: list[float], flip: bool) -> Tensor:
    """Do what `predict` does pixel by pixel, over windows that do not overlap or end flush."""
    maps = []
    for scale in scales:
        for mirror in (False, True) if flip else (False,):
            view = x.flip(-1) if mirror else x
            height, width = (round(n * scale) for n in x.shape[-2:])
            small = F.interpolate(view, (height, width), mode="bilinear", align_corners=False)
            canvas = torch.zeros(1, 3, max(height, edge), max(width, edge), dtype=x.dtype)
            canvas[:, :, :height, :width] = small
            total = torch.zeros(1, 2, *canvas.shape[-2:], dtype=x.dtype)
            counts = torch.zeros(canvas.shape[-2:])
            tops, lefts = ([*range(0, n - edge, edge), n - edge] for n in canvas.shape[-2:])
            for top in tops:
                for left in lefts:
                    part = model(canvas[:, :, top : top + edge, left : left + edge])
                    for y in range(edge):
                        for z in range(edge):
                            total[0, :, top + y, left + z] += part[0, :, y, z]
                            counts[top + y, left + z] += 1
            share = (total / counts)[:, :, :height, :width].softmax(1)
            share = share.flip(-1) if mirror else share
            maps.append(F.interpolate(share, x.shape[-2:], mode="bilinear", align_corners=False))
    return torch.stack(maps).mean(0)


class Placed(nn.Module):
    """Scores a pixel by its neighbours and its place in the window."""

    def forward(self, pixels: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, pixels.shape[-1], dtype=pixels.dtype)
        seen = F.avg_pool2d(pixels.sum(1, keepdim=True), 3, 1, 1)[:, 0]
        return torch.stack([seen * ramp, ramp[:, None] - seen], 1)


@pytest.mark.parametrize("size", [(16, 16), (20, 50), (9, 33)])
@pytest.mark.parametrize("flip", [False, True])
def test_several_scales_equal_a_slow_oracle(size: tuple[int, int], flip: bool) -> None:
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    scales = [0.5, 0.75, 1.0, 1.5]
    found = predict(Placed(), x, window=(16, 16), scales=scales, flip=flip, overlap=0.0)
    torch.testing.assert_close(found, slowly(Placed(), x, 16, scales, flip))


def test_a_scale_keeps_the_shape_of_an_image() -> None:
    seen: list[Tensor] = []
    model = Placed()
    model.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    predict(model, torch.ones(1, 3, 20, 40), window=(16, 16), scales=(0.5,), overlap=0.0)
    # 10 x 20: rows from 10 on are padding, in windows at 0 and 4.
    assert [tuple(s.shape) for s in seen] == [(2, 3, 16, 16)]
    assert bool((seen[0][:, :, :10] == 1).all())
    assert bool((seen[0][:, :, 10:] == 0).all())
    square = torch.randn(1, 3, 16, 16)
    half, whole = (predict(model, square, window=(16, 16), scales=(s,)) for s in (0.5, 1.0))
    assert not torch.allclose(half, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("scales", n) for n in ((), (1.0, 0.0), (float("inf"),), (float("nan"),), 1.0, ("a",))),
        *(("overlap", n) for n in (-0.5, 1.0, float("nan"), "x", None)),
        *(("at_once", n) for n in (0, -1, 2.5, True)),
        *(("window", n) for n in (16, (16,), (0, 16), (16.0, 16), None)),
    ],
)
def test_wrong_options_of_a_prediction(name: str, value: Any) -> None:
    options: dict[str, Any] = {"window": (16, 16), name: value}
    with pytest.raises(SpecError, match=rf"predict\({name}="):
        predict(Placed(), torch.randn(1, 3, 16, 16), **options)


def test_wrong_labels_are_not_counted_elsewhere() -> None:
    truth = torch.tensor([[0, 1], [2, IGNORE]])
    assert score([(torch.tensor([[0, 1], [2, 7]]), truth)], 3).miou == 1
    for found, match in (([[0, 1], [3, 0]], "prediction 3 is none of 3"), ([[0, 1]], "one shape")):
        with pytest.raises(VPTError, match=match):
            score([(torch.tensor(found), truth)], 3)
    with pytest.raises(VPTError, match="true label 2 is none of 2"):
        score([(torch.zeros(2, 2), truth)], 2)
    for classes in (0, 1, 256, 2.0, "a"):
        with pytest.raises(SpecError, match=r"score\(classes=.*from 2 to 255; the label 255"):
            score([], classes)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match=r"Confusion\(classes=.*from 2 to 255"):
            Confusion(classes)  # type: ignore[arg-type]


@pytest.mark.parametrize("auxiliary", [(), (0,)])
def test_a_loss_over_unknown_pixels_alone_is_zero(auxiliary: tuple[int, ...]) -> None:
    model = segmenter("timm/cls", "vpt-deep", length=2, auxiliary=auxiliary).train()
    loss = model.loss(image(), torch.full((2, 32, 32), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())
    masks = torch.randint(0, 4, (2, 32, 32))
    masks[0] = IGNORE
    model = segmenter("timm/cls", "vpt-deep", length=2)
    wanted = F.cross_entropy(model(image()), masks, ignore_index=IGNORE)
    torch.testing.assert_close(model.loss(image(), masks), wanted)


def trained(name: str, protocol: str, **options: Any) -> Segmenter:
    """Return a segmenter in which everything that trains, statistics too, has moved."""
    model = segmenter(name, protocol, **options).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(image(), torch.randint(0, 4, (2, 32, 32))).backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_holds_all_that_trained(name: str, protocol: str, tmp_path: Path) -> None:
    model = trained(name, protocol, **PROTOCOLS[protocol])
    names = ["sky", "sea", "sand", "ship"]
    path = save_segmenter(model, tmp_path / "beach", task="beach", labels=names)
    assert path == tmp_path / "beach" / "adapter.safetensors"
    held = read_adapter(path)
    assert not any(n.startswith("head") and "module" not in n for n in held.tensors)
    assert held.metadata["head"]["reads"] == "tokens"
    bare, state = build(name), torch.get_rng_state()
    back = load_segmenter(bare, path.parent)
    assert torch.equal(torch.get_rng_state(), state)
    assert not back.training
    assert torch.equal(back(image()), model(image()))
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (back, model)]
    assert trains[0] == trains[1]
    # Labels and task are those of the file, so the same adapter gives the same bytes.
    again = save_segmenter(back, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_a_decoder_alone_over_a_backbone_without_classifier(tmp_path: Path) -> None:
    bare = build("timm/cls")
    bare.reset_classifier(0)
    model = Segmenter(bare, 4, "linear", channels=8).double().eval()
    path = save_segmenter(model, tmp_path)
    assert all(n.startswith("head.module.") for n in read_adapter(path).tensors)
    # The classifier is no part of it, so a backbone with one takes the file too.
    back = load_segmenter(build("timm/cls"), path)
    assert torch.equal(back(image()), model(image()))
    assert not any(p.requires_grad for p in back.backbone.parameters())


def test_a_file_crosses_libraries_and_replaces_what_is_there(tmp_path: Path) -> None:
    model = trained("timm/cls", "vpt+bias", length=3, dropout=0.0)
    path = save_segmenter(model, tmp_path)
    port = importlib.import_module("examples.finetune_folder").port_to_transformers
    twin = load_segmenter(port(build("timm/cls")).double(), path)
    # Float64, over three blocks and a decoder.
    torch.testing.assert_close(twin(image()), model(image()), rtol=1e-9, atol=1e-10)
    fresh = segmenter("timm/cls", "vpt+bias", length=3)
    assert not torch.equal(fresh(image()), model(image()))
    other = load_segmenter(fresh.backbone, path)
    assert torch.equal(other(image()), model(image()))
    # A classifier's loader takes the prompts alone, and says so.
    vit = build("timm/cls")
    with pytest.raises(AdapterMismatchError, match=r"reads 'tokens'.*strict='prompts'"):
        load_task_adapter(vit, path)
    assert not is_prompted(vit)
    load_task_adapter(vit, path, strict="prompts")
    assert torch.equal(vit.prompts.get_parameter("0"), model.backbone.prompts.get_parameter("0"))


def _rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """Return a sound file that says something else."""
    held = read_adapter(path)
    metadata = {k: v for k, v in held.metadata.items() if k not in ("format_version", "checksum")}
    tensors = dict(held.tensors)
    change(metadata, tensors)
    return write_adapter(path.parent / "changed.safetensors", tensors, metadata)


def test_what_a_loader_refuses(tmp_path: Path) -> None:
    path = save_segmenter(trained("timm/cls", "vpt-deep", length=3), tmp_path)
    vit = build("timm/cls")
    before = {n: t.clone() for n, t in vit.state_dict().items()}

    def refused(kind: type[Exception], match: str, source: Path) -> None:
        with pytest.raises(kind, match=match):
            load_segmenter(vit, source)
        assert not is_prompted(vit)
        assert all(torch.equal(t, before[n]) for n, t in vit.state_dict().items())

    plain = save_task_adapter(inject_prompts(build("timm/cls"), 3), tmp_path / "plain")
    refused(AdapterMismatchError, "holds a classifier, not a decoder", plain)
    changes: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
        "takes 31 features": lambda m, t: m["head"].update(in_features=31),
        "has no layer classify": lambda m, t: t.pop("head.module.classify.weight"),
        "tensors missing: .*running_mean": lambda m, t: t.pop("head.module.convs.0.1.running_mean"),
        "has shape .4, 8, 1, 1.": lambda m, t: m["head"].update(classes=3, labels=None),
    }
    for match, change in changes.items():
        refused(AdapterError, match, _rewrite(path, change))
    bordered = inject_prompts(build("timm/cls"), 2, location="pad", deep=False)
    other = read_adapter(save_task_adapter(bordered, tmp_path / "pad"))

    def border(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        metadata["spec"] = other.metadata["spec"]
        for name in [n for n in tensors if n.startswith("prompts.")]:
            del tensors[name]
        tensors |= {n: t for n, t in other.tensors.items() if n.startswith("prompts.")}

    refused(SpecError, "with a border around the image", _rewrite(path, border))
    with torch.no_grad():
        vit.blocks[1].norm1.weight.mul_(1.01)
    before = {n: t.clone() for n, t in vit.state_dict().items()}
    refused(AdapterMismatchError, "has others", path)


def test_what_a_save_refuses(tmp_path: Path) -> None:
    model = segmenter("timm/cls", "vpt-deep", length=3)
    with pytest.raises(AdapterError, match="2 names for a head of 4 classes"):
        save_segmenter(model, tmp_path, labels=["a", "b"])
    with pytest.raises(NotPromptedError):
        save_segmenter(segmenter("timm/cls", None), tmp_path)
    with pytest.raises(AdapterError, match="needs a Segmenter, got VisionTransformer"):
        save_segmenter(model.backbone, tmp_path)
    for path in (None, 5, "~a user who is not there/a"):
        with pytest.raises(AdapterError, match=r"save_segmenter: .*not a path"):
            save_segmenter(model, path)  # type: ignore[arg-type]
    model.decoder.norm.weight.data[0] = float("nan")
    with pytest.raises(AdapterError, match="not finite"):
        save_segmenter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def whole(kind: str, **changes: Any) -> Any:
    """Build a small segmentation model of transformers, the same one at every call."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = {i: f"thing {i}" for i in range(4)}
    if kind == "segformer":
        config = transformers.SegformerConfig(**{
            "id2label": names, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16, **changes,
        })  # fmt: skip
        return transformers.SegformerForSemanticSegmentation(config).eval()
    if kind == "eomt":
        eomt = transformers.EomtConfig(
            id2label=names, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
            image_size=64, patch_size=16, num_blocks=1, num_queries=4, num_upscale_blocks=1,
        )  # fmt: skip
        return transformers.EomtForUniversalSegmentation(eomt).eval()
    if kind == "convnext":
        convnext = transformers.ConvNextConfig(
            hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = transformers.UperNetConfig(
            backbone_config=convnext, id2label=names, hidden_size=16, auxiliary_in_channels=16
        )
        return transformers.UperNetForSemanticSegmentation(config).eval()
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.UperNetConfig(
        backbone_config=swin, id2label=names, hidden_size=16, auxiliary_in_channels=32
    )
    return transformers.UperNetForSemanticSegmentation(config).eval()


def shift(model: Any) -> Tensor:
    """Move all that trains, statistics too; return the scores then."""
    model.train()
    out = model(image(2, torch.float32, 64), labels=torch.randint(0, 4, (2, 64, 64)))
    out.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return logits(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(image(2, torch.float32, 64)).logits
    return found


@pytest.mark.parametrize("kind", ["segformer", "upernet"])
@pytest.mark.parametrize("protocol", ["linear", "bias", "vpt-deep", "full"])
def test_a_decoder_of_its_own_is_saved_and_put_back(
    kind: str, protocol: str, tmp_path: Path
) -> None:
    model = whole(kind)
    bare = logits(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    options: dict[str, Any] = {"vpt-deep": {"length": 2}, "full": {"keep_original": True}}
    apply_to_encoder(model, protocol, **options.get(protocol, {}))
    wanted = shift(model)
    path = save_task_adapter(model, tmp_path)
    head = read_adapter(path).metadata["head"]
    assert (head["class"], head["labels"][3]) == (type(model).__name__, "thing 3")
    back = load_task_adapter(whole(kind), path)
    assert torch.equal(logits(back), wanted)
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (back, model)]
    assert trains[0] == trains[1]
    again = save_task_adapter(back, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    shift(back)
    assert torch.equal(logits(load_task_adapter(back, path)), wanted)
    remove_prompts(model)
    assert torch.equal(logits(model), bare)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_adapters_with_and_without_a_decoder_in_turn(tmp_path: Path) -> None:
    plain = inject_prompts(whole("segformer"), 2, num_classes=None)
    with torch.no_grad():
        plain.prompts.get_parameter("0").add_(0.1)
    wanted = logits(plain)
    prompts_alone = save_task_adapter(plain, tmp_path / "plain")
    model = apply_to_encoder(whole("segformer"), "vpt-deep", length=2)
    other = shift(model)
    path = save_task_adapter(model, tmp_path / "whole")
    # Prompts alone, by the caller's wish: the decoder stays as it was trained.
    decoder = model.decode_head.classifier.weight.clone()
    load_task_adapter(model, prompts_alone, strict="prompts")
    assert torch.equal(model.decode_head.classifier.weight, decoder)
    assert torch.equal(model.prompts.get_parameter("0"), plain.prompts.get_parameter("0"))
    # An adapter made with the model's own decoder gets that one back.
    assert torch.equal(logits(load_task_adapter(model, prompts_alone)), wanted)
    assert not model.decode_head.classifier.weight.requires_grad
    assert torch.equal(logits(load_task_adapter(model, path)), other)
    bare = whole("segformer")
    load_task_adapter(bare, path, strict="prompts")
    assert torch.equal(
        bare.decode_head.classifier.weight, whole("segformer").decode_head.classifier.weight
    )


def test_a_decoder_fits_its_own_class_alone(tmp_path: Path) -> None:
    model = apply_to_encoder(whole("segformer"), "vpt-deep", length=2)
    path = save_task_adapter(model, tmp_path)
    three = whole("segformer", id2label={i: str(i) for i in range(3)})
    transformers = pytest.importorskip("transformers")
    classifier = transformers.SegformerForImageClassification(model.config)
    for host, match in ((three, "classes 4, this model's has 3"), (classifier, "the same class")):
        before = {n: t.clone() for n, t in host.state_dict().items()}
        with pytest.raises(AdapterMismatchError, match=match):
            load_task_adapter(host, path)
        assert not is_prompted(host)
        assert all(torch.equal(t, before[n]) for n, t in host.state_dict().items())


def test_a_decoder_trains_with_its_dropout_and_goes_into_checkpoints(tmp_path: Path) -> None:
    model = whole("segformer")
    apply_to_encoder(model, "bias").train()
    assert model.decode_head.dropout.training
    assert model.decode_head.batch_norm.training
    assert not any(module.training for module in model.segformer.stages.modules())
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert "decode_head.classifier.weight" in held


@pytest.mark.parametrize("kind", ["segformer", "upernet"])
def test_prompts_inside_a_segmentation_model_of_transformers(kind: str) -> None:
    model = whole(kind)
    apply_to_encoder(model, "vpt-deep", length=2)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    encoder = model.prompts.encoder.path
    assert {n for n in trains if n.startswith(f"{encoder}.")} == set()
    assert any(n.startswith("prompts.") for n in trains)
    assert any("decode" in n for n in trains)
    model.train()
    out = model(image(2, torch.float32, 64), labels=torch.randint(0, 4, (2, 64, 64)))
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "prompts." in n)


def test_bad_input() -> None:
    timm = pytest.importorskip("timm")
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2)
    with pytest.raises(UnsupportedArchitectureError, match="apply_to_encoder"):
        Segmenter(swin, 3)
    assert not hasattr(swin, "prompts")
    vit = build("timm/cls")
    with pytest.raises(SpecError, match="without a decoder"):
        apply_to_encoder(vit, "bias")
    assert not hasattr(vit, "prompts")
    assert all(p.requires_grad for p in vit.parameters())
    with pytest.raises(SpecError, match="build the model for that many"):
        apply_to_encoder(whole("segformer"), "bias", num_classes=3)
    host = whole("segformer")
    border = {"length": 2, "location": "pad"}
    refused_unchanged(
        host,
        r"apply_to_encoder: with a border around the image",
        lambda: apply_to_encoder(host, "vpt-shallow", **border),
    )
    for kind, match in (
        ("convnext", "no attention that prompts"),
        ("eomt", "serve as decoder too"),
    ):
        host = whole(kind)
        refused_unchanged(
            host,
            rf"in {type(host).__name__} encoder and decoder cannot be told apart \(.*{match}",
            lambda host=host: apply_to_encoder(host, "bias"),
        )
    model = inject_prompts(build("timm/cls"), 2)
    assert Segmenter(model, 3, None, channels=4)(image()).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        (torch.full((1, SIZE, SIZE), 9), "label 9 is none of 4 classes"),
        (torch.full((1, SIZE, SIZE), -1), "label -1 is none of 4"),
        (torch.zeros(1, SIZE, SIZE), "torch.float32"),
        (torch.zeros(1, 1, SIZE, SIZE, dtype=torch.long), r"\(1, 1, 32, 32\)"),
        (torch.zeros(1, 8, 8, dtype=torch.long), r"\(1, 8, 8\)"),
    ],
)
def test_masks_are_class_numbers_of_the_images_size(masks: Tensor, match: str) -> None:
    model = segmenter("timm/cls", "linear").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(VPTError, match=match):
        model.loss(image(1), masks)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_masks_may_be_bytes() -> None:
    model, masks = segmenter("timm/cls", "linear"), torch.randint(0, 4, (1, SIZE, SIZE))
    masks[0, 0] = 255
    assert torch.equal(model.loss(image(1), masks.byte()), model.loss(image(1), masks))
