"""Every family against an independent oracle (`oracles.py`), in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from support import oracles
from support.oracles import (
    CLASS,
    GRID,
    MAPS,
    WINDOWS,
    Oracle,
    around,
    around_block,
    around_kind,
    around_packed,
    at_attention,
    at_packed,
    combine,
    inside,
    isotropic,
    pairs,
    rewritten,
    written,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import perturb

from peft_vpt import inject_prompts
from peft_vpt.errors import UnsupportedArchitectureError

LENGTH = 3
EXACT = 1e-9

BIAS = ("_get_rel_pos_bias", "get_bias", "get_attention_biases", "_relative_positional_encodings")
ISOTROPIC = around(
    "Block EvaBlock EvaBlockPostNorm RelPosBlock ResPostRelPosBlock ResPostBlock "
    "ParallelScalingBlock ParallelThingsBlock DeepseekVitBlock Gemma4Block",
    pads=BIAS,
)
MAXVIT = [
    at_attention("PartitionAttentionCl", pads=BIAS),
    at_attention("TransformerBlock2d", layout=MAPS, pads=BIAS),
]
MAXVIT_NAMES = (
    "maxvit_base_tf_224 maxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 coatnet_0_rw_224 "
    "coatnet_rmlp_1_rw_224"
)
ISOTROPIC_NAMES = """
vit_base_patch16_siglip_224 deit_base_distilled_patch16_224 vit_base_patch16_xp_224
vit_base_patch16_18x2_224 vit_base_patch16_rpn_224 vit_base_resnet26d_224 vitamin_base_224
eva02_base_patch14_224 eva02_enormous_patch14_clip_224 eva_giant_patch14_224 vit_base_patch16_dinov3
vit_5b_patch16_sapiens2 vit_base_patch16_rope_mixed_224 vit_base_patch16_rope_reg1_gap_256
vit_pe_core_base_patch16_224 beit_base_patch16_224 test_vit_relpos vit_relpos_base_patch16_rpn_224
vit_srelpos_small_patch16_224 naflexvit_base_patch16_gap naflexvit_base_patch16_map qwen3_vit_88m
deepseek_vit_412m gemma4_vit_167m pit_b_224 crossvit_9_240 mobilevit_s
"""
# Names of timm architectures, and what gives a bare one prompts.
TIMM: dict[str, Any] = {
    **dict.fromkeys(ISOTROPIC_NAMES.split(), ISOTROPIC),
    "cait_m36_384": [around("LayerScaleBlock"), around("LayerScaleBlockClassAttn", CLASS)],
    "convit_base": [
        written("Block", oracles.positional, kind="GPSA"),
        around_kind("Block", "MHSA"),
    ],
    "tnt_b_patch16_224": at_attention("Block", "attn_out", "norm_out"),
    "caformer_b36": around_kind("MetaFormerBlock", "Attention", "token_mixer"),
    "volo_d1_224": [around("Transformer", GRID), around("ClassBlock")],
    "visformer_small": at_attention("Block", layout=MAPS, kind="Attention"),
    "fastvit_ma36": at_attention("AttentionBlock", "token_mixer", "norm", MAPS),
    "levit_128": at_attention("LevitBlock", norm="", pads=BIAS),
    "levit_conv_256d": at_attention("LevitBlock", norm="", layout=MAPS, pads=BIAS),
    "efficientformer_l1": at_attention("MetaBlock1d", "token_mixer", pads=BIAS),
    "csatv2": at_attention("TransformerBlock"),
    **dict.fromkeys(("davit_base", "davit_base_fl"), at_attention("SpatialBlock")),
    **dict.fromkeys(MAXVIT_NAMES.split(), MAXVIT),
    "tiny_vit_5m_224": at_attention("TinyVitBlock", norm="", pads=BIAS),
    "nest_base": at_attention("TransformerLayer", layout=WINDOWS),
    "gcvit_tiny": at_attention("GlobalContextVitBlock", pads=BIAS),
    "hiera_base_224": written("HieraBlock", oracles.mask_units),
    "hieradet_small": written("MultiScaleBlock", oracles.pooled_windows),
    "samvit_base_patch16": written("Block", oracles.sam),
    "twins_svt_base": [
        written("Block", oracles.twins_windows, kind="LocallyGroupedAttn"),
        written("Block", oracles.reduced, kind="GlobalSubSampleAttn"),
    ],
    **dict.fromkeys(("pvt_v2_b0", "pvt_v2_b2_li"), written("Block", oracles.reduced)),
    "nextvit_base": written("NextTransformerBlock", oracles.nextvit, "e_mhsa"),
    "mvitv2_base": written("MultiScaleBlock", oracles.mvit),
    "mobilenetv4_hybrid_medium": written("MobileAttention", oracles.multi_query, norm="norm"),
    **dict.fromkeys(
        ("lowformer_b0", "cpubone_nano"), written("ConvAttention", oracles.convolved, "", "")
    ),
    "efficientformerv2_s0": written(
        "EfficientFormerV2Block", oracles.talking_map, "token_mixer", "", "Attention2d"
    ),
    "iformer_h": written("SHMA", oracles.gated, "", ""),
    "sebotnet33ts_256": written("BottleneckAttn", oracles.bottleneck, "", ""),
    "swin_base_patch4_window7_224": rewritten("SwinTransformerBlock", oracles.swin),
    "swinv2_base_window8_256": rewritten("SwinTransformerV2Block", oracles.swin_v2),
    "swinv2_cr_base_224": rewritten("SwinTransformerV2CrBlock", oracles.swin_v2_cr),
}


ISO_NAMES = """
Aimv2VisionModel AltCLIPVisionModel BeitForImageClassification BlipVisionModel Blip2VisionModel
ChineseCLIPVisionModel CLIPForImageClassification CLIPSegVisionModel
Data2VecVisionForImageClassification DeiTForImageClassification DepthAnythingForDepthEstimation
Dinov2ForImageClassification Dinov2WithRegistersForImageClassification DINOv3ViTModel DPTModel
EomtForUniversalSegmentation EomtDinov3ForUniversalSegmentation FlavaImageModel GitVisionModel
GraniteDoclingVisionModel Idefics2VisionTransformer Idefics3VisionTransformer
IJepaForImageClassification InstructBlipVisionModel InstructBlipVideoVisionModel
InternVLVisionModel JanusVisionModel Kosmos2VisionModel Kosmos2_5VisionModel
MetaClip2ForImageClassification MgpstrModel MLCDVisionModel MllamaVisionModel Molmo2VisionModel
Ovis2VisionModel Owlv2VisionModel OwlViTVisionModel PixioModel PixtralVisionModel
QianfanOCRVisionModel RadioModel RfDetrDinov2Backbone Sapiens2Model SiglipForImageClassification
Siglip2ForImageClassification SmolVLMVisionTransformer Step3p7VisionModel Tipsv2VisionModel
VideoMAEForVideoClassification VideomtForUniversalSegmentation VideoPrismForVideoClassification
ViTForImageClassification ViTMAEModel ViTMSNForImageClassification VitPoseForPoseEstimation
VitPoseBackbone VivitForVideoClassification YolosModel Llama4VisionModel Gemma4VisionModel
Pix2StructVisionModel
"""
PACKED_NAMES = """
CohereCompassVisionModel Cosmos3EdgeVisionModel Ernie4_5_VLMoeVisionTransformerPretrainedModel
Exaone4_5_VisionModel Glm4vVisionModel Glm4vMoeVisionModel Glm5NextVisionModel GlmImageVisionModel
GlmOcrVisionModel HunYuanVLVisionTransformer Inkling2VisionModel Kimi_K25VisionModel
MiniMaxM3VLVisionModel MuseGlimmerVisionModel MuseSparkVisionModel PaddleOCRVisionModel
Qwen2_5OmniVisionEncoder Qwen2_5_VisionTransformerPretrainedModel
Qwen2VisionTransformerPretrainedModel Qwen3_5VisionModel Qwen3_5MoeVisionModel
Qwen3OmniMoeVisionEncoder Qwen3VLVisionModel Qwen3VLMoeVisionModel Qwen4ExpVisionModel
VideoLlama3VisionModel
"""
REDUCED = oracles.reduced_transformers
# Blocks that take `(batch, tokens, dim)`, rotations and masks by the usual names.
LAYERS = (isotropic, partial(around_block, pads=("relative_position_bias",)))
PACKED = (isotropic, around_packed)
MINICPM = at_packed(
    "MiniCPMOcrVisionEncoderLayer MiniCPMOcrViTWindowAttentionMerger "
    "MiniCPMV4_6VisionEncoderLayer MiniCPMV4_6ViTWindowAttentionMerger "
    "MiniCPMV4_7VisionEncoderLayer MiniCPMV4_7ViTWindowAttentionMerger",
    "self_attn",
    "layer_norm1",
)
DENSE = written(
    "SamVisionLayer SamHQVisionLayer SLANeXtVisionLayer GotOcr2VisionLayer PPFormulaNetVisionLayer",
    pairs(oracles.sam),
    norm="layer_norm1",
)
DENSE_NAMES = (
    "SamVisionModel SamHQVisionModel SLANeXtVisionEncoder GotOcr2VisionEncoder "
    "PPFormulaNetVisionModel"
)
SWIN = rewritten("SwinLayer DonutSwinLayer MaskFormerSwinLayer", oracles.swin_transformers)
SWIN_2 = rewritten("Swinv2Layer Swin2SRLayer", oracles.swin_v2_transformers)
SWIN_NAMES = "SwinForImageClassification DonutSwinForImageClassification MaskFormerSwinModel"
TRANSFORMERS: dict[str, Any] = {
    **dict.fromkeys(ISO_NAMES.split(), LAYERS),
    **dict.fromkeys(PACKED_NAMES.split(), PACKED),
    **dict.fromkeys(SWIN_NAMES.split(), SWIN),
    **dict.fromkeys(("Swinv2ForImageClassification", "Swin2SRModel"), SWIN_2),
    **dict.fromkeys(DENSE_NAMES.split(), DENSE),
    **{f"MiniCPM{name}VisionModel": MINICPM for name in ("Ocr", "V4_6", "V4_7")},
    **dict.fromkeys(("TimmWrapperForImageClassification", "PeVideoEncoder"), ISOTROPIC),
    "HieraForImageClassification": written(
        "HieraLayer", pairs(oracles.mask_units), norm="layernorm_before"
    ),
    "VitDetModel": written("VitDetLayer", pairs(oracles.sam), "attention"),
    "SegGptModel": written("SegGptLayer", pairs(oracles.sam), "attention", "layernorm_before"),
    "Sam2VisionModel": written("Sam2MultiScaleBlock", oracles.pooled_windows, norm="layer_norm1"),
    "Sam3VisionModel": at_attention("Sam3ViTLayer", "attention", "layer_norm1", GRID),
    "SegformerForImageClassification": written(
        "SegformerLayer", REDUCED, "attention", "layernorm_before"
    ),
    "PvtForImageClassification": written("PvtLayer", REDUCED, "attention.self", "layer_norm_1"),
    "PvtV2ForImageClassification": written("PvtV2BlockLayer", REDUCED, "attention", "layer_norm_1"),
    "GLPNModel": written("GLPNLayer", REDUCED, "attention.self", "layer_norm_1"),
    "CvtForImageClassification": written(
        "CvtLayer", oracles.convolutional, "attention.attention", "layernorm_before"
    ),
    "LevitForImageClassification": around("LevitAttention", pads=BIAS),
    "MobileViTForImageClassification": around("MobileViTTransformerLayer"),
    "TimesformerForVideoClassification": at_attention(
        "TimesformerLayer", "attention", "layernorm_before"
    ),
    "XCLIPVisionModel": at_attention("XCLIPVisionEncoderLayer", "self_attn", "layer_norm1"),
    "VJEPA2ForVideoClassification": written("VJEPA2Layer", oracles.turned, "attention"),
    "LwDetrViTBackbone": at_attention("LwDetrViTLayer", "attention", "layernorm_before"),
    "GroupViTVisionModel": around("GroupViTEncoderLayer"),
    "Lfm3VlVisionModel": at_packed("Lfm3VlVisionLayer", "self_attn", "operator_norm"),
    "Florence2VisionBackbone": written("Florence2VisionSpatialBlock", oracles.local, "window_attn"),
    # Its sdpa is causal where nothing is padded.
    "Phi4MultimodalVisionModel": (isotropic, partial(around_block, front=True)),
}
# Where other parts of the model have blocks of the same class.
WITHIN = {"VJEPA2ForVideoClassification": "vjepa2.encoder.layer"}


def oracle_of(name: str) -> Oracle:
    """Build an oracle of a rule, or of several."""
    rules = TIMM.get(name) or TRANSFORMERS[name]
    oracle = combine(*(rules if isinstance(rules, list) else [rules]))
    return inside(WITHIN[name], oracle) if name in WITHIN else oracle


def first(output: Any) -> Tensor:
    """Return the tensor that matters in any model's output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return first(output[0])
    for name in ("logits", "last_hidden_state"):
        if output.get(name) is not None:
            return output[name]
    return first(next(iter(output.values())))


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def prepare(model: nn.Module, inputs: Any) -> nn.Module:
    """Perturb every parameter, and let batch norms know the statistics that follow from that."""
    model = perturb(model).double()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 0.5
        norm.train()
    if norms:
        with torch.no_grad():
            call(model, inputs)
    return model.eval()


def call(model: nn.Module, inputs: Any) -> Tensor:
    return first(model(inputs) if isinstance(inputs, Tensor) else model(**inputs))


def compare(
    model: nn.Module, inputs: Any, oracle: Oracle, scale: float = 0.5, *, single: bool = True
) -> None:
    """Compare logits and the gradient of every prompt with the oracle's."""
    model = prepare(model, inputs)
    bare = copy.deepcopy(model).requires_grad_(False)
    plain = call(model, inputs).detach()
    inject_prompts(model, LENGTH, deep=True, dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    ours: dict[str, Any] = {str(e): getattr(model.prompts, str(e)) for e in model.prompts.entries}
    with torch.no_grad():
        for parameter in ours.values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    theirs = [p.detach().clone().requires_grad_() for p in ours.values()]

    without = copy.deepcopy(bare)
    oracle(without, [p[:0] for p in theirs])
    with torch.no_grad():
        difference(call(without, inputs), plain, "the oracle without prompts")

    oracle(bare, theirs)
    actual, expected = call(model, inputs), call(bare, inputs)
    difference(actual, expected, "output")
    assert (actual - plain).abs().max() > 1e-4 * plain.abs().max(), "prompts have no effect"
    weights = torch.linspace(0.5, 1.5, actual.numel(), dtype=torch.float64).reshape(actual.shape)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), leaf in zip(ours.items(), theirs, strict=True):
        assert leaf.grad is not None, name
        assert leaf.grad.abs().max() > 0, f"the oracle gives prompt {name} no gradient"
        assert parameter.grad is not None, name
        difference(parameter.grad, leaf.grad, f"gradient of prompt {name}")

    if single:
        with torch.no_grad():
            one = call(model, alone(inputs))
        same = actual[tuple(slice(size) for size in one.shape)]
        difference(one, same, "an image alone")


def alone(inputs: Any) -> Any:
    """Return the first image of a batch, or of a packed sequence."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    grid = next((v for n, v in inputs.items() if n.endswith("grid_thw")), None)
    short = {name: value[:1] for name, value in inputs.items()}
    if grid is not None:
        name, rows = next(iter(inputs.items()))
        size = int(grid[0].prod())
        short[name] = rows[:size] if rows.shape[0] > 1 else rows[:, :size]
    if "target_sizes" in inputs:
        # One strip of patches beside each other.
        name, strip = next(iter(inputs.items()))
        short[name] = strip[..., : int(inputs["target_sizes"][0].prod()) * strip.shape[2]]
    return short


class Double(TorchFunctionMode):
    """Let code that asks for float32, inside a model in float64, have float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def difference(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    actual, expected = actual.detach(), expected.detach()
    relative = float((actual - expected).abs().max() / expected.abs().max())
    assert relative <= EXACT, f"{what}: {relative:.1e} relative"


# Shipped code that computes in float32 whatever the model's dtype, and would hide all but its own
# rounding: these run with float64 there.
FLOAT32 = {
    "norm": "deepseek_vit_412m Aimv2VisionModel Ovis2VisionModel Gemma4VisionModel Sapiens2Model "
    "Kosmos2_5VisionModel Pix2StructVisionModel",
    "rope": "Llama4VisionModel MLCDVisionModel Sam3VisionModel Step3p7VisionModel "
    "Inkling2VisionModel Lfm3VlVisionModel "
    "MuseGlimmerVisionModel MuseSparkVisionModel" + PACKED_NAMES,
    "softmax": "SegGptModel SLANeXtVisionEncoder GotOcr2VisionEncoder PPFormulaNetVisionModel",
}
# Post-norm blocks see tokens as large as the residual stream; small prompts are hardly seen.
SCALE = {"vit_base_patch16_rpn_224": 5.0, "vit_relpos_base_patch16_rpn_224": 5.0}
# One member of every way in which timm writes its softmax out.
UNFUSED = (
    "vit_base_patch16_xp_224 eva02_base_patch14_224 vit_5b_patch16_sapiens2 beit_base_patch16_224 "
    "test_vit_relpos gemma4_vit_167m cait_m36_384 swin_base_patch4_window7_224 davit_base "
    "coatnet_rmlp_1_rw_224 nest_base hiera_base_224 samvit_base_patch16 twins_svt_base "
    "fastvit_ma36 visformer_small"
)
EAGER = """ViTForImageClassification SwinForImageClassification Dinov2ForImageClassification
Qwen2_5_VisionTransformerPretrainedModel SegformerForImageClassification SamVisionModel
Sam2VisionModel HieraForImageClassification"""
# Samples of these are frames of one video.
VIDEOS = ("VideomtForUniversalSegmentation", "XCLIPVisionModel")


def check(name: str, model: nn.Module, inputs: Any, oracle: Oracle) -> None:
    low = any(name in names.split() for names in FLOAT32.values())
    with Double() if low else nullcontext():
        compare(model, inputs, oracle, SCALE.get(name, 0.5), single=name not in VIDEOS)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    pytest.importorskip("timm")
    from matrix import small_timm

    torch.manual_seed(0)
    model, size = small_timm.build(name)
    check(name, model, torch.randn(2, *size, dtype=torch.float64), oracle_of(name))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from matrix import small_transformers

    model, inputs = small_transformers.build(name)
    check(name, model, {k: double(v) for k, v in inputs.items()}, oracle_of(name))


def swin(kind: str) -> nn.Module:
    """Build a Swin whose maps of 10, 5 and 3 do not fill windows of 4."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 40, "patch_size": 4, "window_size": 4, "num_classes": 5}
    stages = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4)}
    names = {
        "v1": "swin_transformer.SwinTransformer",
        "v2": "swin_transformer_v2.SwinTransformerV2",
    }
    module, _, cls = names[kind].partition(".")
    return getattr(getattr(timm.models, module), cls)(**sizes, **stages)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_padded_windows(kind: str) -> None:
    torch.manual_seed(0)
    names = {"v1": "swin_base_patch4_window7_224", "v2": "swinv2_base_window8_256"}
    model, oracle = swin(kind), oracle_of(names[kind])
    assert {any(m.shift_size) for m in model.modules() if hasattr(m, "shift_size")} == {True, False}
    check(kind, model, torch.randn(2, 3, 40, 40, dtype=torch.float64), oracle)


def test_padded_sequence_of_naflex() -> None:
    pytest.importorskip("timm")
    from matrix import small_timm

    torch.manual_seed(0)
    model, _ = small_timm.build("naflexvit_base_patch16_gap")
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1)
    valid = torch.tensor([[True] * 16, [True] * 10 + [False] * 6])
    inputs = {
        "x": torch.randn(2, 16, 768, dtype=torch.float64),
        "patch_coord": places,
        "patch_valid": valid,
    }
    check("naflex", model, inputs, oracle_of("naflexvit_base_patch16_gap"))


def few(names: Any, quick: Any) -> list[Any]:
    """Mark all names slow but some."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", few(TIMM, UNFUSED.split()))
def test_timm_unfused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("timm.layers.config"), "_USE_FUSED_ATTN", 0)
    test_timm(name)


@pytest.mark.parametrize("name", few(TIMM, ("swin_base_patch4_window7_224", "davit_base")))
def test_timm_fused_where_timm_calls_that_experimental(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("timm.layers.config"), "_USE_FUSED_ATTN", 2)
    test_timm(name)


# The wrapper of timm models has no choice of attention.
@pytest.mark.parametrize("name", few((n for n in TRANSFORMERS if "Timm" not in n), EAGER.split()))
def test_transformers_eager(name: str) -> None:
    """Eager attention has its softmax in float32, so it runs with float64 there."""
    pytest.importorskip("transformers")
    from matrix import small_transformers

    model, inputs = small_transformers.build(name)
    model.set_attn_implementation("eager")
    inputs = {k: double(v) for k, v in inputs.items()}
    if name == "Sam2VisionModel":
        # It computes scores twice; which of the two counts cannot be told without SDPA.
        with pytest.raises(UnsupportedArchitectureError, match="set_attn_implementation"):
            inject_prompts(prepare(model, inputs), LENGTH)
        return
    with Double():
        compare(model, inputs, oracle_of(name), single=name not in VIDEOS)


def wrong_rotation(rope: Tensor, length: int) -> Tensor:
    return torch.cat([rope, rope[..., -length:, :]], dim=-2) if length else rope


def wrong_bias(bias: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(bias, (0, length, 0, length), value=0.1)


@pytest.mark.parametrize(
    ("name", "part", "wrong"),
    [
        ("eva02_base_patch14_224", "rope", wrong_rotation),
        ("vit_base_patch16_rope_mixed_224", "rope", wrong_rotation),
        ("beit_base_patch16_224", "pad_square", wrong_bias),
        ("test_vit_relpos", "pad_square", wrong_bias),
        ("maxvit_rmlp_nano_rw_256", "pad_square", wrong_bias),
        ("tiny_vit_5m_224", "normed", lambda block, norm, prompt: 1.01 * prompt.unsqueeze(0)),
        ("davit_base", "normed", lambda block, norm, prompt: prompt.unsqueeze(0)),
        ("twins_svt_base", "normed", lambda block, norm, prompt: prompt.unsqueeze(0)),
        ("swinv2_base_window8_256", "cosine", lambda query, keys: (query, keys)),
        ("samvit_base_patch16", "decomposed", lambda *_: 0.0),
    ],
)
def test_a_wrong_oracle_is_noticed(
    name: str, part: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part in oracles.PADS:
        monkeypatch.setitem(oracles.PADS, part, wrong)
    else:
        monkeypatch.setattr(oracles, part, wrong)
    with pytest.raises(AssertionError, match="relative"):
        test_timm(name)
