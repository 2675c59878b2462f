"""transformers' attention classes that are not of the common kind, and what takes no prompts.

The common kind needs no row: layers `q_proj, k_proj, v_proj`, `query, key, value`, `q, k, v` or
`qkv` below a block with a norm in front. Facts as of transformers 5.23; the self-check at injection
holds all of them against the model at hand.
"""

from __future__ import annotations

import dataclasses
import inspect

from torch import nn

from .discover import Refused, Row, plain_layers
from .projection import Fused, Separate

NORMS = (
    "layernorm_before",
    "layer_norm1",
    "norm1",
    "operator_norm",
    "rms_norm1",
    "input_layernorm",
    "attention_norm",
    "pre_attention_layer_norm",
    "layer_norm_1",
    "ln_1",
    "layer_norm",
    "norm",
)
_PLAIN_NAMES = Separate("query", "key", "value")
_UNIT = Separate("query", "key", "value", unit_keys=True)
_REDUCED = Separate("query", "key", "value", before=("layer_norm",))
_CHANNEL = Refused("channel attention: its softmax runs over channels, not over tokens")
_LINEAR = Refused("linear attention: no softmax over keys that prompts could join")
_DEFORMABLE = Refused("deformable attention: weights over sampled points, not over keys")
_DENSE = Row(Fused("qkv"), NORMS, at="block", scores="late", rotates="yes")
ROWS: dict[str, Row | Refused] = {
    "SwinAttention": Row(Separate(), NORMS, at="block"),
    "SwinSelfAttention": Row(_PLAIN_NAMES, NORMS, at="block"),  # up to some transformers 5.x
    "Swinv2SelfAttention": Row(_UNIT, (), at="block"),
    "Swin2SRSelfAttention": Row(_UNIT, (), at="block"),
    "DonutSwinSelfAttention": Row(_PLAIN_NAMES, NORMS, at="block"),
    "MaskFormerSwinSelfAttention": Row(_PLAIN_NAMES, NORMS, at="block"),
    "SamVisionAttention": _DENSE,
    "SamHQVisionAttention": _DENSE,
    "VitDetAttention": _DENSE,
    "SegGptAttention": _DENSE,
    "GotOcr2VisionAttention": _DENSE,
    "SLANeXtVisionAttention": _DENSE,
    "PPFormulaNetVisionAttention": _DENSE,
    "DeepseekOcr2SamVisionAttention": _DENSE,
    "UnlimitedOcrSamVisionAttention": _DENSE,
    "Sam2MultiScaleAttention": Row(norms=NORMS, at="block", scores="unused"),
    "EdgeTamVideoMultiScaleAttention": Row(norms=NORMS, at="block", scores="unused"),
    "SegformerAttention": Row(
        Separate(before=("sequence_reduction.layer_norm",)), NORMS, reduces="input"
    ),
    "SegformerEfficientSelfAttention": Row(_REDUCED, NORMS, reduces="input"),
    "PvtEfficientSelfAttention": Row(_REDUCED, NORMS, reduces="input"),
    "GLPNEfficientSelfAttention": Row(_REDUCED, NORMS, reduces="input"),
    "PvtV2SelfAttention": Row(
        Separate("query", "key", "value", before=("layer_norm", "act")), NORMS, reduces="input"
    ),
    "CvtSelfAttention": Row(
        Separate("projection_query", "projection_key", "projection_value"), NORMS, reduces="output"
    ),
    "LevitAttention": Row(Fused("queries_keys_values", order="head"), ()),
    "VJEPA2RopeAttention": Row(_PLAIN_NAMES, NORMS, rotates="skewed"),
    "Llama4VisionAttention": Row(Separate(), NORMS, rotates="skewed"),
    "XCLIPAttention": Row(Separate(), NORMS, behind=True),
    "TimesformerSelfAttention": Row(norms=NORMS, behind=True),
    "GroupViTAttention": Row(Separate(), NORMS, scores="late"),
    "GroupViTAssignAttention": Refused("assigns tokens to groups; no self-attention"),
    "HieraMaskUnitAttention": Row(norms=NORMS, at="block"),
    "Florence2VisionWindowAttention": Row(norms=NORMS, at="block", behind=True),
    "Florence2VisionChannelAttention": _CHANNEL,
    "MobileViTV2LinearSelfAttention": _LINEAR,
    "SwiftFormerEfficientAdditiveAttention": _LINEAR,
    "LevitAttentionSubsample": Refused(
        "a transition between stages; prompts take no part in merging"
    ),
}
MODELS: dict[str, str] = dict.fromkeys(
    ("EfficientLoFTRModel", "LightGlueForKeypointMatching", "SuperGlueForKeypointMatching"),
    "it matches the features of two images with each other",
)
# By their names: their first argument does not say that they take images.
ALSO = ("Florence2VisionBackbone",)
# In transformers 5.0 these are wrappers around the attention proper, `self`.
_WRAPPERS = ("SwinAttention", "SegformerAttention")
_OTHER_FRAMES = ("message_attn", "temporal_attention")
_REFUSED_NAMES = {
    "Deformable": _DEFORMABLE,
    "CrossAttention": Refused("cross-attention to another sequence"),
    "PoolingHead": Refused("pools the finished tokens"),
}


def rule(path: str, module: nn.Module, parent: nn.Module) -> Row | Refused | None:
    """Say what a module of a transformers model is."""
    name = type(module).__name__
    parts = path.split(".")
    if isinstance(module, nn.MultiheadAttention):
        # Refused where blocks are found; named here so that the model counts as known.
        return Refused("torch.nn.MultiheadAttention")
    if any(part in _OTHER_FRAMES for part in parts) and hasattr(module, "forward"):
        return (
            Refused("attends over frames, not over the tokens of one")
            if plain_layers(module)
            else None
        )
    if "predictor" in parts or any(part.startswith("pre_assign") for part in parts):
        return None
    for cls in type(module).__mro__:
        if cls.__name__ in ROWS:
            row = ROWS[cls.__name__]
            if isinstance(row, Row) and name in _WRAPPERS and hasattr(module, "self"):
                return None  # its part `self` attends
            return row if isinstance(row, Refused) else _placed(path, row)
    if "ttention" not in name:
        return None
    refused = next((r for part, r in _REFUSED_NAMES.items() if part in name), None)
    projection = plain_layers(module)
    if refused is not None or projection is None:
        return refused if projection is not None else None
    called_with = inspect.signature(type(module).forward).parameters
    row = Row(projection, NORMS, rotates="yes", many="cu_seqlens" in called_with)
    return _placed(path, row)


def _placed(path: str, row: Row) -> Row:
    """Find the block: the attention's parent, or that of the wrapper it shares a name with."""
    parts = path.split(".")
    nested = len(parts) > 1 and parts[-1] in ("self", "attention") and parts[-2] == "attention"
    nested = nested or parts[-2:-1] == ["attn"]
    return dataclasses.replace(row, up=2 if nested else 1)
