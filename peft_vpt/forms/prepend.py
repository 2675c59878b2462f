"""Location "prepend": prompts are tokens of their own; the form of every span is chosen here."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..backbones.windows import mergings, window_parts
from ..errors import UnsupportedArchitectureError
from ..prompts import Place, Prompts
from .attach import Form
from .kv import KeyValueForm
from .token import TokenForm
from .window import MergeForm, Stream, WindowForm


class Prepend(Place):
    """The location.

    Source: Jia et al. 2022, section 3.2.
    """

    def forms(self, prompts: Prompts, host: nn.Module) -> list[Any]:
        """Return the forms of the tokens."""
        return token_forms(prompts, host)


def token_forms(prompts: Prompts, host: nn.Module) -> list[Form]:
    """Choose the form of every span, and return its pieces."""
    spec, encoder = prompts.spec, prompts.encoder
    forms: list[Form] = []
    spans = spec.spans(encoder.depth)
    for span in spans:
        block = encoder.blocks[span[0]]
        reason = spec.token_reason(span, last=span is spans[-1])
        if reason is None and spec.dropout and len(block.attentions) > 1:
            reason = "several attentions of a block share one dropout mask"
        if reason is None:
            forms += [
                KeyValueForm(prompts, host, block, a, index=span[0]) for a in block.attentions
            ]
        elif encoder.plain:
            stays = span is spans[-1] and spec.pooling in ("prompt", "global")
            forms += _sequence_forms(prompts, host, span, reason, stays=stays)
        else:
            forms += _window_forms(prompts, host, span, reason)
    return forms


def _sequence_forms(
    prompts: Prompts, host: nn.Module, span: tuple[int, int], reason: str, *, stays: bool
) -> list[TokenForm]:
    """Return the forms of a span through blocks on one sequence, behind which prompts may stay."""
    return [
        TokenForm(
            prompts,
            host,
            prompts.encoder.blocks[i],
            entry=span[0],
            index=i,
            leaves=i == span[1] and not stays,
            reason=reason,
        )
        for i in range(span[0], span[1] + 1)
    ]


def _window_forms(
    prompts: Prompts, host: nn.Module, span: tuple[int, int], reason: str
) -> list[Form]:
    """Return the forms of a span through windowed blocks of several stages.

    Raises:
        UnsupportedArchitectureError: The blocks are no Swin blocks.
    """
    encoder = prompts.encoder
    blocks = encoder.blocks[span[0] : span[1] + 1]
    parts = [window_parts(host.get_submodule(block.path)) for block in blocks]
    if None in parts or prompts.spec.pooling != "default":
        raise UnsupportedArchitectureError(
            "inject_prompts",
            f"{encoder.family} has no one sequence of tokens that could carry prompts ({reason})",
            "Use `deep=True` with `form='auto'` and `pooling='default'`, where prompts stay in "
            "their block; `dropout=0` where a block holds several attentions",
        )
    stream = Stream()
    forms: list[Form] = [
        WindowForm(
            prompts,
            host,
            block,
            part,
            entry=span[0],
            index=index,
            leaves=index == span[1],
            stream=stream,
        )
        for index, (block, part) in enumerate(zip(blocks, parts, strict=True), span[0])
        if part is not None
    ]
    between = {block.stage for block in blocks}
    mergers = mergings(host.get_submodule(encoder.path))[min(between) : max(between)]
    return forms + [MergeForm(prompts, merger, stream) for merger in mergers]
