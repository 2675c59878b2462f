"""`model.prompts.delta`: what a protocol adds to a model or changes in it, and how it goes away."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Block, Encoder, is_below
from ..backbones.fingerprint import Fingerprint, fingerprint
from ..backbones.projection import Fused, Separate, join
from ..errors import VPTError
from ..undo import kept
from . import modules
from .modules import Bottlenecks, SideNetwork, fill
from .moved import moved
from .options import Protocol

if TYPE_CHECKING:
    from ..prompts import Prompts


class Delta(nn.Module):
    """The state of a protocol: modules that it adds, and backbone weights that it trains.

    Args:
        protocol: What trains.
        host: The model, before it changes.
        encoder: Its anatomy.
        features: Of the side network, for "sidetune".

    Raises:
        SpecError: More blocks than there are.
        UnsupportedArchitectureError: The protocol has no place in this model.
    """

    def __init__(
        self,
        protocol: Protocol,
        host: nn.Module,
        encoder: Encoder,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.protocol = protocol
        self.names, buffers, self.trained_paths = moved(host, encoder, protocol)
        self.places: dict[str, Place] = file_names(encoder, [*self.names, *buffers])
        # Outside the module tree, so that `.to()` leaves them on the CPU.
        self.originals: dict[str, Tensor] = {}
        self.fingerprint: Fingerprint | None = None
        if protocol.row.adds:
            kind = getattr(modules, protocol.row.adds)
            self.add_module(kind.slot, kind.build(host, encoder, protocol, features))
        changes = self.places or self.added is not None
        if changes and any(p.is_meta for p in host.parameters()):
            raise protocol.misfit(
                f"{type(host).__name__} is on the meta device", "materialise it first"
            )
        self._handles: list[Any] = []

    @property
    def added(self) -> Bottlenecks | SideNetwork | None:
        """What the protocol adds to the model: the one child."""
        return cast("Bottlenecks | SideNetwork | None", next(self.children(), None))

    def materialise(
        self, device: torch.device, dtype: torch.dtype, generator: torch.Generator | None
    ) -> None:
        """Bring what the protocol adds to a device, with its first values."""
        if self.added is not None:
            fill(self.added, device, dtype, generator)

    def attach(self, host: nn.Module, prompts: Prompts) -> None:
        """Keep what will change, and hook what was added into the model."""
        if self.protocol.moves:
            # Later the weights are others, and the file must name those that they came from.
            self.fingerprint = fingerprint(host, prompts.encoder)
        if self.protocol.restores:
            self.originals = self._copies(host)
        if self.added is not None:
            self._handles = self.added.attach(host, prompts)

    def detach(self, host: nn.Module) -> None:
        """Take hooks off and put the backbone's own weights back."""
        for handle in self._handles:
            handle.remove()
        tensors = _tensors(host)
        with torch.no_grad():
            for name, original in self.originals.items():
                tensors[name].copy_(original)
                tensors[name].grad = None

    def touched(self, host: nn.Module) -> list[Tensor]:
        """Return the tensors of the model that loading or removing the protocol overwrites."""
        known = _tensors(host)
        names = {place.name for place in self.places.values()} | self.originals.keys()
        return [known[name] for name in names if name in known]

    def check_restorable(self, call: str) -> None:
        """Raise where the backbone's own weights are gone."""
        if not self.protocol.restores:
            raise VPTError(
                call,
                "the whole model was trained, and its former weights were not kept",
                f"use `apply_protocol(model, {self.protocol.name!r}, keep_original=True)`, or "
                "build the model anew",
            )

    def unfreeze(self, host: nn.Module) -> None:
        """Let train what the protocol trains beside prompts and head."""
        parameters = dict(host.named_parameters())
        for name in self.names:
            parameters[name].requires_grad_(True)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def leave(self, names: Iterable[str]) -> None:
        """Leave tensors of the host to somebody else: to a decoder that trains whole."""
        others = set(names)
        self.names = [name for name in self.names if name not in others]
        self.places = {k: place for k, place in self.places.items() if place.name not in others}
        self.originals = {n: t for n, t in self.originals.items() if n not in others}

    def tensors(self, host: nn.Module) -> dict[str, Tensor]:
        """Return everything that an adapter holds of this, under the names in the file."""
        known = _tensors(host)
        found = {name: place.of(known) for name, place in self.places.items()}
        found |= {} if self.added is None else self.added.stored()
        return {f"delta.{name}": tensor for name, tensor in found.items()}

    def keeps_mode(self, path: str) -> bool:
        """Tell whether a module of the host follows it into train mode."""
        return is_below(path, *self.trained_paths)

    def _copies(self, host: nn.Module) -> dict[str, Tensor]:
        known = _tensors(host)
        names = {place.name for place in self.places.values()}
        counters = [n for n in known if n.endswith("num_batches_tracked")]
        names |= {n for n in counters if self.keeps_mode(n.rpartition(".")[0])}
        return {name: kept(known[name]) for name in sorted(names)}

    def extra_repr(self) -> str:
        """Say which protocol this is, and how much of the backbone trains."""
        return f"protocol={self.protocol.name}, tensors of the backbone={len(self.names)}"


def given_features(delta: Delta | None) -> nn.Module | None:
    """Return the features that a side network was given; None for those of its own."""
    side = None if delta is None else delta.added
    return side.features if isinstance(side, SideNetwork) and side.given else None


def shapes(
    host: nn.Module,
    encoder: Encoder,
    protocol: Protocol,
    present: Delta | None = None,
    *,
    apart: Iterable[str] = (),
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all that an adapter file holds of a protocol, without its head.

    Nothing is made but on `meta`, and the model is left alone.

    Args:
        host: The model, prompted or not.
        encoder: Its anatomy.
        protocol: What trains.
        present: What the model carries; a side network lends the features that it was given.
        apart: Names of the host's tensors that belong to a decoder that trains whole.

    Raises:
        SpecError: More blocks than there are.
        UnsupportedArchitectureError: The protocol has no place in this model.
    """
    delta = Delta(protocol, host, encoder, given_features(present))
    delta.leave(apart)
    return {name: tuple(tensor.shape) for name, tensor in delta.tensors(host).items()}


def _tensors(host: nn.Module) -> dict[str, Any]:
    return dict(host.named_parameters()) | dict(host.named_buffers())


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
_ATTENTION = (
    (r"proj|o_proj|out_proj|output\.dense", "proj"),
    (r"(.+\.)?relative_position_bias_table", "bias_table"),
    (r"q_bias", "q.bias"),
    (r"k_bias", "k.bias"),
    (r"v_bias", "v.bias"),
)
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


def file_names(encoder: Encoder, names: Iterable[str]) -> dict[str, Place]:
    """Return the place of every tensor under its name in a file, without the `delta.` in front.

    Args:
        encoder: Anatomy of the host.
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
        if found:
            return [(f"{index}.{role}", Place(name, third)) for role, third in found]
    return [(f"{index}.{_role(local, _ROLES) or f'path.{local}'}", Place(name))]


def _in_attention(projection: Any, name: str) -> list[tuple[str, int | None]]:
    layer, _, leaf = name.rpartition(".")
    if isinstance(projection, Separate) and not projection.key_half:
        roles = {projection.query: "q", projection.key: "k", projection.value: "v"}
        if layer in roles:
            return [(f"{roles[layer]}.{leaf}", None)]
    fused = isinstance(projection, Fused) and projection.order == "qkv"
    if fused and layer == projection.layer and not projection.value_width:
        return [(f"{part}.{leaf}", third) for third, part in enumerate("qkv")]
    role = _role(name, _ATTENTION)
    return [] if role is None else [(role, None)]


def _role(name: str, roles: Iterable[tuple[str, str]]) -> str | None:
    """Return the role of a tensor by its own name, or by that of its module and its last part."""
    module, _, leaf = name.rpartition(".")
    for pattern, role in roles:
        if re.fullmatch(pattern, name):
            return role
        if re.fullmatch(pattern, module):
            return f"{role}.{leaf}"
    return None


def _outside(encoder: Encoder, name: str) -> str:
    local = _relative(encoder, name)
    module, _, leaf = name.rpartition(".")
    if module in (encoder.final_norm, encoder.norm_weights):
        return f"norm.{leaf}"
    return _role(local, _OUTSIDE) or f"path.{local}"


def _relative(encoder: Encoder, name: str) -> str:
    """Return a name from the encoder on, so that models around it do not matter."""
    return name.removeprefix(f"{encoder.path}.") if encoder.path else name
