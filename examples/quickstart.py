"""Adapt one ViT in four ways, then serve two tasks from one backbone; `--help` shows options."""

import argparse
import copy
import json
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open, save
from sklearn.datasets import load_digits

import peft_vpt as vpt

RUNS = [  # method, task, prompts, peak learning rates of head and rest at a width of 96
    ("linear probing", "class", None, 0.03, 0.0),
    ("VPT-shallow", "class", {"length": 20, "deep": False}, 0.01, 0.1),
    ("VPT-deep", "class", {"length": 20, "deep": True, "dropout": 0.0}, 0.003, 0.1),
    ("full fine-tuning", "class", None, 0.0005, 0.0005),
    ("VPT-deep", "parity", {"length": 20, "deep": True, "dropout": 0.0}, 0.003, 0.1),
]
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="timm/<name>, pretrained; default: the tiny ViT in assets")
parser.add_argument("--data", type=Path, help="holds {train,test}/<class>/; default: digits")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
if args.model:
    vit = timm.create_model(args.model.removeprefix("timm/"), pretrained=True)
else:
    asset = Path(__file__).parent / "assets" / "vit_tiny_glyphs.safetensors"
    with safe_open(asset, "pt") as file:
        vit = timm.models.VisionTransformer(**json.loads(file.metadata()["model_args"]))
    vit.load_state_dict(load_file(asset))
    look = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    vit.pretrained_cfg = {"input_size": (3, 32, 32), **look}
if args.data:
    train, test = (timm.data.ImageDataset(args.data / split) for split in ("train", "test"))
else:
    pixels = (load_digits().images / 16 * 255).round().astype("uint8")
    digits = list(zip(map(Image.fromarray, pixels), load_digits().target, strict=True))
    train, test = digits[: len(digits) // 2], digits[len(digits) // 2 :]
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
x, x_test = (torch.stack([transform(i.convert("RGB")) for i, _ in s]) for s in (train, test))
y, y_test = (torch.tensor([label for _, label in split]) for split in (train, test))
predict = torch.no_grad()(lambda model: torch.cat([model.eval()(b) for b in x_test.split(100)]))
adapters = {}
print("method            task    accuracy  trainable       file  time/step")
for method, task, prompts, *rates in RUNS:
    torch.manual_seed(args.seed)
    model, classes = copy.deepcopy(vit), 2 if task == "parity" else int(y.max()) + 1
    if prompts:
        vpt.inject_prompts(model, num_classes=classes, **prompts)
    else:
        model.requires_grad_(method == "full fine-tuning").reset_classifier(classes)
    rest = [p for n, p in vpt.trainable_parameters(model).items() if not n.startswith("head.")]
    groups = [{"params": model.head.parameters()}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [rate * 96 / vit.embed_dim for rate in rates]  # wider models take smaller steps
    batches = [b for _ in range(args.epochs) for b in torch.randperm(len(y)).split(16)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, len(batches), pct_start=0.1)
    start = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[batch]), y[batch] % classes).backward()
        optimizer.step()
        schedule.step()
    ms, logits = 1000 * (time.perf_counter() - start) / len(batches), predict(model)
    score = (logits.argmax(1) == y_test % classes).float().mean()
    count, size = vpt.count_parameters(model), len(save(vpt.trainable_parameters(model)))
    if prompts:
        path = vpt.save_task_adapter(model, f"runs/quickstart/{method} {task}", task=task)
        adapters[path], size = logits, path.stat().st_size
    print(f"{method:18}{task:8}{score:8.1%}{count.trainable:11,}{size / 1e3:8.1f} kB{ms:8.1f} ms")
for path, logits in adapters.items():
    vpt.load_task_adapter(vit, path)
    print(f"{path.parent.name}: loaded, equal to the bit: {torch.equal(predict(vit), logits)}")
vpt.remove_prompts(vit)
