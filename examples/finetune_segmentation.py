"""Segment images with a small SETR-PUP decoder over a prompted ViT, by several protocols.

The folder has ADE20K's layout: ``images/{training,validation,test}``, ``annotations/...`` with
8-bit masks of class indices (255 is ignored), and ``classes.txt``. Without ``--data`` a small set
of discs and squares is drawn, and without ``--model`` the backbone is the tiny ViT in assets, so
the script runs offline in a minute or two.

Per protocol: one run per learning rate (a multiple of the preset's) on the training images, judged
by mIoU on val; the best one (of equals the smallest) over all seeds; these alone see the test
images, at their own size, in sliding windows, at one scale and at several. "head" trains the
decoder alone.

``OUTPUT/records.jsonl`` gets a record per run, and a run that has one is not run again. Beside it
is a task adapter per run, decoder and prompts in one file, from which test results are made; its
folder is named by the run's whole configuration, checksums of images, masks and weights included,
so other options never meet its weights. A run that diverges has a record that says so.

Usage: ``python examples/finetune_segmentation.py --data FOLDER --model NAME --weights
FILE.safetensors --size 128``. With ``--weights`` nothing is downloaded.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open
from torch import nn

from peft_vpt import count_parameters, trainable_parameters
from peft_vpt.data import (
    SegmentationTask,
    open_segmentation,
    segmentation_loader,
    segmentation_transform,
)
from peft_vpt.experiments import append_record, make_record, record_key
from peft_vpt.experiments.backbones import device
from peft_vpt.experiments.compare import FACTORS
from peft_vpt.experiments.records import config_hash, same_run
from peft_vpt.experiments.report import mark, markdown_table
from peft_vpt.experiments.sums import file_sum, model_sum, text_sum
from peft_vpt.segmentation import Scores, Segmenter, load_segmenter, predict, save_segmenter, score
from peft_vpt.training import DivergedError, Recipe, lr_factor, preset
from peft_vpt.training.checkpoint import library_versions
from peft_vpt.training.optim import set_rate

DEVICE = device()
ASSET = Path(__file__).parent / "assets" / "vit_tiny_glyphs.safetensors"
LOOK = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
PROTOCOLS = "head,bias,vpt-deep,vpt+bias,full"


def draw_shapes(folder: Path, seed: int = 0) -> Path:
    """Write images of discs and squares in any colours, with masks, in ADE20K's layout."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :48]
    for split, count in {"training": 32, "validation": 8, "test": 8}.items():
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels, mask = rng.integers(0, 60, (48, 48, 3)), np.zeros((48, 48), np.uint8)
            for label in rng.integers(1, 3, 3):
                (a, b), radius = rng.integers(6, 42, 2), rng.integers(4, 9)
                far = np.maximum(abs(y - a), abs(x - b)) if label == 2 else np.hypot(y - a, x - b)
                pixels[far <= radius] = rng.integers(90, 256, 3)
                mask[far <= radius] = label
            name = f"{split}/{index:03}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
            Image.fromarray(mask).save(folder / "annotations" / name)
    (folder / "classes.txt").write_text("background\ndisc\nsquare\n")
    return folder


def fit(model: Segmenter, batches: Any, *, recipe: Recipe) -> tuple[float, float]:
    """Train in place by AdamW; return the seconds and the mean loss of the last epoch.

    Raises:
        DivergedError: A loss is not finite.
    """
    began, loss, step = time.perf_counter(), 0.0, 0
    groups = [
        {
            "params": [parameter],
            "initial_lr": recipe.peak_lr * (recipe.prompt_lr_scale if ".prompts." in name else 1.0),
            "weight_decay": recipe.weight_decay if parameter.ndim > 1 else 0.0,
        }
        for name, parameter in trainable_parameters(model).items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps)
    model.train()
    for _ in range(recipe.epochs):
        losses = []
        for pixels, masks in batches:
            set_rate(optimizer, lr_factor(step, len(batches), recipe))
            found = model.loss(pixels.to(DEVICE), masks.to(DEVICE))
            if not found.isfinite():
                raise DivergedError(f"step {step + 1}: the loss is {found.item()}")
            optimizer.zero_grad()
            found.backward()
            if recipe.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            losses.append(found.item())
            step += 1
        loss = float(np.mean(losses))
    model.eval()
    return time.perf_counter() - began, loss


class Runs:
    """All runs on one task: from the command line's options to records.

    Args:
        args: The options.
        task: Images and masks.
    """

    def __init__(self, args: argparse.Namespace, task: SegmentationTask) -> None:
        self.args, self.task, self.file = args, task, args.output / "records.jsonl"
        look = timm.data.resolve_model_data_config(self.backbone())
        self.augment = segmentation_transform(look, "train", args.size, scale=args.crops)
        self.whole = segmentation_transform(look, "full", args.size)

    @cached_property
    def weights(self) -> str:
        """What tells the backbone's weights from others of its name."""
        return file_sum(self.args.weights) if self.args.weights else model_sum(self.backbone())

    @cached_property
    def images(self) -> dict[str, str]:
        """What tells the images and masks of a split from all others, whatever their names."""
        return {
            name: text_sum([file_sum(path) for pair in split.pairs for path in pair])
            for name, split in self.task.splits.items()
        }

    def backbone(self) -> nn.Module:
        """Build the pretrained ViT for windows of the size wanted."""
        sized: dict[str, Any] = {} if self.args.size is None else {"img_size": self.args.size}
        if self.args.model:
            overlay = {"file": str(self.args.weights)} if self.args.weights else None
            return timm.create_model(
                self.args.model, pretrained=True, pretrained_cfg_overlay=overlay, **sized
            ).eval()
        with safe_open(ASSET, "pt") as file:
            vit = timm.models.VisionTransformer(**json.loads(file.metadata()["model_args"]))
        vit.load_state_dict(load_file(ASSET))
        vit.pretrained_cfg = {"input_size": (3, 32, 32), **LOOK}
        return vit.eval()

    def window(self) -> tuple[int, int]:
        """Return height and width of what the model sees at once."""
        height, width = self.whole.preprocessing["size"]
        return height, width

    def recipe(self, protocol: str, factor: float, seed: int) -> Recipe:
        """Return how a run trains."""
        found = preset(
            "linear" if protocol == "head" else protocol,
            epochs=self.args.epochs,
            batch_size=self.args.batch,
            seed=seed,
        )
        return replace(found, base_lr=found.base_lr * factor)

    def config(self, protocol: str, factor: float, seed: int, split: str) -> dict[str, Any]:
        """Return what makes a run another run, beside task, protocol, backbone and seed."""
        args, prompted = self.args, protocol.startswith("vpt")
        sides = {"overlap": args.overlap, "window": list(self.window())}
        if split == "test":
            sides |= {"scales": list(args.scales), "flip": args.flip}
        return {
            "recipe": self.recipe(protocol, factor, seed).to_dict(),
            "options": {"length": args.length} if prompted else {},
            "weights": self.weights,
            "images": self.images,
            "decoder": {"channels": args.channels},
            "preprocessing": self.whole.preprocessing,
            "augmentation": self.augment.describe(),
            "evaluation": sides,
        }

    def stub(self, protocol: str, factor: float, seed: int, split: str) -> dict[str, Any]:
        """Return the record of a run without what it finds."""
        return make_record(
            task=self.task.name,
            group="segmentation",
            protocol=protocol,
            backbone=self.args.model or ASSET.stem,
            seed=seed,
            split=split,
            metrics={},
            config=self.config(protocol, factor, seed, split),
            versions=library_versions(),
        )

    def folder(self, protocol: str, factor: float, seed: int) -> Path:
        """Return where a run's weights are, and no other run's."""
        run = config_hash({"run": record_key(self.stub(protocol, factor, seed, "val"))})
        return self.args.output / self.task.name / f"{protocol}-x{factor:g}-{seed}-{run}"

    def run(self, protocol: str, factor: float, seed: int, split: str) -> dict[str, Any]:
        """Return the record of a run on val or test: the one that is there, or a new one."""
        stub = self.stub(protocol, factor, seed, split)
        folder = self.folder(protocol, factor, seed)
        there = same_run(self.file, stub)
        saved = (folder / "adapter.safetensors").exists()
        if there and (split == "test" or saved or "failure" in there):
            return there
        if split == "test":
            self.run(protocol, factor, seed, "val")
        print(f"{protocol}, rate x {factor:g}, seed {seed}: {split}", flush=True)
        make = self.train if split == "val" else self.test
        try:
            record = stub | make(protocol, factor, seed, folder)
        except DivergedError as error:
            print(f"diverged: {error}", flush=True)
            record = stub | {"metrics": {"miou": 0.0, "diverged": 1.0}, "failure": str(error)}
        append_record(self.file, record)
        return record

    def train(self, protocol: str, factor: float, seed: int, folder: Path) -> dict[str, Any]:
        """Train a segmenter, save it, and measure it on val."""
        began, options = time.process_time(), self.config(protocol, factor, seed, "val")["options"]
        torch.manual_seed(seed)
        model = Segmenter(
            self.backbone(), len(self.task.classes), "linear" if protocol == "head" else protocol,
            channels=self.args.channels, generator=torch.Generator().manual_seed(seed), **options,
        ).to(DEVICE)  # fmt: skip
        batches = segmentation_loader(
            self.task.splits["train"], self.augment, batch_size=self.args.batch, shuffle=True,
            seed=seed,
        )  # fmt: skip
        seconds, loss = fit(model, batches, recipe=self.recipe(protocol, factor, seed))
        found, classes = self.measure(model, "val", (1.0,)), self.task.classes
        path = save_segmenter(
            model, folder, task=self.task.name, labels=classes,
            preprocessing=self.whole.preprocessing, metrics={"val miou": found.miou},
        )  # fmt: skip
        counts = count_parameters(model)
        return {
            "metrics": metrics(found, classes) | {"train_loss": loss},
            "trainable": counts.trainable,
            "total": counts.total,
            "decoder": count_parameters(model.decoder).total,
            "stored_bytes": path.stat().st_size,
            "seconds": seconds,
            "cpu_seconds": time.process_time() - began,
        }

    def test(self, protocol: str, factor: float, seed: int, folder: Path) -> dict[str, Any]:
        """Measure a saved segmenter on test, at one scale and at several."""
        kept, began = self.run(protocol, factor, seed, "val"), time.process_time()
        if "failure" in kept:
            raise DivergedError(kept["failure"])
        model = load_segmenter(self.backbone(), folder).to(DEVICE)
        saved = model.backbone.prompts.info["metrics"]["val miou"]
        if saved != kept["metrics"]["miou"]:
            raise SystemExit(
                f"{folder} has a val mIoU of {saved}, the record of its run in {self.file} has "
                f"{kept['metrics']['miou']}: they are not of one training. Delete both."
            )
        one = metrics(self.measure(model, "test", (1.0,)), self.task.classes)
        several = self.measure(model, "test", self.args.scales, flip=self.args.flip)
        names = ("trainable", "total", "decoder", "stored_bytes", "seconds")
        return {name: kept[name] for name in names} | {
            "metrics": one | {"miou_multi": several.miou},
            "cpu_seconds": time.process_time() - began,
        }

    def measure(
        self, model: nn.Module, split: str, scales: Sequence[float], flip: bool = False
    ) -> Scores:
        """Score a segmenter on images of their own size."""
        batches = segmentation_loader(self.task.splits[split], self.whole, batch_size=1)
        options: dict[str, Any] = {"window": self.window(), "overlap": self.args.overlap}
        scored = (
            (predict(model, pixels.to(DEVICE), scales=scales, flip=flip, **options).cpu(), masks)
            for pixels, masks in batches
        )
        pairs = ((scores.argmax(1), masks) for scores, masks in scored)
        found = score(pairs, len(self.task.classes))
        if math.isnan(found.miou):
            raise SystemExit(f"{self.task.name}: all pixels of {split} are ignored; no mIoU.")
        return found

    def compare(self) -> list[dict[str, Any]]:
        """Choose a rate per protocol on val, and return the records of its runs on test."""
        found = []
        for protocol in self.args.protocols.split(","):
            tried = {
                factor: self.run(protocol, factor, 0, "val")["metrics"]["miou"]
                for factor in (sorted(self.args.factors) if len(self.args.factors) > 1 else ())
            }
            best = max(tried, key=lambda f: (tried[f], -f)) if tried else self.args.factors[0]
            found += [self.run(protocol, best, seed, "test") for seed in range(self.args.seeds)]
        return found


def metrics(scores: Scores, classes: Sequence[str]) -> dict[str, float | None]:
    """Return scores by name, an IoU for each class: None where it is absent."""
    each = {
        f"iou {name}": None if math.isnan(value) else value
        for name, value in zip(classes, scores.iou, strict=True)
    }
    return {"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy, **each}


def table(records: Sequence[dict[str, Any]], classes: Sequence[str]) -> str:
    """Lay out means over seeds, with the deviation from two seeds on, in percent.

    A class that is absent has "-". Runs that diverged are counted behind the protocol's name.
    """
    columns = ["miou", "miou_multi", *(f"iou {name}" for name in classes)]
    rows = []
    for protocol in dict.fromkeys(record["protocol"] for record in records):
        every = [record for record in records if record["protocol"] == protocol]
        mine = [record for record in every if "failure" not in record]
        name = protocol + mark(every)
        if not mine:
            rows.append([name, *("-" for _ in (*columns, "trained", "beside", "rate"))])
            continue
        cells = []
        for column in columns:
            known = [record["metrics"][column] for record in mine]
            values = 100 * np.array([value for value in known if value is not None])
            spread = f" +- {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}" if len(values) else "-")
        beside = mine[0]["trainable"] - mine[0]["decoder"]
        rate = f"{mine[0]['config']['recipe']['base_lr']:g}"
        rows.append([name, *cells, f"{mine[0]['trainable']:,}", f"{beside:,}", rate])
    header = ["protocol", "mIoU", "multi-scale", *columns[2:], "trained", "beside decoder", "rate"]
    return markdown_table(header, rows)


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers separated by commas."""
    return tuple(float(part) for part in text.split(","))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Segmentation by several protocols.")
    add = parser.add_argument
    add("--data", type=Path, help="folder in ADE20K's layout; default: drawn shapes")
    add("--model", help="timm's name of a plain ViT; default: the tiny one in assets")
    add("--weights", type=Path, help="safetensors of --model; default: downloaded by timm")
    add("--protocols", default=PROTOCOLS, help=f"default: {PROTOCOLS}")
    add("--size", type=int, help="edge of a window; default: the backbone's")
    add("--crops", type=numbers, default=(0.5, 2.0), help="short side before a crop, in sizes")
    add("--epochs", type=int, default=20)
    add("--batch", type=int, default=16)
    add("--length", type=int, default=10, help="prompts per block")
    add("--channels", type=int, default=32, help="of the decoder")
    add("--factors", type=numbers, default=FACTORS, help="multiples of the preset's rate")
    add("--seeds", type=int, default=1, help="runs per protocol at the best rate")
    add("--scales", type=numbers, default=(0.75, 1.0, 1.25), help="of multi-scale tests")
    add("--flip", action="store_true", help="mirror images in multi-scale tests")
    add("--overlap", type=float, default=1 / 3, help="share of neighbouring windows")
    add("--output", type=Path, default=Path("runs/segmentation"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what has no record yet, print the table, and return the records behind it."""
    args = parse_arguments(arguments)
    task = open_segmentation(args.data or draw_shapes(args.output / "shapes"))
    if "test" not in task.splits:
        raise SystemExit(f"{task.name} has no images/test and annotations/test.")
    print(task.describe())
    runs = Runs(args, task)
    print(f"{runs.augment.describe()}; {args.epochs} epochs, batch {args.batch}")
    records = runs.compare()
    print(table(records, task.classes))
    return records


if __name__ == "__main__":
    main()
