"""The kv form: prompts of one-block spans as extra keys and values, in training and inference."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..backbones.anatomy import Attention, Block, first_argument
from ..backbones.projection import in_width, is_plain, join, per_token
from ..errors import UnsupportedArchitectureError
from ..prompts import Prompts
from .attach import ForwardPatch
from .rows import Rows, as_tokens, equal_rows, same_keys
from .softmax import Met, Pair, SoftmaxOverride

Key = tuple[list[Tensor], tuple[Any, ...]]
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
        module = host.get_submodule(block.path)
        super().__init__(module.get_submodule(attention.target))
        self._links = (prompts, module)
        self.index = index
        self.path = block.path
        self.attention = attention
        self.width = block.width
        self._cache: tuple[Key, Pair] | None = None
        self._watch: Watch | None = None

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
        if not torch.compiler.is_compiling():
            return self.recomputed(self._attend, *args, **kwargs)
        if self.attention.many or self._watch is not None:
            # The number of segments is data, which compiled code cannot count, and a check that
            # waits for real values has none there.
            whole = torch.compiler.disable(self.recomputed)  # type: ignore[no-untyped-call]
            return whole(self._attend, *args, **kwargs)
        with whole_graph():
            return self._attend(*args, **kwargs)

    def _attend(self, *args: Any, **kwargs: Any) -> Any:
        met: list[Met] = []
        with self.override(self._pairs(args, kwargs), met):
            out = self.uncheckpointed(*args, **kwargs)
        if not self.all_met(met):
            self._missed(len(met))
        if self._watch is not None and not torch.compiler.is_compiling():
            self._finish_check(met)
        return out

    def check_at_first_forward(self) -> None:
        """Self-check with the block's first real input, where no dummy forward can be run."""
        self._watch = Watch(self)

    def _finish_check(self, met: list[Met]) -> None:
        assert self._watch is not None
        if not self._watch.complete():
            self._missed(len(met))
        self._watch.check(met)
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def detach(self) -> None:
        """Put back what `attach` found, and forget a check that has not come to pass."""
        super().detach()
        self._stop_watching()

    def _pairs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Pair]:
        """Return what gives the softmaxes of one call their keys and values."""
        hidden = first_argument(args, kwargs)
        if self.attention.many:
            # Each segment is a sample of its own, with its own dropout mask.
            return lambda: self.keys_values(hidden, samples=1)
        pair = self.keys_values(hidden, samples=hidden.shape[0])
        return lambda: pair

    def override(self, pair: Callable[[], Pair] | None, met: list[Met]) -> SoftmaxOverride:
        """Return the override for one call, as the family wants it."""
        attention = self.attention
        return SoftmaxOverride(pair, met, scores=attention.scores, heads_axis=attention.heads_axis)

    def all_met(self, met: list[Met]) -> bool:
        """Tell whether what one call met is all that the family knows of: the guard."""
        expected = len(met) > 0 if self.attention.many else len(met) == 1
        return expected and all(each.values is not None for each in met)

    def keys_values(self, hidden: Tensor, samples: int) -> Pair:
        """Return K_p and V_p, `(1 or samples, heads, length, head_dim)`, from the cache if allowed.

        Args:
            hidden: What the module is called with, for the device.
            samples: Number of samples that each need a dropout mask of their own.
        """
        modules = self._modules_met()
        if not self._may_cache(modules):
            return self._project(self.prompts(self.index, samples), hidden.device)
        # Read once: another thread may fill the cache for its own key meanwhile.
        key, cached = self._cache_key(hidden, modules), self._cache
        if cached is None or not _same(cached[0], key):
            pair = self._project(self.prompts(self.index, samples), hidden.device)
            self._cache = cached = (key, pair)
        return cached[1]

    def clear_cache(self) -> None:
        """Forget K_p and V_p."""
        self._cache = None

    @property
    def owner(self) -> nn.Module:
        """The attention module that holds the projections."""
        return self.block.get_submodule(self.attention.path)

    def project(self, hidden: Tensor) -> Pair:
        """Norm and project `(batch, tokens, dim)` as the block does in front of its softmax."""
        if self.attention.norm is not None:
            hidden = per_token(self.block.get_submodule(self.attention.norm), hidden)
        projection, owner = self.attention.projection, self.owner
        return projection.keys_values(owner, projection.prepare(owner, hidden))

    def project_blank(self, like: Tensor) -> Pair:
        """Return keys and values of a position that holds nothing: a window's padding."""
        projection, owner = self.attention.projection, self.owner
        return projection.keys_values(owner, projection.prepare(owner, like[:1, :1] * 0))

    def _project(self, tokens: Tensor, device: torch.device) -> Pair:
        tokens = tokens.to(device=device, dtype=_compute_dtype(self._modules_met(), tokens))
        if self._watch is None:
            return self.project(tokens)
        with self._watch.muted():
            return self.project(tokens)

    def _modules_met(self) -> list[nn.Module]:
        norm = self.attention.norm
        layers = self.attention.projection.modules(self.owner)
        return ([self.block.get_submodule(norm)] if norm is not None else []) + layers

    def _may_cache(self, modules: list[nn.Module]) -> bool:
        """Only where nothing could change K_p without being seen in the key."""
        if torch.is_grad_enabled() or self.prompts.training or torch.compiler.is_compiling():
            return False
        if torch._C._are_functorch_transforms_active() or self.prompts.sharded():
            return False
        return all(is_plain(module) for module in modules)

    def _cache_key(self, hidden: Tensor, modules: list[nn.Module]) -> Key:
        """Return the tensors that K_p comes from, and everything about them that may change."""
        tensors = self.prompts.sources(self.index)
        # An attention may keep biases beside its layer. Plain modules have no children.
        for module in (*modules, self.owner):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensors.append(tensor)
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        # Changes of inference tensors are not counted, so nothing that depends on one is kept.
        states = [
            object() if t.is_inference() else (t._version, t.data_ptr(), t.dtype, t.device)
            for t in tensors
        ]
        return tensors, (_steps, hidden.device, autocast, *states)

    def _missed(self, count: int) -> None:
        name = type(self.target).__name__
        what = f"{count} softmaxes were" if count else "no softmax was"
        raise UnsupportedArchitectureError(
            "",
            f"prompts of block {self.index} ({self.path}): {what} met inside {name}.forward, "
            "where exactly one is needed, so its prompts would have no or a wrong effect",
            "Set the attention to SDPA or eager (transformers: "
            "`model.set_attn_implementation('sdpa')`), or inject with `form='token'`",
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return self.__dict__ | {"_cache": None}


def whole_graph() -> AbstractContextManager[Any]:
    """Let a compiler fail, not go on, where it would break its graph.

    The part behind a break is compiled once for all blocks, with the prompts of the first.
    """
    if hasattr(torch._dynamo, "error_on_graph_break"):
        breaks: AbstractContextManager[Any] = torch._dynamo.error_on_graph_break(True)
        return breaks
    return nullcontext()


def _compute_dtype(modules: list[nn.Module], tokens: Tensor) -> torch.dtype:
    """Return the dtype of the first floating parameter that prompts go through."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return tokens.dtype


def _same(old: Key, new: Key) -> bool:
    return (
        len(old[0]) == len(new[0]) and old[1] == new[1] and all(map(operator.is_, old[0], new[0]))
    )


class Watch:
    """Keep what the modules around one attention are called with, and check it.

    Args:
        form: Of the attention.
    """

    def __init__(self, form: KeyValueForm) -> None:
        self.form = form
        self.seen: dict[str, Tensor] = {}
        self._muted = False
        self._modules = {"block": form.block, "attention": form.owner}
        if form.attention.norm is not None:
            self._modules["norm"] = form.block.get_submodule(form.attention.norm)
        if form.attention.reduces == "input":
            self._modules["layer"] = form.attention.projection.modules(form.owner)[0]
        self._handles = [
            module.register_forward_pre_hook(self._keep, with_kwargs=True)
            for module in self._modules.values()
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if self._muted:
            return
        for name, watched in self._modules.items():
            if watched is module and value is not None:
                self.seen[name] = value

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Take no notice of calls made for prompts."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def complete(self) -> bool:
        """Tell whether every module has been called."""
        return set(self.seen) == set(self._modules)

    @property
    def hidden(self) -> Tensor:
        """What the attention projects: its norm's input, or its own."""
        return self.seen.get("norm", self.seen["attention"])

    @torch.no_grad()
    def check(self, met: list[Met]) -> None:
        """Raise unless norm and projections give, for real hidden states, what softmaxes received.

        Raises:
            UnsupportedArchitectureError: They do not, or the block changes its input in front of
                its norm in a way that the family does not know.
        """
        form, attention = self.form, self.form.attention
        where = f"block {form.index} ({join(form.path, attention.path)})"
        hidden = as_tokens(self.hidden, form.width)
        if not attention.behind:
            block = as_tokens(self.seen["block"], form.width)
            _require(equal_rows(hidden, block), where, "its norm does not see the block's input")
        if attention.reduces == "output":
            _require(_same_heads(form.project(hidden), met), where, "its heads are not as known")
            return
        keys, values = form.project(hidden)
        if attention.reduces == "input":
            projection, owner = attention.projection, form.owner
            layer = self._modules["layer"]
            seen = as_tokens(self.seen["layer"], in_width(layer))
            keys, values = projection.keys_values(owner, seen)
        blank = form.project_blank(hidden)
        found = Rows.match(met, keys, values, blank, attention.heads_axis)
        problem = "" if found.values_equal() else found.report
        _require(not problem, where, _unequal("values", problem))
        problem = same_keys(found, attention.rotates)
        _require(not problem, where, _unequal("keys", problem))


def _same_heads(ours: tuple[Tensor, Tensor], met: list[Met]) -> bool:
    keys, values = met[0].keys, met[0].values
    assert values is not None
    sizes = (keys.shape[-1], values.shape[-1])
    heads = keys.dim() < 4 or keys.shape[1] % ours[0].shape[1] == 0
    return heads and sizes == (ours[0].shape[-1], ours[1].shape[-1])


def _unequal(name: str, problem: str) -> str:
    return (
        f"the {name} that norm and projections give are not those that the softmax receives "
        f"({problem})"
    )


def _require(true: bool, where: str, problem: str) -> None:
    if not true:
        raise UnsupportedArchitectureError(
            "",
            f"self-check of {where}: {problem}, so prompts as extra keys and values would be wrong",
            "The block does something that this family does not know",
        )


class Recorder(ForwardPatch):
    """Write down what the modules around one attention and its softmaxes are called with.

    Args:
        form: Of the attention; it is not attached itself.
    """

    def __init__(self, form: KeyValueForm) -> None:
        super().__init__(form.target)
        self._form = (form,)
        self.met: list[Met] = []
        self.watch: Watch | None = None

    @property
    def form(self) -> KeyValueForm:
        """The form of the attention."""
        return self._form[0]

    def attach(self) -> None:
        """Begin anew."""
        super().attach()
        self.met, self.watch = [], Watch(self.form)

    def detach(self) -> None:
        """Keep what was written down, and write no more."""
        super().detach()
        if self.watch is not None:
            self.watch.close()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the attention's `forward`."""
        with self.form.override(None, self.met):
            return self.original(*args, **kwargs)
