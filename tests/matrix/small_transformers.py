"""A small, randomly initialised vision model of every transformers family, with inputs for it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

# A vision class takes one of these first and no text; a grid marks the packed towers.
_FIRST = ("pixel_values", "pixel_values_videos", "flattened_patches", "image", "inputs")
_TEXT = ("input_ids", "decoder_input_ids", "qformer_input_ids")
# Where a file has several: a class with a head first, then the tower, then what remains.
_RANK = (
    r"For(Image|Video)Classification Vision\w*Model$ VisionTransformer$ VisionEncoder$ "
    r"ViTModel$ Model$ Backbone$ For\w+$"
)
_CHOICE = {
    "florence2": "Florence2VisionBackbone",
    "lw_detr": "LwDetrViTBackbone",
    "rf_detr": "RfDetrDinov2Backbone",
    "uvdoc": "UVDocBackbone",
}

_LIMITS = {
    1: "insert_layer_id merge_index num_first_full_attention_layers num_last_full_attention_layers",
    2: "decoder_layers encoder_layers num_auxiliary_layers num_blocks num_global_layers "
    "num_key_value_attention_heads num_pooler_layers num_temporal_layers pred_num_hidden_layers",
    3: "depth num_hidden_layers num_layers num_spatial_layers",
    4: "attention_heads frames_per_clip num_attention_heads num_frames num_heads "
    "num_key_value_heads num_windows pos_emb_height pos_emb_width",
    10: "num_queries",
    16: "head_dim",
    32: "fpn_hidden_size projection_dim",
    64: "adapter_in_dim adapter_out_dim embed_dim hidden_size moe_intermediate_size "
    "out_hidden_size projector_input_dim projector_output_dim reassemble_hidden_size "
    "text_hidden_size",
    128: "decoder_ffn_dim encoder_ffn_dim intermediate_size mlp_dim vision_output_dim",
}
_CAPS = {name: limit for limit, names in _LIMITS.items() for name in names.split()}
# Indices of layers, which have to be among those that are left.
_FIXED = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attention_blocks": [4],
    "intermediate_hook_ids": [2, 1],
    "intermediate_layers_indices": [1],
    "window_block_indexes": [0, 2],
    "window_block_indices": [0, 2],
}
_DEPTHS = ("depths", "depth", "stage_num_blocks", "num_layers")
_WIDTHS = ("hidden_sizes", "embed_dim", "embed_dims")
# What a config works out from its other values.
_DERIVED = ("stage_names", "id2label", "label2id", "layer_types")

# Four stages of 4x4 windows, of which the first three can be shifted.
_SWIN = dict(image_size=128, embed_dim=24, window_size=4)
# Windows that do not divide the grid, as at the full size, and one global layer.
_SAM = dict(image_size=128, window_size=3, global_attn_indexes=[1])
_EFFICIENT = dict(width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640)
_EVA = dict(img_size=64, embed_dim=64, depth=3, num_heads=4)
_TILE = dict(image_size=64, patch_size=16)
_CONFIGS: dict[str, dict[str, Any]] = {
    "AlignVisionConfig": _EFFICIENT,
    "BeitConfig": dict(use_relative_position_bias=True),
    "CvtConfig": dict(depth=(1, 2, 3)),
    "Data2VecVisionConfig": dict(use_relative_position_bias=True),
    "DeepseekOcr2SamVisionConfig": _SAM | dict(downsample_channels=[32, 64]),
    "DepthProConfig": dict(
        patch_size=64, image_model_config=_TILE, patch_model_config=_TILE, fov_model_config=_TILE
    ),
    "DonutSwinConfig": _SWIN,
    "Dots3NoteVisionConfig": dict(pyramid_num_routed=[-1, -1, 4], mlp_layer_types=None),
    "EfficientLoFTRConfig": dict(hidden_size=256, num_attention_heads=8),
    "EfficientNetConfig": _EFFICIENT,
    "GotOcr2VisionConfig": _SAM,
    "HieraConfig": dict(image_size=(64, 64), embed_dim=16),
    "InklingVisionConfig": dict(n_layers=3),
    "Llama4VisionConfig": dict(intermediate_size=256),
    "MaskFormerSwinConfig": _SWIN,
    "PPFormulaNetVisionConfig": _SAM,
    "PeVideoEncoderConfig": dict(
        vision_config=dict(architecture="vit_pe_core_tiny_patch16_384", model_args=_EVA)
    ),
    "PerceiverConfig": dict(num_latents=8, d_latents=64, d_model=64, num_self_attends_per_block=3),
    "SLANeXtVisionConfig": _SAM,
    "Sam2HieraDetConfig": dict(
        image_size=[128, 128],
        hidden_size=16,
        blocks_per_stage=[1, 2, 3, 2],
        embed_dim_per_stage=[16, 32, 64, 128],
        window_size_per_stage=[8, 4, 6, 3],
    ),
    "Sam2VisionConfig": dict(backbone_channel_list=[128, 64, 32, 16]),
    "Sam3ViTConfig": _SAM | dict(image_size=112, pretrain_image_size=56, window_size=4),
    "SamHQVisionConfig": _SAM,
    "SamVisionConfig": _SAM,
    "SegGptConfig": dict(image_size=[128, 64]),
    "SuperGlueConfig": dict(hidden_size=256),
    "SwinConfig": _SWIN,
    "Swin2SRConfig": _SWIN | dict(image_size=32, depths=(2, 2), num_heads=(2, 2)),
    "Swinv2Config": _SWIN,
    "TimmBackboneConfig": dict(backbone="test_resnet"),
    "TimmWrapperConfig": dict(architecture="test_vit"),
    "UnlimitedOcrSamVisionConfig": _SAM | dict(downsample_channels=(32, 64)),
    "VitDetConfig": dict(image_size=128, window_size=3, use_relative_position_embeddings=True),
    "VitMatteConfig": dict(fusion_hidden_sizes=[32, 16, 8, 8], convstream_hidden_sizes=[8, 16, 32]),
}

# Files that name images and hold no vision model of their own, with reasons.
_SKIPS = {
    "the vision tower is a class of another file": "aria aya_vision cohere2_vision "
    "colmodernvbert colpali colqwen2 cosmos3_omni deepseek_vl deepseek_vl_hybrid diffusion_gemma "
    "edgetam_video embedding_gemma2 fast_vlm gemma3 gemma3n glm46v granite4_vision "
    "hyperclovax_vision_v2 lfm2_vl lighton_ocr llava llava_next llava_next_video "
    "llava_onevision mistral3 mistral_large4 modernvbert nemotron_h_omni paligemma "
    "pe_audio_video perception_lm pi0 sam2_video sam3_lite_text sam3_tracker "
    "sam3_tracker_video sam3_video shieldgemma2 t5gemma2 ultravbert video_llava vipllava "
    "vision_encoder_decoder vision_text_dual_encoder",
    "text and image tokens share the blocks": "fuyu gemma4_unified layoutlmv3 neomme udop vilt",
    "a detector that reads text; its backbone is a class of another file": "grounding_dino "
    "mm_grounding_dino omdet_turbo tvp",
    "the vision tower is a plain module inside a model that reads text": "idefics",
    "the vision part is a convolutional tokenizer": "chameleon emu3",
    "a convolutional timm backbone; its transformer decodes prompts": "edgetam",
    "a convolutional text detector": "pp_ocrv5_server_det pp_ocrv6_medium_det pp_ocrv6_small_det",
    "not vision": "musicgen musicgen_melody trocr",
    "needs the natten package": "dinat",
}
SKIPPED: dict[str, str] = {file: why for why, files in _SKIPS.items() for file in files.split()}

# Shapes of random tensors as tuples, integers as lists; `first` is the first argument of `forward`.
_GRID = [[1, 8, 8], [1, 4, 8]]
_STRIP = dict(first=(1, 3, 16, 16 * 96), target_sizes=[[8, 8], [4, 8]])
_PAIRS = dict(first=(2, 2, 3, 64, 64))
_MASK = [[1] * 16, [1] * 8 + [0] * 8]
_FULL = [[column, row] for row in range(6) for column in range(6)]
_PLACES = [_FULL, _FULL[:18] + [[-1, -1]] * 18]
_INPUTS: dict[str, dict[str, Any]] = {
    "DepthProModel": dict(first=(2, 3, 256, 256)),
    "EfficientLoFTRModel": dict(first=(2, 2, 3, 128, 128)),
    "Gemma4VisionModel": dict(first=(2, 36, 768), pixel_position_ids=_PLACES),
    "Inkling2VisionModel": dict(first=(24, 40, 40, 3), image_grid_thw=[[1, 4, 4], [1, 2, 4]]),
    "InklingVisionModel": dict(first=(4, 2, 40, 40, 3)),
    "Kimi_K25VisionModel": dict(first=(96, 3, 14, 14), grid_thw=_GRID),
    "LightGlueForKeypointMatching": _PAIRS,
    "MiniCPMOcrVisionModel": _STRIP,
    "MiniCPMV4_6VisionModel": _STRIP,
    "MiniCPMV4_7VisionModel": _STRIP,
    "MllamaVisionModel": dict(
        first=(2, 1, 4, 3, 56, 56),
        aspect_ratio_ids=[[6], [2]],
        aspect_ratio_mask=[[[1, 1, 1, 1]], [[1, 1, 0, 0]]],
    ),
    "Molmo2VisionModel": dict(first=(2, 16, 588)),
    "OneFormerModel": dict(first=(2, 3, 128, 128), task_inputs=(2, 77)),
    "PPOCRV5MobileRecModel": dict(first=(2, 3, 96, 96)),
    "PaddleOCRVisionModel": dict(first=(1, 96, 3, 14, 14), grid_thw=_GRID),
    "PeVideoEncoder": dict(first=(2, 2, 3, 64, 64)),
    "PerceiverForImageClassificationLearned": dict(first=(2, 3, 64, 64)),
    "SegGptModel": dict.fromkeys(("first", "prompt_pixel_values", "prompt_masks"), (2, 3, 64, 64)),
    "Siglip2ForImageClassification": dict(
        first=(2, 16, 768), spatial_shapes=[[4, 4], [2, 4]], pixel_attention_mask=_MASK
    ),
    "SuperGlueForKeypointMatching": _PAIRS,
    "ViTMAEModel": dict(first=(2, 3, 64, 64), noise=(2, 16)),
    "VideoLlama3VisionModel": dict(first=(96, 768), grid_thw=_GRID, merge_sizes=[1, 2]),
    "VideomtForUniversalSegmentation": dict(first=(2, 2, 3, 64, 64)),
    "XCLIPVisionModel": dict(first=(8, 3, 128, 128)),
}


def names() -> list[str]:
    """List one vision class per modeling file of the installed transformers."""
    return [cls.__name__ for cls in _classes().values() if cls is not None]


def unlisted() -> list[str]:
    """List the files that mention images and are neither in `names` nor in `SKIPPED`."""
    return [file for file, cls in _classes().items() if cls is None]


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a small model of a class of `names` and an input of two images.

    Args:
        name: The class.

    Returns:
        The model, on the CPU and in eval mode, and keyword arguments to call it with.
    """
    cls: Any = next(cls for cls in _classes().values() if cls and cls.__name__ == name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = _shrunk(cls.config_class(), {})
        model: nn.Module = cls(config)
        return model.eval(), inputs(cls, config)


@functools.lru_cache(maxsize=1)
def _classes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    root = Path(importlib.import_module("transformers.models").__path__[0])
    for path in sorted(root.glob("*/modeling_*.py")):
        file = path.stem.removeprefix("modeling_")
        if file.startswith(("flax_", "tf_")):
            continue
        text = path.read_text(encoding="utf-8")
        if file not in SKIPPED and re.search("pixel_values|grid_thw|flattened_patches", text):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            found[file] = _chosen(file, module)
    return found


def _chosen(file: str, module: Any) -> Any:
    from transformers import PreTrainedModel

    if file in _CHOICE:
        return getattr(module, _CHOICE[file])
    owned: list[Any] = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
    ]
    vision = [cls for cls in owned if cls.config_class and _takes_images_only(cls)]
    return min(vision, key=lambda cls: _rank(cls.__name__), default=None)


def _takes_images_only(cls: Any) -> bool:
    parameters = parameters_of(cls)
    packed = parameters[:1] == ["hidden_states"] and "grid_thw" in parameters
    return (packed or parameters[0] in _FIRST) and not set(_TEXT) & set(parameters)


def _rank(name: str) -> tuple[int, int]:
    places = (place for place, pattern in enumerate(_RANK.split()) if re.search(pattern, name))
    return next(places, len(_RANK)), len(name)


def _shrunk(config: Any, changes: dict[str, Any]) -> Any:
    """Make a config of the same class anew, so that it works out its derived values itself."""
    changes = {**_CONFIGS.get(type(config).__name__, {}), **changes}
    default = vars(type(config)())
    declared = _declared(config)
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if is_config(value):
            values[name] = _shrunk(value, changes.pop(name, {}))
        elif not name.startswith("_") and name not in _DERIVED:
            small = _smaller(name, value, config)
            # An undeclared value is derived, unless whoever made this config chose it.
            if small != default.get(name) and (name in declared or small == value):
                values[name] = small
    return type(config)(**{**values, **_features(config), **changes})


def _smaller(name: str, value: Any, config: Any) -> Any:
    if name in _FIXED:
        return _FIXED[name]
    if name in ("image_size", "pretrain_image_size"):
        size = _image_size(config)
        return type(value)((size, size)) if isinstance(value, list | tuple) else size
    if name == "window_size" and value == 112:  # In pixels: two by two merged patches.
        return 56
    if isinstance(value, int) and not isinstance(value, bool):
        return min(value, _CAPS.get(name, value))
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], int):
        return value
    if name in _DEPTHS:
        return type(value)(min(depth, 2) for depth in value)
    heads = getattr(config, "num_attention_heads", getattr(config, "num_heads", None))
    if name in _WIDTHS and isinstance(heads, list | tuple) and len(heads) == len(value):
        return type(value)(8 * count for count in heads)
    return value


def _image_size(config: Any) -> int:
    patch = getattr(config, "patch_size", None)
    patch = max(patch) if isinstance(patch, list | tuple) else patch
    return 4 * patch if isinstance(patch, int) and patch >= 8 else 64


def _features(config: Any) -> dict[str, Any]:
    """Ask the last layers for what the default asks of layers that are left out."""
    indices = getattr(config, "out_indices", None)
    layers = vars(config).get("num_hidden_layers")
    if not isinstance(indices, list | tuple) or len(indices) < 2:
        return {}
    if not isinstance(layers, int):
        return {"out_indices": indices}
    layers = max(len(indices), _CAPS["num_hidden_layers"])
    taken = list(range(layers - len(indices) + 1, layers + 1))
    return {"num_hidden_layers": layers, "out_indices": taken}


def _declared(config: Any) -> set[str]:
    if dataclasses.is_dataclass(config):
        return {field.name for field in dataclasses.fields(config)}
    return {
        n
        for cls in type(config).__mro__
        if cls is not object
        for n in inspect.signature(cls).parameters
    } - {"self", "kwargs"}


def inputs(cls: Any, config: Any) -> dict[str, Any]:
    """Return keyword arguments of two images for a model of a class.

    Args:
        cls: Of transformers.
        config: Of the model.
    """
    parameters = parameters_of(cls)
    wanted = _INPUTS.get(cls.__name__)
    if wanted is None and parameters[0] == "flattened_patches":
        wanted = _flattened()
    elif wanted is None and "grid_thw" in parameters:
        wanted = _packed(config)
    elif wanted is None:
        size = _first(config, "image_size") or 64
        frames = _first(config, "num_frames", "frames_per_clip")
        channels = _first(config, "num_channels", "in_channels") or 3
        sides = (size, size) if isinstance(size, int) else tuple(size)
        wanted = {"first": (2, *((frames,) if frames else ()), channels, *sides)}
    return {
        parameters[0] if name == "first" else name: _tensor(value) for name, value in wanted.items()
    }


def _packed(config: Any) -> dict[str, Any]:
    patch = _first(config, "patch_size")
    frames = _first(config, "temporal_patch_size", "patch_temporal") or 1
    channels = _first(config, "in_channels", "num_channels") or 3
    return {"first": (sum(map(math.prod, _GRID)), channels * frames * patch**2), "grid_thw": _GRID}


def _flattened() -> dict[str, Any]:
    """Flatten 4x4 and 2x4 patches as Pix2Struct does: row, column, pixels; padding is zero."""
    places = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5))
    patches = torch.cat([places.expand(2, -1, -1), torch.randn(2, 16, 768)], dim=-1)
    patches[1, 8:] = 0
    return {"first": patches}


def _tensor(value: Any) -> Any:
    if isinstance(value, tuple):
        return torch.randn(value)
    return torch.tensor(value) if isinstance(value, list) else value


def _first(config: Any, *wanted: str) -> Any:
    """Find a value in a config or in the configs inside it."""
    values = [getattr(config, name, None) for name in wanted]
    values += [_first(part, *wanted) for part in vars(config).values() if is_config(part)]
    return next((value for value in values if value is not None), None)


def parameters_of(cls: Any) -> list[str]:
    """Return the names of the arguments of a class's `forward`."""
    return list(inspect.signature(cls.forward).parameters)[1:]


def is_config(value: Any) -> bool:
    """Tell whether a value is a config of transformers."""
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)
