"""timm's attention classes: how each makes its keys and values, or why it takes no prompts.

Keys are `<file>.<class>` below `timm.models` or `timm.layers`. Facts as of timm 1.0.31; the
self-check at injection holds every one of them against the model at hand.
"""

from __future__ import annotations

from torch import nn

from .discover import CHANNEL, LINEAR, MERGING, Refused, Row, plain_layers
from .projection import Fused, Separate

_DIFFERENTIAL = Refused(
    "differential attention: two softmaxes with opposite signs, so extra keys cancel out"
)
_CONVOLVED = Row(
    Fused("pwise", order="head", before=("conv_proj.norm", "conv_proj.act")),
    (),
    behind=True,
    reduces="input",
)
ROWS: dict[str, Row | Refused] = {
    "attention.AttentionRope": Row(rotates="yes"),
    "eva.EvaAttention": Row(rotates="yes"),
    "vision_transformer.ParallelScalingBlock": Row(Fused("in_proj"), ("in_norm",), up=0),
    "gemma4_vit.Gemma4Attention": Row(rotates="yes"),
    "diff_attention.DiffAttention": _DIFFERENTIAL,
    "vision_transformer.DiffParallelScalingBlock": _DIFFERENTIAL,
    # Windows are cut by the block, so it is the block whose forward is replaced.
    "swin_transformer.WindowAttention": Row(at=""),
    "swin_transformer_v2.WindowAttention": Row(Fused(unit_keys=True), (), at=""),
    "swin_transformer_v2_cr.WindowMultiHeadAttention": Row(Fused(unit_keys=True), (), at=""),
    "davit.WindowAttention": Row(at="", behind=True),
    "davit.ChannelAttention": CHANNEL,
    "davit.ChannelAttentionV2": CHANNEL,
    "maxxvit.AttentionCl": Row(Fused(order="head"), at=""),
    "maxxvit.Attention2d": Row(Fused(order="head"), at="", reduces="input"),
    "hiera.MaskUnitAttention": Row(at=""),
    "hieradet_sam2.MultiScaleAttention": Row(at=""),
    "vision_transformer_sam.Attention": Row(at="", rotates="yes"),
    "tiny_vit.Attention": Row(Fused(order="head", before=("norm",)), (), at=""),
    "gcvit.WindowAttentionGlobal": Row(at=""),
    "twins.LocallyGroupedAttn": Row(heads_axis=2),
    "twins.GlobalSubSampleAttn": Row(Fused("kv", order="kv", before=("norm",)), reduces="input"),
    "pvt_v2.Attention": Row(Fused("kv", order="kv", before=("norm", "act")), reduces="input"),
    "nextvit.EfficientAttention": Row(
        Separate("q", "k", "v", before=("norm",)), behind=True, reduces="input"
    ),
    "mvitv2.MultiScaleAttention": Row(
        Fused(key_norm="norm_k", value_norm="norm_v"), reduces="output", scores="late"
    ),
    "cait.ClassAttn": Row(behind=True),
    "volo.ClassAttention": Row(Fused("kv", order="kv")),
    "volo.OutlookAttention": Refused("outlook attention: weights over a fixed neighbourhood"),
    "crossvit.CrossAttention": Refused("fuses the class tokens of the branches"),
    "convit.GPSA": Row(Separate("qk", "qk", "v", key_half=True)),
    "tnt.Attention": Row(Separate("qk", "qk", "v", key_half=True), ("norm_out",), behind=True),
    "levit.Attention": Row(Fused(order="head"), ()),
    "levit.AttentionDownsample": MERGING,
    "efficientformer.Attention": Row(Fused(order="head")),
    "efficientformer_v2.Attention2d": Row(
        Separate("q", "k", "v", before=("stride_conv.bn",)), (), reduces="input"
    ),
    "efficientformer_v2.Attention2dDownsample": MERGING,
    "attention2d.MultiQueryAttention2d": Row(None, ("norm",), reduces="output"),
    "attention2d.Attention2d": Row(reduces="output"),
    "lowformer.ConvAttention": _CONVOLVED,
    "cpubone.ConvAttention": _CONVOLVED,
    "iformer.SHMA": Row(Separate("q", "k", "v_gate", value_gate="gate_act"), ()),
    "csatv2.SpatialTransformerBlock": Refused("attends over one channel; a spatial gate"),
    "xcit.XCA": CHANNEL,
    "edgenext.CrossCovarianceAttn": CHANNEL,
    "coat.FactorAttnConvRelPosEnc": LINEAR,
    "mobilevit.LinearSelfAttention": LINEAR,
    "efficientvit_mit.LiteMLA": LINEAR,
    "swiftformer.EfficientAdditiveAttention": LINEAR,
    "efficientvim.HSMSSD": Refused("a state-space model: no softmax over keys"),
    "lambda_layer.LambdaLayer": LINEAR,
    "halo_attn.HaloAttn": Refused("attends over halos cut out of the map by a convolution stem"),
    "bottleneck_attn.BottleneckAttn": Row(Fused(value_width="dim_out_v"), (), behind=True),
    "efficientvit_msra.CascadedGroupAttention": Refused(
        "cascaded heads: the keys of a head depend on what the heads before it made of the prompts"
    ),
    "shvit.SHSA": Refused(
        "its norm runs over the whole map, whose statistics prompts would change"
    ),
}
MODELS: dict[str, str] = {
    "Xcit": "channel attention (XCA) in all blocks: its softmax runs over channels, and prompts "
    "would change their covariance, not be attended to; class attention alone is not VPT"
}
# Names under which blocks hold an attention of the common kind.
_USUAL = ("attn", "attention", "token_mixer")
_POST_NORM = ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm")


def rule(path: str, module: nn.Module, parent: nn.Module) -> Row | Refused | None:
    """Say what a module of a timm model is; unknown classes are told by their layers' names."""
    classes = [cls for cls in type(module).__mro__ if cls.__module__.startswith("timm.")]
    names = (f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in classes)
    found = next((ROWS[name] for name in names if name in ROWS), None)
    usual = path.rpartition(".")[2] in _USUAL and "Pool" not in type(module).__name__
    if found is None and usual and plain_layers(module):
        found = Row()
    return _variant(path, module, parent, found) if isinstance(found, Row) else found


def _variant(path: str, module: nn.Module, parent: nn.Module, found: Row) -> Row | Refused:
    """Settle what depends on the instance: its arguments or its place."""
    name, around = type(module).__name__, type(parent).__name__
    if path.endswith(".attn_in"):
        return Refused("attends over the pixels inside a patch")
    if name in ("AttentionCl", "Attention2d") and not getattr(module, "head_first", True):
        found = found.but(projection=Fused())
    if name == "WindowAttentionGlobal" and module.use_global:
        found = found.but(projection=Fused(order="kv"))
    if path.split(".")[-3:-2] == ["attns"]:
        found = found.but(norms=("norm",), up=3)
    if around in _POST_NORM:
        found = found.but(norms=())
    if around == "ParallelPartitionAttention":
        found = found.but(at=None)
    if type(parent).__module__.endswith(".csatv2"):
        # A pooling in front of the norm, and a convolution between norm and attention.
        found = found.but(behind=True, reduces="input")
    return found
