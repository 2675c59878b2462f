"""The token form: prompts as real tokens, for spans longer than a block, and as the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..backbones.anatomy import Block, Encoder, is_kind
from ..errors import VPTError
from ..prompts import Prompts
from .attach import Form, ForwardPatch
from .softmax import ADD, causal_mask, pad_mask

_MASKS = ("attn_mask", "attention_mask")
_COLLECTOR = "forward_intermediates"


class TokenForm(ForwardPatch):
    """Prompts as tokens behind the model's own, in one block of a span.

    Position among the tokens does not matter to attention; behind them, the model's own keep
    their slots. The first block of a span appends the prompts, the last one cuts them off.
    """

    def __init__(
        self,
        prompts: Prompts,
        host: nn.Module,
        block: Block,
        *,
        entry: int,
        index: int,
        leaves: bool,
        reason: str,
    ) -> None:
        super().__init__(host.get_submodule(block.path))
        self._links = (prompts,)
        self.entry = entry
        self.index = index
        self.leaves = leaves
        self.reason = reason
        # A bias that the attention makes itself, for as many tokens as the model has.
        self.biased = any(
            "rel" in n or "bias_table" in n for n, _ in self.target.named_parameters()
        )

    def extra_repr(self) -> str:
        """Name the block, the form and why it is this one."""
        return f"block {self.index}, form=token ({self.reason})"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the block's `forward`; tokens `(batch, tokens, dim)` come first."""
        prompts = self._links[0]
        if prompts.disabled():
            return self.original(*args, **kwargs)
        name = None if args else next(iter(kwargs))
        hidden = args[0] if name is None else kwargs.pop(name)
        own = hidden.shape[1]
        if self.index == self.entry:
            tokens = prompts(self.entry, hidden.shape[0]).to(hidden)
            hidden = torch.cat([hidden, tokens.expand(hidden.shape[0], -1, -1)], dim=1)
            prompts.own_tokens.set(own)
        else:
            own -= prompts.spec.length
        rest = [_pad(arg, own, prompts.spec.length) for arg in args[1:]]
        kwargs = _pad_named(kwargs, own, prompts.spec.length, hidden.device)
        if self.biased:
            out = self.recomputed(self._with_padded_bias, hidden, *rest, own_tokens=own, **kwargs)
        else:
            out = self.original(hidden, *rest, **kwargs)
        return _first(out, lambda x: x[:, :own]) if self.leaves else out

    def _with_padded_bias(self, *args: Any, own_tokens: int, **kwargs: Any) -> Any:
        with BiasPadding(own_tokens, self._links[0].spec.length):
            return self.uncheckpointed(*args, **kwargs)


def _first(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a block's output, or the first of its outputs."""
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def _pad(value: Any, own: int, length: int) -> Any:
    """Pad an argument if it is a mask over tokens: `(..., tokens or 1, tokens)`."""
    if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-1] == own:
        return pad_mask(value, length, tokens=own, rows=True)
    return value


def _pad_named(
    kwargs: dict[str, Any], own: int, length: int, device: torch.device
) -> dict[str, Any]:
    """Pad masks and biases over tokens with what hides nothing, rotations with none."""
    kwargs = dict(kwargs)
    if kwargs.get("is_causal"):
        kwargs |= {"is_causal": False, "attn_mask": causal_mask(own, own, device)}
    for name, value in kwargs.items():
        if name == "rope" and isinstance(value, Tensor):
            kwargs[name] = torch.cat(
                [
                    _no_rotation(x, length, y)
                    for x, y in zip(value.chunk(2, -1), (0, 1), strict=True)
                ],
                dim=-1,
            )
        elif name == "position_embeddings" and isinstance(value, tuple):
            kwargs[name] = tuple(
                _no_rotation(x, length, y) for x, y in zip(value, (1, 0), strict=True)
            )
        elif isinstance(value, Tensor) and (name in _MASKS or _is_square(value, own)):
            kwargs[name] = pad_mask(value, length, tokens=own, rows=True)
    return kwargs


def _is_square(value: Tensor, own: int) -> bool:
    return value.dim() > 2 and value.shape[-2:] == (own, own)


def _no_rotation(part: Tensor, length: int, value: int) -> Tensor:
    """Append rows of a rotation's sine (0) or cosine (1) that turn nothing."""
    return torch.cat([part, part.new_full((*part.shape[:-2], length, part.shape[-1]), value)], -2)


class BiasPadding(TorchFunctionMode):
    """Give prompts a zero bias where an attention makes its bias itself.

    Args:
        own: Number of the model's tokens.
        length: Number of prompts behind them.
    """

    def __init__(self, own: int, length: int) -> None:
        super().__init__()
        self.sizes = (own, length)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Pad the mask of a fused attention, or the shorter of two score matrices."""
        kwargs = dict(kwargs or {})
        own, length = self.sizes
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            mask = kwargs["attn_mask"]
            if mask.shape[-1] == own:
                kwargs["attn_mask"] = pad_mask(mask, length, tokens=own, rows=True)
        elif func in ADD and self._is_short(args):
            args = tuple(x if x.shape[-1] > own else F.pad(x, (0, length, 0, length)) for x in args)
        return func(*args, **kwargs)

    def _is_short(self, args: tuple[Any, ...]) -> bool:
        """Tell whether one addend is made for the model's own tokens, the other for all."""
        own, length = self.sizes
        if len(args) != 2 or not all(isinstance(arg, Tensor) and arg.dim() > 2 for arg in args):
            return False
        return {x.shape[-2:] for x in args} == {(own,) * 2, (own + length,) * 2}


class OutputCut(Form):
    """Give recorded states the bare model's shapes where prompts are tokens.

    transformers models record every block's output and attention map; timm's
    `forward_intermediates` collects outputs. Inside a span these hold prompts, behind the model's
    own tokens; here they are cut off.
    """

    def __init__(self, prompts: Prompts, host: nn.Module, encoder: Encoder) -> None:
        super().__init__()
        self._links: tuple[Prompts, Any] = (prompts, host.get_submodule(encoder.path))
        self._host = (host,)
        self._prefix = encoder.prefix_tokens
        self._handle: Any = None

    def attach(self) -> None:
        """Hook the transformers model that records, or patch timm's collector."""
        encoder, host = self._links[0].encoder, self._host[0]
        if encoder.library == "timm":
            setattr(self._links[1], _COLLECTOR, self.intermediates)
            return
        first = encoder.blocks[0].path.split(".")
        around = [host.get_submodule(".".join(first[:end])) for end in range(len(first))]
        models = [m for m in around if is_kind(m, "PreTrainedModel", "transformers")]
        if models:
            # The innermost one records; those around it pass on what it returns.
            self._handle = models[-1].register_forward_hook(self.cut_recorded)

    def detach(self) -> None:
        """Take the hook or the patch off."""
        if self._handle is not None:
            self._handle.remove()
        vars(self._links[1]).pop(_COLLECTOR, None)

    def cut_recorded(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: cut `hidden_states` and `attentions` of a model output or tuple."""
        own = self._links[0].own_tokens.get()
        if own is None or self._links[0].disabled():
            return output
        if isinstance(output, tuple):
            return tuple(self._cut_group(group, own) for group in output)
        for name in ("hidden_states", "attentions"):
            if output.get(name) is not None:
                output[name] = self._cut_group(output[name], own)
        return output

    def _cut_group(self, group: Any, own: int) -> Any:
        """Cut the tokens of states and the queries of maps; other values pass."""
        if not isinstance(group, tuple):
            return group
        return tuple(self._cut(x, own) if isinstance(x, Tensor) else x for x in group)

    def _cut(self, recorded: Tensor, own: int) -> Tensor:
        full = own + self._links[0].spec.length
        if recorded.dim() == 3 and recorded.shape[1] == full:
            return recorded[:, :own]
        if recorded.dim() == 4 and recorded.shape[-2] == recorded.shape[-1] == full:
            return recorded[..., :own, :]
        return recorded

    def intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for timm's `forward_intermediates`, with the bare model's shapes."""
        prompts, model = self._links
        collect = type(model).forward_intermediates
        if prompts.disabled():
            return collect(model, *args, **kwargs)
        if not hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size"):
            raise VPTError(
                "forward_intermediates",
                f"what {type(model).__name__} collects cannot be told from prompts that are "
                "carried through its blocks",
                "use `deep=True`",
            )
        call = inspect.signature(collect).bind(model, *args, **kwargs)
        call.apply_defaults()
        options, image = call.arguments, call.arguments["x"]
        as_maps = options["output_fmt"] == "NCHW"
        options["output_fmt"] = "NLC"
        grid = model.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))
        out = collect(*call.args, **call.kwargs)

        def cut(tokens: Tensor) -> Tensor:
            tokens = tokens[:, : grid[0] * grid[1]]
            if not as_maps:
                return tokens
            maps = tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])
            return maps.permute(0, 3, 1, 2).contiguous()

        def cut_final(tokens: Tensor) -> Tensor:
            return tokens[:, : self._prefix + grid[0] * grid[1]]

        if isinstance(out, dict):
            changed: dict[str, Any] = {
                "image_intermediates": [cut(x) for x in out["image_intermediates"]]
            }
            if "image_features" in out:
                changed["image_features"] = cut_final(out["image_features"])
            return out | changed
        final, collected = (None, out) if options["intermediates_only"] else out
        collected = [(cut(x[0]), x[1]) if isinstance(x, tuple) else cut(x) for x in collected]
        return collected if final is None else (cut_final(final), collected)
