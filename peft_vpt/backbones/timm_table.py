"""timm's attention classes: how each makes its keys and values, or why it takes no prompts.

Keys are `<file>.<class>` below `timm.models` or `timm.layers`. Facts as of timm 1.0.31; the
self-check at injection holds every one of them against the model at hand.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .discover import Refused, Row, plain_layers, row
from .projection import Fused, Separate

_CHANNEL = Refused("channel attention: its softmax runs over channels, not over tokens")
_LINEAR = Refused("linear attention: no softmax over keys that prompts could join")
_MERGING = Refused("a transition between stages; prompts take no part in merging")
ROWS: dict[str, Row | Refused] = {
    "attention.Attention": row(),
    "vision_transformer.Attention": row(),  # its home up to timm 1.0.15
    "attention.AttentionRope": row(rotates="yes"),
    "eva.EvaAttention": row(rotates="yes"),
    "beit.Attention": row(),
    "vision_transformer_relpos.RelPosAttention": row(),
    "vision_transformer.ParallelScalingBlock": row(Fused("in_proj"), ("in_norm",), up=0),
    "gemma4_vit.Gemma4Attention": row(Separate(), rotates="yes"),
    "diff_attention.DiffAttention": Refused(
        "differential attention: two softmaxes with opposite signs, so extra keys cancel out"
    ),
    "vision_transformer.DiffParallelScalingBlock": Refused(
        "differential attention: two softmaxes with opposite signs, so extra keys cancel out"
    ),
    # Windows are cut by the block, so it is the block whose forward is replaced.
    "swin_transformer.WindowAttention": row(at=""),
    "swin_transformer_v2.WindowAttention": row(Fused(unit_keys=True), (), at=""),
    "swin_transformer_v2_cr.WindowMultiHeadAttention": row(Fused(unit_keys=True), (), at=""),
    "davit.WindowAttention": row(at="", behind=True),
    "davit.ChannelAttention": _CHANNEL,
    "davit.ChannelAttentionV2": _CHANNEL,
    "maxxvit.AttentionCl": row(Fused(order="head"), at=""),
    "maxxvit.Attention2d": row(Fused(order="head"), at="", reduces="input"),
    "hiera.MaskUnitAttention": row(at=""),
    "hieradet_sam2.MultiScaleAttention": row(at=""),
    "vision_transformer_sam.Attention": row(at="", rotates="yes"),
    "tiny_vit.Attention": row(Fused(order="head", before=("norm",)), (), at=""),
    "nest.Attention": row(),
    "gcvit.WindowAttentionGlobal": row(at=""),
    "twins.LocallyGroupedAttn": row(heads_axis=2),
    "twins.GlobalSubSampleAttn": row(Fused("kv", order="kv", before=("norm",)), reduces="input"),
    "pvt_v2.Attention": row(Fused("kv", order="kv", before=("norm", "act")), reduces="input"),
    "nextvit.EfficientAttention": row(
        Separate("q", "k", "v", before=("norm",)), behind=True, reduces="input"
    ),
    "mvitv2.MultiScaleAttention": row(
        Fused(key_norm="norm_k", value_norm="norm_v"), reduces="output", scores="late"
    ),
    "cait.TalkingHeadAttn": row(),
    "cait.ClassAttn": row(Separate("q", "k", "v"), behind=True),
    "volo.Attention": row(),
    "volo.ClassAttention": row(Fused("kv", order="kv")),
    "volo.OutlookAttention": Refused("outlook attention: weights over a fixed neighbourhood"),
    "crossvit.CrossAttention": Refused("fuses the class tokens of the branches"),
    "convit.GPSA": row(Separate("qk", "qk", "v", key_half=True)),
    "convit.MHSA": row(),
    "tnt.Attention": row(Separate("qk", "qk", "v", key_half=True), ("norm_out",), behind=True),
    "levit.Attention": row(Fused(order="head"), ()),
    "levit.AttentionDownsample": _MERGING,
    "metaformer.Attention": row(),
    "fastvit.Attention": row(),
    "visformer.Attention": row(),
    "efficientformer.Attention": row(Fused(order="head")),
    "efficientformer_v2.Attention2d": row(
        Separate("q", "k", "v", before=("stride_conv.bn",)), (), reduces="input"
    ),
    "efficientformer_v2.Attention2dDownsample": _MERGING,
    "attention2d.MultiQueryAttention2d": row(
        Separate("query", "key", "value"), ("norm",), reduces="output"
    ),
    "attention2d.Attention2d": row(Separate("query", "key", "value"), reduces="output"),
    "lowformer.ConvAttention": row(
        Fused("pwise", order="head", before=("conv_proj.norm", "conv_proj.act")),
        (),
        behind=True,
        reduces="input",
    ),
    "cpubone.ConvAttention": row(
        Fused("pwise", order="head", before=("conv_proj.norm", "conv_proj.act")),
        (),
        behind=True,
        reduces="input",
    ),
    "iformer.SHMA": row(Separate("q", "k", "v_gate", value_gate="gate_act"), ()),
    "csatv2.SpatialTransformerBlock": Refused("attends over one channel; a spatial gate"),
    "xcit.XCA": _CHANNEL,
    "edgenext.CrossCovarianceAttn": _CHANNEL,
    "coat.FactorAttnConvRelPosEnc": _LINEAR,
    "mobilevit.LinearSelfAttention": _LINEAR,
    "efficientvit_mit.LiteMLA": _LINEAR,
    "swiftformer.EfficientAdditiveAttention": _LINEAR,
    "efficientvim.HSMSSD": Refused("a state-space model: no softmax over keys"),
    "lambda_layer.LambdaLayer": _LINEAR,
    "halo_attn.HaloAttn": Refused("attends over halos cut out of the map by a convolution stem"),
    "bottleneck_attn.BottleneckAttn": row(Fused(value_width="dim_out_v"), (), behind=True),
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
_POST_NORM = ("ResPostBlock", "ResPostRelPosBlock", "EvaBlockPostNorm")


def rule(path: str, module: nn.Module, parent: nn.Module) -> Row | Refused | None:
    """Say what a module of a timm model is; unknown classes are told by their layers' names."""
    found = _row(path, module)
    if not isinstance(found, Row):
        return found
    if type(parent).__name__ in _POST_NORM:
        return replace(found, norms=())
    if type(parent).__name__ == "ParallelPartitionAttention":
        return found.but(at=None)
    if type(parent).__module__.endswith(".csatv2"):
        # A pooling in front of the norm, and a convolution between norm and attention.
        return found.but(behind=True, reduces="input")
    return found


def _row(path: str, module: nn.Module) -> Row | Refused | None:
    for cls in type(module).__mro__:
        found = ROWS.get(f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}")
        if found is not None and cls.__module__.startswith("timm."):
            return _variant(path, module, found)
    if "Pool" in type(module).__name__ or path.rpartition(".")[2] not in ("attn", "attention"):
        return None
    projection = plain_layers(module)
    return None if projection is None else row(projection)


def _variant(path: str, module: nn.Module, found: Row | Refused) -> Row | Refused | None:
    """Settle what depends on the instance: its arguments or its place."""
    if isinstance(found, Refused):
        return found
    name = type(module).__name__
    if name in ("EvaAttention", "AttentionRope") and getattr(module, "qkv", None) is None:
        return found.but(projection=Separate())
    if name in ("AttentionCl", "Attention2d") and not getattr(module, "head_first", True):
        return found.but(projection=Fused())
    if name == "WindowAttentionGlobal" and module.use_global:
        return found.but(projection=Fused(order="kv"))
    if path.endswith(".attn_in"):
        return Refused("attends over the pixels inside a patch")
    parts = path.split(".")
    if len(parts) > 2 and parts[-3] == "attns":
        return replace(found, norms=("norm",), up=3)
    return found
