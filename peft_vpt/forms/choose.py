"""Choosing the form of every span, and building its pieces."""

from __future__ import annotations

from torch import nn

from ..prompts import Prompts
from .kv import KeyValueForm
from .pooling import Pooling
from .slot import Slot
from .token import OutputCut, TokenForm


def build_forms(prompts: Prompts, model: nn.Module) -> None:
    """Choose the form of every span and append its pieces to `prompts.forms`."""
    spec, encoder = prompts.spec, prompts.encoder
    spans = spec.spans(encoder.depth)
    own = Slot()
    tokens = long = False
    for span in spans:
        reason = spec.token_reason(span, last=span is spans[-1])
        if reason is None and spec.dropout and len(encoder.blocks[span[0]].attentions) > 1:
            reason = "several attentions of a block share one dropout mask"
        if reason is None:
            prompts.forms.extend(_key_value_forms(prompts, model, span[0]))
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
