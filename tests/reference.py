"""The oracle: prompts as the paper writes them, in a plain loop over the bare model's blocks.

Slow and obvious on purpose. It knows nothing of the library under test: it takes a bare model,
values of prompts, and says where they enter and leave.

Source: Jia et al., ECCV 2022, equations 4 to 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def run_blocks(
    blocks: Any,
    tokens: Tensor,
    prefix: int,
    prompts: dict[int, Tensor],
    spans: list[tuple[int, int]],
    dropout: float = 0.0,
) -> tuple[Tensor, int]:
    """Insert prompts `(p, dim)` behind the prefix tokens, run the blocks, take prompts out again.

    Returns:
        Tokens behind the last block, prompts of a span that reaches it included, and their number.
    """
    enters, leaves = {enter for enter, _ in spans}, {leave for _, leave in spans}
    inside = 0
    for i, block in enumerate(blocks):
        if i in enters:
            values = prompts[i].unsqueeze(0).expand(tokens.shape[0], -1, -1)
            values = F.dropout(values, dropout) if dropout else values
            inside = values.shape[1]
            tokens = torch.cat([tokens[:, :prefix], values, tokens[:, prefix:]], dim=1)
        out = block(tokens)
        tokens = out[0] if isinstance(out, tuple) else out
        if i in leaves and i < len(blocks) - 1:
            tokens = drop(tokens, prefix, inside)
            inside = 0
    return tokens, inside


def drop(tokens: Tensor, prefix: int, inside: int) -> Tensor:
    """Take the prompts behind the prefix out of `(batch, tokens, dim)`."""
    return torch.cat([tokens[:, :prefix], tokens[:, prefix + inside :]], dim=1)


def predict(
    model: nn.Module,
    image: Tensor,
    prompts: dict[int, Tensor],
    spans: list[tuple[int, int]],
    *,
    pooling: str = "default",
    dropout: float = 0.0,
) -> Tensor:
    """Return the logits (or the last hidden state) of a bare model with prompts."""
    stem, blocks, prefix, norm, head = anatomy(model)
    tokens, inside = run_blocks(blocks, stem(image), prefix, prompts, spans, dropout)
    tokens = norm(tokens)
    own = drop(tokens, prefix, inside)
    if pooling == "default":
        return head(own)
    pooled = {
        "cls": tokens[:, 0],
        "image": own[:, prefix:].mean(1),
        "prompt": tokens[:, prefix : prefix + inside].mean(1),
        "global": tokens[:, prefix:].mean(1),
    }[pooling]
    return classify(model, pooled)


def classify(model: nn.Module, pooled: Tensor) -> Tensor:
    """Feed a pooled vector to what stands behind the pooling."""
    if hasattr(model, "blocks"):
        return model.head(model.fc_norm(pooled))
    if hasattr(model, "beit") and model.beit.pooler.layernorm is not None:
        pooled = model.beit.pooler.layernorm(pooled)
    return model.classifier(pooled)


def anatomy(model: nn.Module) -> tuple[Callable[..., Tensor], Any, int, Callable[..., Tensor], Any]:
    """Return stem, blocks, number of prefix tokens, final norm, and tokens to logits."""
    if hasattr(model, "blocks"):
        return _timm(model)
    return _transformers(model)


def _timm(model: Any) -> Any:
    def stem(image: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))

    return stem, model.blocks, model.num_prefix_tokens, model.norm, model.forward_head


def _transformers(model: Any) -> Any:
    identity = nn.Identity()
    name = type(model).__name__
    if name == "ViTModel":
        return model.embeddings, model.layers, 1, model.layernorm, identity
    if name == "ViTMAEModel":
        # The shuffle of its random masking moves tokens, so the embeddings get fixed noise.
        def stem(image: Tensor) -> Tensor:
            return model.embeddings(image, noise=mae_noise(image))[0]

        return stem, model.layers, 1, model.layernorm, identity
    if name == "DeiTForImageClassificationWithTeacher":

        def head(t: Tensor) -> Tensor:
            return (model.cls_classifier(t[:, 0]) + model.distillation_classifier(t[:, 1])) / 2

        return model.deit.embeddings, model.deit.layers, 2, model.deit.layernorm, head
    classifier = model.classifier
    if name in ("ViTForImageClassification", "ViTMSNForImageClassification"):
        inner = model.vit
        return inner.embeddings, inner.layers, 1, inner.layernorm, lambda t: classifier(t[:, 0])
    if name == "DeiTForImageClassification":
        inner = model.deit
        return inner.embeddings, inner.layers, 2, inner.layernorm, lambda t: classifier(t[:, 0])
    if name == "BeitForImageClassification":
        inner = model.beit
        return (
            inner.embeddings,
            inner.layers,
            1,
            inner.layernorm,
            lambda t: classifier(inner.pooler(t)),
        )
    if name.startswith("Dinov2"):
        inner = getattr(model, "dinov2", None) or model.dinov2_with_registers
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)

        def head(t: Tensor) -> Tensor:
            return classifier(torch.cat([t[:, 0], t[:, prefix:].mean(1)], dim=1))

        return inner.embeddings, inner.encoder.layer, prefix, inner.layernorm, head
    inner = model.vision_model
    if name.startswith("CLIP"):

        def stem(image: Tensor) -> Tensor:
            return inner.pre_layrnorm(inner.embeddings(image))

        return stem, _masked(inner), 1, identity, lambda t: classifier(t[:, 1:].mean(1))
    assert name.startswith("Siglip")
    return (
        inner.embeddings,
        _masked(inner),
        0,
        inner.post_layernorm,
        lambda t: classifier(t.mean(1)),
    )


def _masked(inner: Any) -> list[Callable[[Tensor], Any]]:
    """Return CLIP's and SigLIP's layers with the attention mask that they insist on (none)."""
    return [lambda t, layer=layer: layer(t, None) for layer in inner.encoder.layers]


def mae_noise(image: Tensor) -> Tensor:
    """Return rising noise, which leaves the patches of an 8-pixel grid in order."""
    patches = (image.shape[-1] // 8) ** 2
    return torch.arange(patches, dtype=torch.float32).expand(image.shape[0], -1) / patches


def put_head(bare: nn.Module, leaves: dict[str, Tensor]) -> nn.Module:
    """Give a bare model the head's leaves, so that the oracle's gradients reach them."""
    bare.requires_grad_(False)
    for name, leaf in leaves.items():
        if not name.startswith("prompts."):
            owner, _, last = name.rpartition(".")
            module = bare.get_submodule(owner)
            delattr(module, last)
            setattr(module, last, leaf)
    return bare


def same_gradients(
    ours: Tensor,
    theirs: Tensor,
    parameters: dict[str, nn.Parameter],
    leaves: dict[str, Tensor],
    rtol: float,
    atol: float,
) -> None:
    """Go backward from both outputs; compare every gradient, none zero; `atol` of its largest."""
    weights = torch.linspace(0.5, 1.5, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for name, parameter in parameters.items():
        grad = parameter.grad
        assert grad is not None, name
        assert grad.abs().max() > 0, name
        largest = float(grad.abs().max())
        torch.testing.assert_close(
            grad,
            leaves[name].grad,
            rtol=rtol,
            atol=atol * largest,
            msg=lambda text, n=name: f"{n}: {text}",
        )
