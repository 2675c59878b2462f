"""Adapt a pretrained timm ViT to a folder of images in several ways, and compare them.

The folder has the VTAB-1k layout: text files with ``path label`` per line, paths relative to the
folder, and optionally ``classes.txt`` with a name per line. The weights are a safetensors file of
a timm ViT; with ``--library transformers`` they are ported to ``ViTForImageClassification`` first.
Other image sizes than the pretrained one are fine: timm resamples the position embeddings.

- linear: a new head on the frozen backbone.
- shallow, deep: prompts and a new head, by ``peft_vpt``.
- full: everything trains.

All methods share images, order, flips and schedule (a warm-up, then a cosine, per step). The
default learning rates are those that did best on the validation images of an aerial task at 112
pixels; ``--splits train800.txt val200.txt`` is the way to choose others. With ``--out``, prompted
models are saved as task adapters, which load onto the timm model and onto its port alike, and the
other methods' trained tensors as plain safetensors files.

Usage: ``python examples/finetune_folder.py --data FOLDER --weights FILE.safetensors``. Nothing is
downloaded.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from peft_vpt import (
    count_parameters,
    inject_prompts,
    is_prompted,
    save_task_adapter,
    trainable_parameters,
)

MEAN = STD = 0.5
SPLITS = ["train800val200.txt", "test.txt"]
RATES = {"linear": 2e-3, "shallow": 8e-3, "deep": 8e-3, "full": 3e-4}
# timm's names and those of transformers 5.23; `attn.qkv` is three projections there.
PORT = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
    "blocks.": "vit.layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".attn.proj.": ".attention.o_proj.",
    "norm.": "vit.layernorm.",
    "head.": "classifier.",
}


class Split(NamedTuple):
    """Images as uint8 `(n, 3, size, size)` and labels `(n,)`."""

    images: Tensor
    labels: Tensor


def read_split(folder: Path, name: str, size: int) -> Split:
    """Decode the images that a list names, resized to `size` x `size`, into one tensor."""
    lines = [line.rsplit(maxsplit=1) for line in (folder / name).read_text().splitlines() if line]
    images = torch.empty(len(lines), 3, size, size, dtype=torch.uint8)
    for image, (path, _) in zip(images, lines, strict=True):
        with Image.open(folder / path) as file:
            pixels = file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        image.copy_(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    return Split(images, torch.tensor([int(label) for _, label in lines]))


def class_names(folder: Path, labels: Tensor) -> list[str]:
    """Return the names in ``classes.txt``, or the numbers where there is no such file."""
    file = folder / "classes.txt"
    if file.exists():
        return file.read_text().splitlines()
    return [str(label) for label in range(int(labels.max()) + 1)]


def build_backbone(weights: Path, name: str, size: int, library: str = "timm") -> nn.Module:
    """Build the pretrained model for images of `size` x `size`, in timm or ported from it."""
    overlay = {"file": str(weights)}
    vit = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size)
    return vit if library == "timm" else port_to_transformers(vit)


def port_to_transformers(vit: nn.Module) -> nn.Module:
    """Return the transformers twin of a plain timm ViT: CLS token, qkv bias, pre-norm."""
    from transformers import ViTConfig, ViTForImageClassification

    block, patches = vit.blocks[0], vit.patch_embed
    config = ViTConfig(
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act="gelu",  # the exact one in both libraries
        layer_norm_eps=block.norm1.eps,
        image_size=patches.img_size[0],
        patch_size=patches.patch_size[0],
        num_labels=vit.head.out_features,
    )
    state: dict[str, Tensor] = {}
    for name, tensor in vit.state_dict().items():
        for old, new in PORT.items():
            if name.startswith(old) or (old.startswith(".") and old in name):
                name = name.replace(old, new, 1)
        if "attn.qkv" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{part}_proj")] = rows.clone()
        else:
            state[name] = tensor.clone()
    port = ViTForImageClassification(config)
    port.load_state_dict(state)
    return port.eval()


def adapt(model: nn.Module, method: str, classes: int, length: int, seed: int) -> nn.Module:
    """Give the model a new head and, by method, prompts; leave trainable what trains."""
    generator = torch.Generator().manual_seed(seed)
    if method in ("shallow", "deep"):
        return inject_prompts(
            model, length, deep=method == "deep", num_classes=classes, generator=generator
        )
    model.requires_grad_(method == "full")
    name = "head" if hasattr(model, "head") else "classifier"
    head = nn.Linear(getattr(model, name).in_features, classes)
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    setattr(model, name, head)
    return model


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits for uint8 images, from a model of either library."""
    output = model((images / 255 - MEAN) / STD)
    return output if isinstance(output, Tensor) else output.logits


def train(
    model: nn.Module, data: Split, *, rate: float, epochs: int, batch: int = 64, seed: int = 0
) -> float:
    """Train what is trainable; return the mean seconds per epoch."""
    steps = epochs * math.ceil(len(data.labels) / batch)
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(10 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the dropout of prompts draws from the global generator
    model.train()
    start = time.perf_counter()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=generator).split(batch):
            images, labels = data.images[chosen], data.labels[chosen]
            flipped = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
            logits = predict(model, torch.where(flipped, images.flip(-1), images))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            schedule.step()
    return (time.perf_counter() - start) / epochs


@torch.no_grad()
def all_logits(model: nn.Module, images: Tensor, batch: int = 100) -> Tensor:
    """Return the logits of all images, in eval mode."""
    model.eval()
    return torch.cat([predict(model, part) for part in images.split(batch)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is the label's."""
    return (logits.argmax(1) == labels).float().mean().item()


def save(model: nn.Module, path: Path, size: int, **metadata: Any) -> Path:
    """Save a task adapter, or the bare trained tensors of a model without prompts."""
    if is_prompted(model):
        look = {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "crop": 1.0}
        return save_task_adapter(
            model, path, preprocessing={"size": [size, size]} | look, **metadata
        )
    path.mkdir(parents=True, exist_ok=True)
    file = path / "trained.safetensors"
    save_file({name: p.detach() for name, p in trainable_parameters(model).items()}, file)
    return file


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare ways to adapt a pretrained ViT.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with lists and images")
    add("--weights", type=Path, required=True, help="safetensors of a timm ViT")
    add("--model", default="vit_tiny_patch16_224", help="timm's name for it")
    add("--library", choices=("timm", "transformers"), default="timm")
    add("--method", nargs="+", choices=tuple(RATES), default=["linear", "shallow", "deep"])
    add("--splits", nargs=2, default=SPLITS, metavar=("TRAIN", "TEST"), help="names of lists")
    add("--size", type=int, default=112, help="side of the images in pixels")
    add("--epochs", type=int, default=12)
    add("--length", type=int, default=20, help="prompts per entry")
    add("--lr", type=float, help=f"peak learning rate; by default {RATES}")
    add("--batch", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="folder for what was trained")
    return parser.parse_args()


def run(method: str, args: argparse.Namespace, data: list[Split]) -> str:
    """Adapt, train, test and save by one method; return its row of the table."""
    names = class_names(args.data, torch.cat([split.labels for split in data]))
    model = build_backbone(args.weights, args.model, args.size, args.library)
    adapt(model, method, len(names), args.length, args.seed)
    rate = args.lr or RATES[method]
    seconds = train(model, data[0], rate=rate, epochs=args.epochs, batch=args.batch, seed=args.seed)
    score, kilobytes = accuracy(all_logits(model, data[1].images), data[1].labels), "-"
    if args.out:
        metrics = {"accuracy": round(score, 4), "images": len(data[1].labels)}
        path, task = args.out / f"{args.library}-{method}", args.data.resolve().name
        file = save(model, path, args.size, task=task, labels=names, metrics=metrics)
        kilobytes = f"{file.stat().st_size / 1000:.0f}"
    trainable = count_parameters(model).trainable
    return f"{method:8} {rate:7.0e} {trainable:11,} {kilobytes:>8} {seconds:10.1f} {score:9.3f}"


def main() -> None:
    """Read the images, run the methods and print a table."""
    args = parse_arguments()
    data = [read_split(args.data, name, args.size) for name in args.splits]
    print(f"{args.data.resolve().name}, {args.size} px: ", end="")
    print(f"{len(data[0].labels)} images for training, {len(data[1].labels)} for testing;")
    print(f"{args.model} in {args.library}; {args.epochs} epochs, batch {args.batch}, ", end="")
    print(f"{args.length} prompts, seed {args.seed};")
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads")
    print("method        lr   trainable  file kB  s / epoch  accuracy")
    for method in args.method:
        print(run(method, args, data), flush=True)


if __name__ == "__main__":
    main()
