"""Make a small pre-trained backbone of another family, where none can be downloaded.

A student learns to give, for crops of unlabelled images, the features of a teacher: those that the
teacher's classifier would read. Labels, val and test images are not touched, and the heads and
prompts that are compared later are trained anew. Students are a DINOv2-type ViT (patch 14,
registers, layer scale) and a Swin, both small enough for a CPU, and faster on a GPU; the weights
are what ``examples/recipe_spread.py`` needs to show that a recipe is not one for a single backbone.

Usage: ``python examples/distill_backbone.py --student swin --data FOLDER --data FOLDER --teacher
NAME --weights FILE --out swin.safetensors``. It prints the ``--model`` and ``--model-args`` that
build the student. A run is repeatable given the seed, the number of threads and the versions.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from peft_vpt.data import open_task
from peft_vpt.experiments.backbones import device
from peft_vpt.hub.backbone import build_backbone

DEVICE = device()


class Student(NamedTuple):
    """timm's name, and what is smaller here than that name says."""

    name: str
    args: dict[str, Any]


STUDENTS = {
    # A layer scale of 1e-5, as the name has it, takes longer to leave than this training lasts.
    "dinov2": Student(
        "vit_small_patch14_reg4_dinov2.lvd142m",
        {"embed_dim": 192, "depth": 6, "num_heads": 3, "init_values": 0.1},
    ),
    # Three stages: 112 pixels make maps of 28, 14 and 7, which windows of 7 divide.
    "swin": Student(
        "swin_tiny_patch4_window7_224.ms_in22k",
        {"embed_dim": 48, "depths": [2, 2, 4], "num_heads": [2, 4, 8]},
    ),
}
STORED = 144  # edge of the images in memory, from which crops are taken


def read_images(folders: Sequence[Path]) -> Tensor:
    """Return the training images of tasks, uint8 `(images, 3, STORED, STORED)`, each once."""
    squeeze = v2.Compose([v2.PILToTensor(), v2.Resize((STORED, STORED), antialias=True)])
    found: dict[bytes, Tensor] = {}
    for folder in folders:
        split = open_task(folder).split("train")
        for index in range(len(split)):
            image = split.image(index)
            found[image.tobytes()] = squeeze(image)
    return torch.stack(list(found.values())).to(DEVICE)


def augment(size: int) -> v2.Transform:
    """Return random crops and looks, of a size that suits teacher and student."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.3, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.2),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def normalised(pixels: Tensor, model: nn.Module) -> Tensor:
    """Return pixels in 0 to 1 as a model wants them."""
    config: Any = model.pretrained_cfg
    return v2.functional.normalize(pixels, list(config["mean"]), list(config["std"]))


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return what the classifier of a timm model would read, `(images, width)`."""
    call: Any = model
    found: Tensor = call.forward_head(
        call.forward_features(normalised(pixels, model)), pre_logits=True
    )
    return found


def scale_of(teacher: nn.Module, images: Tensor, looks: v2.Transform) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the teacher's features over some crops."""
    with torch.inference_mode():
        batches = torch.stack([looks(image) for image in images[:: max(1, len(images) // 512)]])
        found = torch.cat([features(teacher, part) for part in batches.split(64)])
    # Tensors of inference mode could not take part in what has gradients.
    return found.mean(0).clone(), found.std(0).clone()


def distill(
    student: nn.Module, teacher: nn.Module, images: Tensor, args: argparse.Namespace
) -> float:
    """Train the student in place; return the share of the variance that it explains at the end."""
    looks, start = augment(args.size), time.perf_counter()
    mean, deviation = (part.detach().clone() for part in scale_of(teacher, images, looks))
    to_teacher = nn.Linear(student.num_features, teacher.num_features).to(DEVICE)  # type: ignore[arg-type]
    moved = nn.ModuleList([student, to_teacher])
    optimizer = torch.optim.AdamW(moved.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    explained = 0.0
    for step in range(args.steps):
        chosen = torch.randint(len(images), (args.batch,))
        pixels = torch.stack([looks(images[index]) for index in chosen])
        with torch.no_grad():
            target = (features(teacher, pixels) - mean) / deviation
        loss = F.mse_loss(to_teacher(features(student, pixels)), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(moved.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        now = 1.0 - loss.item()
        explained = now if step == 0 else 0.98 * explained + 0.02 * now
        if (step + 1) % 100 == 0:
            elapsed = time.perf_counter() - start
            print(f"step {step + 1}: explained {explained:.3f}, {elapsed:.0f} s", flush=True)
    return explained


def main(arguments: Sequence[str] | None = None) -> Path:
    """Distil a student and save its weights; return the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--student", choices=list(STUDENTS), required=True)
    add("--data", type=Path, action="append", required=True, help="folder of a task; repeatable")
    add("--teacher", required=True, help="timm's name")
    add("--weights", type=Path, required=True, help="its weights, a safetensors file")
    add("--out", type=Path, required=True)
    add("--size", type=int, default=112)
    add("--steps", type=int, default=3000)
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    chosen = STUDENTS[args.student]
    model_args = {**chosen.args, "num_classes": 0}
    student = timm.create_model(chosen.name, img_size=args.size, **model_args).to(DEVICE).train()
    teacher = build_backbone("timm", args.teacher, weights=args.weights, image_size=args.size).to(
        DEVICE
    )
    images = read_images(args.data)
    count = sum(p.numel() for p in student.parameters())
    print(f"{len(images)} images; {chosen.name} with {count:,} parameters", flush=True)
    explained = distill(student, teacher, images, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in student.state_dict().items()},
        args.out,
        metadata={"model": chosen.name, "model_args": json.dumps(model_args)},
    )
    print(f"explained variance of the teacher's features: {explained:.3f}\nwrote {args.out}")
    print(f"--model {chosen.name} --model-args '{json.dumps(model_args)}' --size {args.size}")
    written: Path = args.out
    return written


if __name__ == "__main__":
    main()
