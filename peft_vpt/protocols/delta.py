"""`model.prompts.delta`: what a protocol adds to a model or changes in it, and how it goes away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder, is_below
from ..backbones.fingerprint import Fingerprint, fingerprint
from ..errors import UnsupportedArchitectureError, VPTError
from .modules import Bottleneck, FeedForward, SideNetwork, feed_forwards, fill
from .moved import moved
from .options import Protocol

if TYPE_CHECKING:
    from ..prompts import Prompts
import re
from typing import NamedTuple

from ..backbones.anatomy import Block
from ..backbones.projection import Fused, Separate, join


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
        self.places: dict[str, Place] = file_names(host, encoder, [*self.names, *buffers])
        # Outside the module tree, so that `.to()` leaves them on the CPU.
        self.originals: dict[str, Tensor] = {}
        self.fingerprint: Fingerprint | None = None
        self.layers = feed_forwards(host, encoder) if protocol.kind == "adapter" else []
        self.adapters: nn.ModuleDict | None = None
        self.side: SideNetwork | None = None
        # Filled by `materialise`, so that a check of what fits draws no random numbers.
        with torch.device("meta"):
            if protocol.kind == "adapter":
                self.adapters = nn.ModuleDict(_bottlenecks(protocol, self.layers))
            if protocol.kind == "sidetune":
                self.side = SideNetwork(_head_width(host, encoder), features)
        if self.side is not None and not self.side.given:
            _check_image(host, encoder)
        if any(p.is_meta for p in host.parameters()) and (
            self.places or self.adapters or self.side
        ):
            raise UnsupportedArchitectureError(
                f"apply_protocol({protocol.name!r}): {type(host).__name__} is on the meta device; "
                "materialise it first."
            )
        self._handles: list[Any] = []

    def materialise(
        self, device: torch.device, dtype: torch.dtype, generator: torch.Generator | None
    ) -> None:
        """Bring what the protocol adds to a device, with its first values."""
        for part in self._parts():
            fill(part, device, dtype, generator)

    def attach(self, host: nn.Module, prompts: Prompts) -> None:
        """Keep what will change, and hook what was added into the model."""
        encoder = prompts.encoder
        if self.protocol.moves:
            # Later the weights are others, and the file must name those that they came from.
            self.fingerprint = fingerprint(host, encoder)
        if self.protocol.restores:
            self.originals = self._copies(host)
        for part in self._parts():
            part.serve(prompts)
        for index, bottleneck in self._bottlenecks().items():
            layer = host.get_submodule(self.layers[int(index)].path)
            self._handles.append(layer.register_forward_hook(bottleneck.behind))
        if self.side is not None and encoder.head is not None:
            head = host.get_submodule(encoder.head.paths[0])
            self._handles.append(host.register_forward_pre_hook(self.side.see, with_kwargs=True))
            self._handles.append(head.register_forward_pre_hook(self.side.blend))
            self._handles.append(host.register_forward_hook(self.side.forget, always_call=True))

    def detach(self, host: nn.Module) -> None:
        """Take hooks off and put the backbone's own weights back.

        Raises:
            VPTError: They were not kept.
        """
        self.check_restorable("remove_prompts")
        for handle in self._handles:
            handle.remove()
        tensors = _tensors(host)
        with torch.no_grad():
            for name, original in self.originals.items():
                tensors[name].copy_(original)
                tensors[name].grad = None

    def check_restorable(self, call: str) -> None:
        """Raise where the backbone's own weights are gone."""
        if not self.protocol.restores:
            raise VPTError(
                f"{call}: the whole model was trained, and its former weights were not kept; use "
                "apply_protocol(model, 'full', keep_original=True), or build the model anew."
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
        found = {f"delta.{name}": place.of(known) for name, place in self.places.items()}
        for index, part in self._bottlenecks().items():
            for name, parameter in part.named_parameters():
                found[f"delta.{index}.adapter.{name}"] = parameter
        if self.side is not None:
            side = _tensors(self.side)
            found |= {f"delta.side.{n}": t for n, t in side.items() if t.is_floating_point()}
        return found

    def keeps_mode(self, path: str) -> bool:
        """Tell whether a module of the host follows it into train mode."""
        return is_below(path, *self.trained_paths)

    def _copies(self, host: nn.Module) -> dict[str, Tensor]:
        known = _tensors(host)
        names = {place.name for place in self.places.values()}
        counters = [n for n in known if n.endswith("num_batches_tracked")]
        names |= {n for n in counters if self.keeps_mode(n.rpartition(".")[0])}
        return {name: known[name].detach().to("cpu", copy=True) for name in sorted(names)}

    def _parts(self) -> Iterator[Bottleneck | SideNetwork]:
        yield from self._bottlenecks().values()
        if self.side is not None:
            yield self.side

    def _bottlenecks(self) -> dict[str, Bottleneck]:
        return cast("dict[str, Bottleneck]", dict(self.adapters or {}))

    def extra_repr(self) -> str:
        """Say which protocol this is, and how much of the backbone trains."""
        return f"protocol={self.protocol.name}, tensors of the backbone={len(self.names)}"


def given_features(delta: Delta | None) -> nn.Module | None:
    """Return the features that a side network was given; None for those of its own."""
    side = None if delta is None else delta.side
    return side.features if side is not None and side.given else None


def _head_width(host: nn.Module, encoder: Encoder) -> int:
    if encoder.head is None or encoder.headless:
        raise UnsupportedArchitectureError(
            f"apply_protocol('sidetune'): {type(host).__name__} has {encoder.headless}, so there "
            "is no one place where a side network could be blended in."
        )
    return encoder.head.width


def _check_image(host: nn.Module, encoder: Encoder) -> None:
    """Raise where AlexNet would be called with other things than images of three channels."""
    if encoder.input_size[0] == 3 and encoder.inputs not in ("video", "patches"):
        return
    what = "videos or patches" if encoder.input_size[0] == 3 else "images of other channels"
    raise UnsupportedArchitectureError(
        f"apply_protocol('sidetune'): {type(host).__name__} takes {what}, and AlexNet's features "
        "(batch, 3, H, W); give features=..., a module from its pixels to maps (batch, 256, h, w)."
    )


def _tensors(host: nn.Module) -> dict[str, Any]:
    return dict(host.named_parameters()) | dict(host.named_buffers())


def _bottlenecks(protocol: Protocol, layers: list[FeedForward]) -> dict[str, nn.Module]:
    assert protocol.reduction is not None
    found: dict[str, nn.Module] = {}
    for index, layer in enumerate(layers):
        hidden = max(1, layer.width // protocol.reduction)
        found[str(index)] = Bottleneck(layer.width, hidden, layer.axis)
    return found


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
