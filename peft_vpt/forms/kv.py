"""The kv form: prompts of one-block spans as extra keys and values, in training and inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ..backbones.anatomy import Attention, Block, first_argument, is_plain, module_at
from ..errors import UnsupportedArchitectureError
from .attach import ForwardPatch
from .selfcheck import check_met
from .softmax import Met, SoftmaxOverride

if TYPE_CHECKING:
    from ..prompts import Prompts


_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


# A fused optimizer changes parameters without raising their version counters.
register_optimizer_step_post_hook(_count_step)


class KeyValueForm(ForwardPatch):
    """Prompts of one attention: `K_p = k_proj(norm1(P))`, `V_p = v_proj(norm1(P))` at the softmax.

    What a block computes for prompts that leave behind it is thrown away, so they act only as keys
    and values; outputs and gradients equal token insertion.

    Source: "VPT-prefix" of Jia et al. 2022 (appendix), here exact and in training too.
    """

    def __init__(
        self, prompts: Prompts, host: nn.Module, block: Block, attention: Attention, *, index: int
    ) -> None:
        module = module_at(host, block.path)
        super().__init__(module_at(module, attention.path))
        self._links = (prompts, module)
        self.index = index
        self.path = block.path
        self.attention = attention
        self._cache: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None
        self._pending: RemovableHandle | None = None
        self._input: Tensor | None = None

    @property
    def prompts(self) -> Prompts:
        """The prompts that this form serves."""
        return self._links[0]

    @property
    def block(self) -> nn.Module:
        """The transformer block."""
        return self._links[1]

    def extra_repr(self) -> str:
        """Name the block and the form."""
        return f"block {self.index}, form=kv"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the attention's `forward`; arguments and result are its own."""
        if self.prompts.disabled():
            return self.original(*args, **kwargs)
        keys, values = self.keys_values(first_argument(args, kwargs))
        met: list[Met] = []
        with SoftmaxOverride(keys, values, met):
            out = self.original(*args, **kwargs)
        if len(met) != 1 or met[0].values is None:
            self._missed(len(met))
        if self._pending is not None and not torch.compiler.is_compiling():
            self._check_now(met[0])
        return out

    def check_at_first_forward(self) -> None:
        """Self-check with the block's first real input, where no dummy forward can be run."""
        self._pending = self.block.register_forward_pre_hook(self._keep_input, with_kwargs=True)

    def _keep_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = first_argument(args, kwargs)

    def _check_now(self, met: Met) -> None:
        assert self._pending is not None
        assert self._input is not None
        check_form(self, self._input, met)
        self._pending.remove()
        self._pending = self._input = None

    def detach(self) -> None:
        """Put back what `attach` found, and forget a check that has not come to pass."""
        super().detach()
        if self._pending is not None:
            self._pending.remove()

    def keys_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return K_p and V_p, `(1 or batch, heads, length, head_dim)`, from the cache if allowed.

        Args:
            hidden: `(batch, tokens, dim)`, for batch size and device.
        """
        if not self._may_cache():
            return self._project(self.prompts(self.index, hidden.shape[0]), hidden.device)
        # Read once: another thread may fill the cache for its own key meanwhile.
        key, cached = self._cache_key(hidden), self._cache
        if cached is None or not _same(cached[0], key):
            pair = self._project(self.prompts(self.index, hidden.shape[0]), hidden.device)
            self._cache = cached = (key, pair)
        return cached[1]

    def clear_cache(self) -> None:
        """Forget K_p and V_p."""
        self._cache = None

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and project `(batch, tokens, dim)` as the block does in front of its softmax."""
        if self.attention.norm is not None:
            hidden = module_at(self.block, self.attention.norm)(hidden)
        return self.attention.projection.keys_values(self.target, hidden)

    def _project(self, tokens: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.project(
            tokens.to(device=device, dtype=_compute_dtype(self._modules_met(), tokens))
        )

    def _modules_met(self) -> list[nn.Module]:
        norm = self.attention.norm
        layers = self.attention.projection.modules(self.target)
        return ([module_at(self.block, norm)] if norm is not None else []) + layers

    def _may_cache(self) -> bool:
        """Only where nothing could change K_p without being seen in the key."""
        if torch.is_grad_enabled() or self.prompts.training or torch.compiler.is_compiling():
            return False
        if torch._C._are_functorch_transforms_active() or self.prompts.sharded():
            return False
        return all(is_plain(module) for module in self._modules_met())

    def _cache_key(self, hidden: Tensor) -> tuple[Any, ...]:
        device = hidden.device.type
        tensors = self.prompts.sources(self.index)
        for module in self._modules_met():
            tensors += [*module.parameters(), *module.buffers()]
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (_steps, hidden.device, autocast, *(state for t in tensors for state in _state(t)))

    def _missed(self, count: int) -> None:
        name = type(self.target).__name__
        what = f"{count} softmaxes were" if count else "no softmax was"
        raise UnsupportedArchitectureError(
            f"prompts of block {self.index} ({self.path}): {what} met inside {name}.forward, "
            "where exactly one is needed, so its prompts would have no or a wrong effect. "
            "Set the attention to SDPA or eager (transformers: "
            "model.set_attn_implementation('sdpa')), or inject with form='token'."
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return self.__dict__ | {"_cache": None}


def check_form(form: KeyValueForm, block_input: Tensor, met: Met) -> None:
    """Raise unless `form.project` gives, for real hidden states, what the softmax received."""
    with torch.no_grad():
        keys, values = form.project(block_input)
    check_met(f"block {form.index} ({form.path})", keys, values, met)


def _compute_dtype(modules: list[nn.Module], tokens: Tensor) -> torch.dtype:
    """Return the dtype of the first floating parameter that prompts go through."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return tokens.dtype


def _state(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_inference():
        # Changes of inference tensors are not counted, so nothing that depends on one is kept.
        return (object(),)
    return (tensor, tensor._version, tensor.dtype, tensor.device, tensor.data_ptr())


def _same(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    return len(old) == len(new) and all(
        a is b if isinstance(a, Tensor) else a == b for a, b in zip(old, new, strict=True)
    )
