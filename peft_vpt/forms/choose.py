"""Choosing the form of every span, and building its pieces."""

from __future__ import annotations

from torch import nn

from ..backbones.windows import mergings, window_parts
from ..errors import UnsupportedArchitectureError
from ..prompts import Prompts
from .add import AddForm
from .attach import Form, Slot
from .kv import KeyValueForm
from .pixel import pixel_forms
from .pooling import Pooling
from .token import OutputCut, TokenForm
from .window import MergeForm, Stream, WindowForm


def build_forms(prompts: Prompts, model: nn.Module) -> None:
    """Choose the form of every span and append its pieces to `prompts.forms`."""
    spec, encoder = prompts.spec, prompts.encoder
    spans = spec.spans(encoder.depth)
    own = Slot()
    tokens = long = False
    prompts.forms.extend(pixel_forms(prompts, model))
    for span in spans:
        if spec.location == "add":
            block = encoder.blocks[span[0]]
            prompts.forms.append(AddForm(prompts, model, block, index=span[0]))
            continue
        reason = spec.token_reason(span, last=span is spans[-1])
        if reason is None and spec.dropout and len(encoder.blocks[span[0]].attentions) > 1:
            reason = "several attentions of a block share one dropout mask"
        if reason is None:
            prompts.forms.extend(_key_value_forms(prompts, model, span[0]))
            continue
        if not encoder.plain:
            prompts.forms.extend(_window_forms(prompts, model, span, reason))
            continue
        tokens = True
        stays = span is spans[-1] and spec.pooling in ("prompt", "global")
        long |= span[0] != span[1] or stays
        prompts.forms.extend(
            TokenForm(
                prompts,
                model,
                encoder.blocks[i],
                entry=span[0],
                index=i,
                leaves=i == span[1] and not stays,
                reason=reason,
                own=own,
            )
            for i in range(span[0], span[1] + 1)
        )
    if spec.pooling != "default":
        prompts.forms.append(Pooling(prompts, model, encoder, own))
    # Attention maps of transformers show prompts as queries even where they stay in one block.
    if long or (tokens and encoder.library == "transformers"):
        prompts.forms.append(OutputCut(prompts, model, encoder, own))


def _window_forms(
    prompts: Prompts, model: nn.Module, span: tuple[int, int], reason: str
) -> list[Form]:
    """Return the forms of a span through windowed blocks of several stages.

    Raises:
        UnsupportedArchitectureError: The blocks are no Swin blocks.
    """
    encoder = prompts.encoder
    blocks = encoder.blocks[span[0] : span[1] + 1]
    parts = [window_parts(model.get_submodule(block.path)) for block in blocks]
    if None in parts or prompts.spec.pooling != "default":
        raise UnsupportedArchitectureError(
            f"inject_prompts: {encoder.family} has no one sequence of tokens that could carry "
            f"prompts ({reason}). Use deep=True with form='auto' and pooling='default', where "
            "prompts stay in their block; dropout=0 where a block holds several attentions."
        )
    stream = Stream()
    forms: list[Form] = [
        WindowForm(
            prompts,
            model,
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
    mergers = mergings(model.get_submodule(encoder.path))[min(between) : max(between)]
    return forms + [MergeForm(prompts, merger, stream) for merger in mergers]


def _key_value_forms(prompts: Prompts, model: nn.Module, index: int) -> list[KeyValueForm]:
    block = prompts.encoder.blocks[index]
    return [KeyValueForm(prompts, model, block, a, index=index) for a in block.attentions]


def every_attention(prompts: Prompts, model: nn.Module) -> list[KeyValueForm]:
    """Return a form for every attention that prompts meet, in whatever form they meet it."""
    met = {
        i
        for enter, leave in prompts.spec.spans(prompts.encoder.depth)
        for i in range(enter, leave + 1)
    }
    return [form for index in sorted(met) for form in _key_value_forms(prompts, model, index)]
