"""What visual prompts cost beside linear probing and full fine-tuning; prints ratios only.

FLOPs come from torch's `FlopCounterMode` and kept activations from `saved_tensors_hooks`: both are
exact and repeatable. Times are process CPU time (the sum over threads, deaf to other processes):
every round runs all variants, forwards and backwards through the list in turn, each is divided by
the reference of its own round, and the median over rounds is printed. Read them as +-10 %.

- forward: eval mode, no gradients, prompts' keys and values cached; over the bare backbone.
- step: forward and backward of the cross-entropy, no optimizer; over a linear-probing step, whose
  frozen backbone needs neither gradients nor stored activations.
- kept: bytes of distinct storages that autograd holds for backward, without parameters, buffers
  and the batch itself; over full fine-tuning.

Weights are random (nothing is downloaded); costs do not depend on their values. With the defaults,
ten ViT-B/16 are alive at once (about 5 GB), and a run takes minutes on one thread.

Usage: ``python examples/benchmark_cost.py``; add ``--targets`` to hold the deterministic ratios of
the kv form without dropout against the project's bounds (exit status 1 if one is exceeded).
"""

import argparse
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import timm
import torch
from torch import nn

from peft_vpt import PromptSpec, inject_prompts
from peft_vpt.experiments.cost import Batch, Pass, flops, forward, kept_bytes, step, times

MODEL, BATCH, CLASSES = "vit_base_patch16_224", 2, 100
COLUMNS = ("FLOPs forward/bare", "FLOPs step/linear", "kept/full", "time forward", "time step")
BOUNDS = {50: (1.011, 2.115, 0.66), 200: (1.042, 2.345, 0.76)}  # of the first three columns
DEFAULT_DROPOUT = PromptSpec(deep=True).resolve(depth=1).dropout
DROPOUTS = {"0": (0.0,), "default": (DEFAULT_DROPOUT,), "both": (0.0, DEFAULT_DROPOUT)}
Cost = tuple[float, float, float]


@dataclass(frozen=True)
class Variant:
    """A way to adapt the backbone.

    Args:
        kind: "linear", "full", or a kind of prompts: "kv", "token" (both deep) or "shallow".
        length: Prompts per entry.
        dropout: Rate of the per-sample dropout on prompts.
    """

    kind: str
    length: int = 0
    dropout: float = 0.0

    @property
    def cells(self) -> tuple[str, str, str]:
        """The first three cells of the variant's row."""
        named = {"linear": "bare / linear probing", "full": "full fine-tuning"}
        if self.kind in named:
            return named[self.kind], "", ""
        name = "VPT-shallow" if self.kind == "shallow" else f"VPT-deep, {self.kind} form"
        return name, str(self.length), f"{self.dropout:g}"

    @property
    def bounds(self) -> tuple[float, ...]:
        """Upper bounds of the first columns, empty where none are set."""
        bounded = self.kind == "kv" and self.dropout == 0
        return BOUNDS.get(self.length, ()) if bounded else ()

    def build(self, name: str) -> nn.Module:
        """Return a new model, the same weights for every variant, that trains what it should."""
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=CLASSES)
        if self.kind == "linear":
            model.requires_grad_(False)
            model.get_classifier().requires_grad_(True)
        elif self.kind != "full":
            deep = self.kind != "shallow"
            form = self.kind if deep else "auto"
            inject_prompts(model, self.length, deep=deep, form=form, dropout=self.dropout)
        return model


LINEAR, FULL = Variant("linear"), Variant("full")


def count(model: nn.Module, batch: Batch) -> Cost:
    """Return FLOPs of a forward, FLOPs of a step, and bytes kept."""
    model.eval()
    forward(model, batch)  # fills the cache of the prompts' keys and values
    forward_flops = flops(forward, model, batch)
    model.train()
    return forward_flops, flops(step, model, batch), kept_bytes(model, batch)


def time_ratios(
    run: Pass, models: dict[Variant, nn.Module], batch: Batch, rounds: int
) -> dict[Variant, float]:
    """Return the median over interleaved rounds of CPU time over that of linear probing."""
    names = {str(variant): variant for variant in models}
    seconds = times(run, {name: models[v] for name, v in names.items()}, batch, rounds)
    base = seconds[str(LINEAR)]
    return {
        v: statistics.median(a / b for a, b in zip(seconds[name], base, strict=True))
        for name, v in names.items()
    }


def measure(variants: list[Variant], args: argparse.Namespace) -> dict[Variant, tuple[float, ...]]:
    """Return the five ratios of every variant, in the order of `COLUMNS`."""
    models = {variant: variant.build(args.model) for variant in variants}
    size = models[LINEAR].pretrained_cfg["input_size"]
    batch = torch.randn(args.batch, *size), torch.randint(CLASSES, (args.batch,))
    counted = {variant: count(model, batch) for variant, model in models.items()}
    for model in models.values():
        model.eval()
    forwards = time_ratios(forward, models, batch, args.rounds)
    for model in models.values():
        model.train()
    steps = time_ratios(step, models, batch, args.rounds)
    base = (counted[LINEAR][0], counted[LINEAR][1], counted[FULL][2])
    return {
        v: (*(a / b for a, b in zip(counted[v], base, strict=True)), forwards[v], steps[v])
        for v in variants
    }


def row(variant: Variant, ratios: Iterable[float], targets: bool) -> list[str]:
    """Return a row of the table; with targets, a bound follows the ratio it is set for."""
    *exact, forward_time, step_time = ratios
    cells = [f"{ratio:.4f}" for ratio in exact]
    if targets:
        for i, bound in enumerate(variant.bounds):
            cells[i] += f" {'<=' if exact[i] <= bound else '>'} {bound}"
    return [*variant.cells, *cells, f"{forward_time:.2f}", f"{step_time:.2f}"]


def table(rows: list[list[str]]) -> str:
    """Lay rows out in Markdown with aligned columns."""
    rows = [["variant", "p", "dropout", *COLUMNS], *rows]
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="a timm vision transformer")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200], metavar="P")
    kinds = ("kv", "token", "shallow")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=["kv", "token"])
    parser.add_argument("--dropout", choices=list(DROPOUTS), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--targets", action="store_true", help="print bounds; 1 if one is exceeded")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.targets and (args.model, args.batch) != (MODEL, BATCH):
        parser.error(f"--targets are set for --model {MODEL} --batch {BATCH}")
    if args.targets and not any(variant.bounds for variant in chosen(args)):
        parser.error("--targets: no bound is set for these --kinds, --lengths and --dropout")
    return args


def chosen(args: argparse.Namespace) -> list[Variant]:
    """Return the two references and the variants asked for, each once."""
    adapted = product(args.kinds, args.lengths, DROPOUTS[args.dropout])
    return list(dict.fromkeys([LINEAR, FULL, *(Variant(*values) for values in adapted)]))


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    variants = chosen(args)
    ratios = measure(variants, args)
    print(
        f"{args.model}, batch {args.batch}, torch {torch.__version__}, timm {timm.__version__}, "
        f"threads {args.threads}, rounds {args.rounds} (median ratio of process CPU time)\n"
    )
    print(table([row(variant, ratios[variant], args.targets) for variant in variants]))
    missed = [v for v in variants if any(a > b for a, b in zip(ratios[v], v.bounds, strict=False))]
    return int(args.targets and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
