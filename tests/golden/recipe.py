"""Hosts of golden adapters, from their recipes; nothing here imports peft_vpt.

A `.json` beside an adapter names library, constructor and options of the host, the input by its
seed and shape, what to read, and the numbers that must come out.
"""

import zlib

import torch

_MASK = 0xFFFFFFFF


def numbers(name, shape):
    """Values in (-1, 1) from name and index, by integer arithmetic alone: equal everywhere.

    Source: the finalizer of murmur3.
    """
    shape = tuple(shape)
    x = torch.arange(max(1, int(torch.tensor(shape).prod()) if shape else 1), dtype=torch.int64)
    x = (x * 0x9E3779B1 + zlib.crc32(name.encode())) & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return ((x.to(torch.float64) + 0.5) / 2**31 - 1).reshape(shape)


@torch.no_grad()
def fill(module, names=None, scale=0.15, prefix=""):
    """Set floating parameters and persistent buffers (all, or `names`) by their names.

    Matrices +-scale, vectors 1 +- 0.2 where they scale, else +-0.1.
    """
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or (names is not None and name not in names):
            continue
        u = numbers(prefix + name, tensor.shape)
        scales = tensor.dim() == 1 and not name.endswith(("bias", "running_mean"))
        tensor.copy_(1 + 0.2 * u if scales else u * (0.1 if tensor.dim() == 1 else scale))
    return module


def build(recipe):
    """The host of a case, in eval mode."""
    host = recipe["host"]
    torch.manual_seed(host["seed"])
    if host["library"] == "timm":
        import timm

        model = timm.create_model(host["name"], **host["kwargs"])
    else:
        import transformers

        config = getattr(transformers, host["config"])(**host["kwargs"])
        model = getattr(transformers, host["name"])(config)
    return fill(model).eval()


def image(recipe):
    """The input of a case, float32."""
    return numbers(f"image {recipe['input']['seed']}", recipe["input"]["shape"]).mul(1.5).float()


@torch.no_grad()
def answer(model, recipe):
    """What the case's expected numbers are: logits, or features of a model without a head."""
    out = model(image(recipe))
    if recipe["output"] == "logits" and not torch.is_tensor(out):
        return out.logits
    return out if torch.is_tensor(out) else out.last_hidden_state[:, 0]
