"""transformers' attention classes that are not of the common kind, and what takes no prompts.

The common kind needs no row: layers `q_proj, k_proj, v_proj`, `query, key, value`, `q, k, v` or
`qkv` below a block with a norm in front. Facts as of transformers 5.23; the self-check at injection
holds all of them against the model at hand.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import nn

from .discover import Refused, Row, plain_layers, row
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
_DENSE = row(Fused("qkv"), NORMS, at="", scores="late", rotates="yes")
ROWS: dict[str, Row | Refused] = {
    "SwinAttention": row(Separate(), NORMS, at=""),
    "SwinSelfAttention": row(_PLAIN_NAMES, NORMS, at=""),  # up to some transformers 5.x
    "Swinv2SelfAttention": row(_UNIT, (), at=""),
    "Swin2SRSelfAttention": row(_UNIT, (), at=""),
    "DonutSwinSelfAttention": row(_PLAIN_NAMES, NORMS, at=""),
    "MaskFormerSwinSelfAttention": row(_PLAIN_NAMES, NORMS, at=""),
    "SamVisionAttention": _DENSE,
    "SamHQVisionAttention": _DENSE,
    "VitDetAttention": _DENSE,
    "SegGptAttention": _DENSE,
    "GotOcr2VisionAttention": _DENSE,
    "SLANeXtVisionAttention": _DENSE,
    "PPFormulaNetVisionAttention": _DENSE,
    "DeepseekOcr2SamVisionAttention": _DENSE,
    "UnlimitedOcrSamVisionAttention": _DENSE,
    "Sam2MultiScaleAttention": row(norms=NORMS, at="", scores="unused"),
    "EdgeTamVideoMultiScaleAttention": row(norms=NORMS, at="", scores="unused"),
    "SegformerAttention": row(
        Separate(before=("sequence_reduction.layer_norm",)), NORMS, reduces="input"
    ),
    "SegformerEfficientSelfAttention": row(_REDUCED, NORMS, reduces="input"),
    "PvtEfficientSelfAttention": row(_REDUCED, NORMS, reduces="input"),
    "GLPNEfficientSelfAttention": row(_REDUCED, NORMS, reduces="input"),
    "PvtV2SelfAttention": row(
        Separate("query", "key", "value", before=("layer_norm", "act")), NORMS, reduces="input"
    ),
    "CvtSelfAttention": row(
        Separate("projection_query", "projection_key", "projection_value"), NORMS, reduces="output"
    ),
    "LevitAttention": row(Fused("queries_keys_values", order="head"), ()),
    "VJEPA2RopeAttention": row(_PLAIN_NAMES, NORMS, rotates="skewed"),
    "Llama4VisionAttention": row(Separate(), NORMS, rotates="skewed"),
    "XCLIPAttention": row(Separate(), NORMS, behind=True),
    "TimesformerSelfAttention": row(norms=NORMS, behind=True),
    "GroupViTAttention": row(Separate(), NORMS, scores="late"),
    "GroupViTAssignAttention": Refused("assigns tokens to groups; no self-attention"),
    "HieraMaskUnitAttention": row(norms=NORMS, at=""),
    "Florence2VisionWindowAttention": row(norms=NORMS, at="", behind=True),
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
            known = ROWS[cls.__name__]
            if isinstance(known, Row) and name in _WRAPPERS and hasattr(module, "self"):
                return None  # its part `self` attends
            return known if isinstance(known, Refused) else _placed(path, known)
    if "ttention" not in name:
        return None
    refused = next((r for part, r in _REFUSED_NAMES.items() if part in name), None)
    projection = plain_layers(module)
    if refused is not None or projection is None:
        return refused if projection is not None else None
    called_with = inspect.signature(type(module).forward).parameters
    found = row(projection, NORMS, rotates="yes", many="cu_seqlens" in called_with)
    return _placed(path, found)


def _placed(path: str, found: Row) -> Row:
    """Find the block: the attention's parent, or that of the wrapper it shares a name with."""
    parts = path.split(".")
    nested = len(parts) > 1 and parts[-1] in ("self", "attention") and parts[-2] == "attention"
    nested = nested or parts[-2:-1] == ["attn"]
    return replace(found, up=2 if nested else 1)
