"""Names of backbone weights in an adapter file: by block and role, equal across libraries."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..backbones.anatomy import Block, Encoder
from ..backbones.paths import join
from ..backbones.projection import Fused, Separate

# What a module inside a block is for, by the names that timm and transformers give it.
_ROLES = (
    (r"norm1|layernorm_before|layer_norm1|layer_norm_1", "norm1"),
    (r"norm2|layernorm_after|layer_norm2|layer_norm_2", "norm2"),
    (r"mlp\.fc1", "fc1"),
    (r"mlp\.fc2", "fc2"),
    (r"ls1\.gamma|layer_scale1\.lambda1|gamma_1|lambda_1", "ls1"),
    (r"ls2\.gamma|layer_scale2\.lambda1|gamma_2|lambda_2", "ls2"),
    # transformers' BEiT has it beside the attention.
    (r"relative_position_bias\.relative_position_bias_table", "bias_table"),
)
_OUTPUT = re.compile(r"proj|o_proj|out_proj|output\.dense")
# Outside the blocks, relative to the encoder.
_OUTSIDE = (
    (r"patch_embed\.proj|(.+\.)?patch_embeddings?(\.projection)?", "patch"),
    (r"cls_token|embeddings\.(cls_token|class_embedding)", "cls"),
    (r"pos_embed|embeddings\.position_embeddings", "pos"),
)


class Place(NamedTuple):
    """Where a tensor of the file lives: a parameter of the host, or the n-th third of one."""

    name: str
    third: int | None = None

    def of(self, host_tensors: dict[str, Any]) -> Tensor:
        """Return the tensor, a view where it is a third."""
        tensor: Tensor = host_tensors[self.name]
        return tensor if self.third is None else tensor.chunk(3)[self.third]


def file_names(host: nn.Module, encoder: Encoder, names: Iterable[str]) -> dict[str, Place]:
    """Return the place of every tensor under its name in a file, without the `delta.` in front.

    Args:
        host: The model.
        encoder: Its anatomy.
        names: Of parameters and buffers of the host.
    """
    found: dict[str, Place] = {}
    for name in names:
        index = _block_index(encoder, name)
        if index is None:
            pairs = [(_outside(encoder, name), Place(name))]
        else:
            pairs = _inside(encoder.blocks[index], index, name)
        taken = any(key in found for key, _ in pairs)
        found |= {f"path.{_relative(encoder, name)}": Place(name)} if taken else dict(pairs)
    return found


def _block_index(encoder: Encoder, name: str) -> int | None:
    inside = (i for i, block in enumerate(encoder.blocks) if name.startswith(f"{block.path}."))
    return next(inside, None)


def _inside(block: Block, index: int, name: str) -> list[tuple[str, Place]]:
    local = name.removeprefix(f"{block.path}.")
    if len(block.attentions) != 1:
        return [(f"{index}.path.{local}", Place(name))]
    attention = block.attentions[0]
    if local.startswith(join(attention.path, "")):
        below = local.removeprefix(f"{attention.path}." if attention.path else "")
        found = _in_attention(attention.projection, below)
        if found is not None:
            return [(f"{index}.{role}", Place(name, third)) for role, third in found]
    return [(f"{index}.{_role(local) or f'path.{local}'}", Place(name))]


def _in_attention(projection: Any, name: str) -> list[tuple[str, int | None]] | None:
    layer, _, leaf = name.rpartition(".")
    if isinstance(projection, Separate):
        roles = {projection.query: "q", projection.key: "k", projection.value: "v"}
        if layer in roles and not projection.key_half:
            return [(f"{roles[layer]}.{leaf}", None)]
    fused = isinstance(projection, Fused) and projection.order == "qkv"
    if fused and layer == projection.layer and not projection.value_width:
        return [(f"{part}.{leaf}", third) for third, part in enumerate("qkv")]
    if not layer and leaf in ("q_bias", "k_bias", "v_bias"):
        return [(f"{leaf[0]}.bias", None)]
    if _OUTPUT.fullmatch(layer):
        return [(f"proj.{leaf}", None)]
    if leaf == "relative_position_bias_table":
        return [("bias_table", None)]
    return None


def _role(local: str) -> str | None:
    module, _, leaf = local.rpartition(".")
    for pattern, role in _ROLES:
        if re.fullmatch(pattern, local):
            return role
        if re.fullmatch(pattern, module):
            return f"{role}.{leaf}"
    return None


def _outside(encoder: Encoder, name: str) -> str:
    local = _relative(encoder, name)
    module, _, leaf = local.rpartition(".")
    if name.rpartition(".")[0] in (encoder.final_norm, encoder.norm_weights):
        return f"norm.{leaf}"
    for pattern, role in _OUTSIDE:
        if re.fullmatch(pattern, local):
            return role
        if re.fullmatch(pattern, module):
            return f"{role}.{leaf}"
    return f"path.{local}"


def _relative(encoder: Encoder, name: str) -> str:
    """Return a name from the encoder on, so that models around it do not matter."""
    return name.removeprefix(f"{encoder.path}.") if encoder.path else name
