"""transformers' attention classes that are not of the common kind, and what takes no prompts.

The common kind needs no row: layers `q_proj, k_proj, v_proj`, `query, key, value`, `q, k, v` or
`qkv` below a block with a norm in front. Facts as of transformers 5.23; the self-check at injection
holds all of them against the model at hand.
"""

from __future__ import annotations

import inspect

from torch import nn

from .discover import CHANNEL, LINEAR, MERGING, Refused, Row, plain_layers
from .projection import Fused, Separate

_UNIT = Separate("query", "key", "value", unit_keys=True)
_REDUCED = Separate("query", "key", "value", before=("layer_norm",))
_DENSE = Row(at="", scores="late", rotates="yes")
ROWS: dict[str, Row | Refused] = {
    "SwinAttention": Row(at=""),
    "SwinSelfAttention": Row(at=""),  # up to some transformers 5.x
    "Swinv2SelfAttention": Row(_UNIT, (), at=""),
    "Swin2SRSelfAttention": Row(_UNIT, (), at=""),
    "DonutSwinSelfAttention": Row(at=""),
    "MaskFormerSwinSelfAttention": Row(at=""),
    "SamVisionAttention": _DENSE,
    "SamHQVisionAttention": _DENSE,
    "VitDetAttention": _DENSE,
    "SegGptAttention": _DENSE,
    "GotOcr2VisionAttention": _DENSE,
    "SLANeXtVisionAttention": _DENSE,
    "PPFormulaNetVisionAttention": _DENSE,
    "DeepseekOcr2SamVisionAttention": _DENSE,
    "UnlimitedOcrSamVisionAttention": _DENSE,
    "Sam2MultiScaleAttention": Row(at="", scores="unused"),
    "EdgeTamVideoMultiScaleAttention": Row(at="", scores="unused"),
    "SegformerAttention": Row(Separate(before=("sequence_reduction.layer_norm",)), reduces="input"),
    "SegformerEfficientSelfAttention": Row(_REDUCED, reduces="input"),
    "PvtEfficientSelfAttention": Row(_REDUCED, reduces="input"),
    "GLPNEfficientSelfAttention": Row(_REDUCED, reduces="input"),
    "PvtV2SelfAttention": Row(
        Separate("query", "key", "value", before=("layer_norm", "act")), reduces="input"
    ),
    "CvtSelfAttention": Row(
        Separate("projection_query", "projection_key", "projection_value"), reduces="output"
    ),
    "LevitAttention": Row(Fused("queries_keys_values", order="head"), ()),
    "VJEPA2RopeAttention": Row(rotates="skewed"),
    "Llama4VisionAttention": Row(rotates="skewed"),
    "XCLIPAttention": Row(behind=True),
    "TimesformerSelfAttention": Row(behind=True),
    "GroupViTAttention": Row(scores="late"),
    "GroupViTAssignAttention": Refused("assigns tokens to groups; no self-attention"),
    "HieraMaskUnitAttention": Row(at=""),
    "Florence2VisionWindowAttention": Row(at="", behind=True),
    "Florence2VisionChannelAttention": CHANNEL,
    "MobileViTV2LinearSelfAttention": LINEAR,
    "SwiftFormerEfficientAdditiveAttention": LINEAR,
    "LevitAttentionSubsample": MERGING,
}
MODELS: dict[str, str] = dict.fromkeys(
    ("EfficientLoFTRModel", "LightGlueForKeypointMatching", "SuperGlueForKeypointMatching"),
    "it matches the features of two images with each other",
)
# By their names: their first argument does not say that they take images.
ALSO = ("Florence2VisionBackbone",)
_OTHER_FRAMES = ("message_attn", "temporal_attention")
_FRAMES = Refused("attends over frames, not over the tokens of one")
_REFUSED_NAMES = {
    "Deformable": Refused("deformable attention: weights over sampled points, not over keys"),
    "CrossAttention": Refused("cross-attention to another sequence"),
    "PoolingHead": Refused("pools the finished tokens"),
}


def rule(path: str, module: nn.Module, parent: nn.Module) -> Row | Refused | None:
    """Say what a module of a transformers model is."""
    name = type(module).__name__
    parts = path.split(".")
    if isinstance(module, nn.MultiheadAttention):
        return Refused("torch.nn.MultiheadAttention computes its softmax out of reach")
    if any(part in _OTHER_FRAMES for part in parts) and hasattr(module, "forward"):
        return _FRAMES if plain_layers(module) else None
    if "predictor" in parts or any(part.startswith("pre_assign") for part in parts):
        return None
    known = next((ROWS[c.__name__] for c in type(module).__mro__ if c.__name__ in ROWS), None)
    if known is not None:
        # In transformers 5.0 some are wrappers around the attention proper, `self`.
        return None if hasattr(module, "self") else _placed(path, known)
    projection = plain_layers(module) if "ttention" in name else None
    if projection is None:
        return None
    refused = next((r for part, r in _REFUSED_NAMES.items() if part in name), None)
    called_with = inspect.signature(type(module).forward).parameters
    return refused or _placed(
        path, Row(projection, rotates="yes", many="cu_seqlens" in called_with)
    )


def _placed(path: str, found: Row | Refused) -> Row | Refused:
    """Find the block: the attention's parent, or that of the wrapper it shares a name with."""
    parts = path.split(".")
    nested = len(parts) > 1 and parts[-1] in ("self", "attention") and parts[-2] == "attention"
    nested = nested or parts[-2:-1] == ["attn"]
    return found.but(up=2) if nested and isinstance(found, Row) else found
