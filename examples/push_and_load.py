"""Push a task adapter to the Hugging Face Hub and load it again by its name.

Offline, without ``--repo``, it saves the adapter and prints the card that a push would write.
With ``--repo owner/name`` it pushes, then does what another person would do: build the backbone
that the adapter names, load the adapter, classify an image. ``HF_ENDPOINT`` names another Hub.

Usage: ``python examples/push_and_load.py [--repo owner/name] [--model timm/<name>] [--private]``.
"""

import argparse
import tempfile

import timm
import torch
from PIL import Image

from peft_vpt import inject_prompts, push_task_adapter, save_task_adapter
from peft_vpt.adapter.file import read_adapter
from peft_vpt.hub import build_backbone, load_backbone_with_adapter
from peft_vpt.hub.card import write_card

LABELS = ["cat", "dog"]


def main() -> None:
    """Push and load, or print the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", help="owner/name; default: nothing is pushed")
    parser.add_argument("--model", default="timm/test_vit.r160_in1k", help="Hub id of a timm model")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args()
    facts = {"task": "cats and dogs", "labels": LABELS, "metrics": {"accuracy": 0.5}}

    if args.repo is None:
        model = timm.create_model(args.model.removeprefix("timm/"), pretrained=False)
        inject_prompts(model, length=10, num_classes=len(LABELS))
        with tempfile.TemporaryDirectory() as folder:
            print(write_card(read_adapter(save_task_adapter(model, folder, **facts)), "user/pets"))
        return

    model = build_backbone("timm", args.model)
    inject_prompts(model, length=10, num_classes=len(LABELS))  # then train, with any loop
    print("pushed:", push_task_adapter(model, args.repo, private=args.private, **facts))

    other, preprocess = load_backbone_with_adapter(args.repo)
    image = Image.new("RGB", (300, 200))
    with torch.inference_mode():
        scores = other(preprocess(image).unsqueeze(0)).softmax(-1)[0]
    for label, score in zip(other.prompts.info["labels"], scores.tolist(), strict=True):
        print(f"{label}: {score:.3f}")


if __name__ == "__main__":
    main()
