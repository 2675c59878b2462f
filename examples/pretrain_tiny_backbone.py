"""Pre-train the tiny ViT that the examples adapt, on images drawn by this very script.

The task is to name the glyph or the simple shape in a 32 x 32 RGB picture. The glyphs come from
the fonts inside the matplotlib package and the shapes from a few lines of geometry, so nothing is
downloaded. Every picture has a random position, size, rotation, shear and stroke width; colours,
contrast, blur, noise and a pass through a lower resolution are drawn anew for each batch, mildly
at first and at full strength from two fifths of the training on.

The digits 0 to 9 are left out of the classes, and no other class contains one, so recognising
digits is a new task for the backbone. It is a near one, though: letters such as O, I, Z, S and B
look much like digits, and the gap to a backbone trained on photographs should not be read off it.

Pixels are normalised with mean 0.5 and standard deviation 0.5 per channel. The weights are stored
in half precision, without the classification head, and ``MODEL_ARGS`` is stored beside them as
JSON under the metadata key ``model_args``.

Usage: ``python examples/pretrain_tiny_backbone.py --out vit_tiny_glyphs.safetensors``. A run is
repeatable given the seed, the number of threads, the machine and the library versions.
"""

import argparse
import json
import math
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

MODEL_ARGS = {
    "img_size": 32,
    "patch_size": 4,
    "in_chans": 3,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": 0,
}
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijmnqrty"  # lower case only where the form differs
OTHER = "ΓΛΞΠΣΦΨΩαβγδεζηθλμξπσω" + "!?#$%&@+=<>()[]{}/\\*^~§¶€£¥"
TEXT_FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")  # name prefixes; complete character sets
TEX_FONTS = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10")  # used for letters only
SHAPES = ("triangle", "square", "pentagon", "hexagon", "star5", "star8", "ring", "disc", "cross")
SHAPES += ("arrow", "half_disc", "two_rings", "grid", "zigzag")
CLASSES = (*LATIN, *OTHER, *SHAPES)
CANVAS = 96  # side of the drawing area, reduced to 32 pixels afterwards


def load_fonts() -> dict[str, list[ImageFont.FreeTypeFont]]:
    """Return, for each character class, the bundled fonts that can draw it."""
    fonts: dict[str, list[ImageFont.FreeTypeFont]] = {char: [] for char in LATIN + OTHER}
    for path in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        is_text = path.stem.startswith(TEXT_FONTS) and "Display" not in path.stem
        if not is_text and path.stem not in TEX_FONTS:
            continue
        known = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), 56)
        for char in LATIN + OTHER if is_text else LATIN:
            if ord(char) in known:
                fonts[char].append(font)
    return fonts


def draw_shape(draw: ImageDraw.ImageDraw, name: str, width: int, filled: bool) -> None:
    """Draw one of ``SHAPES`` in the middle of the canvas, as an outline or filled."""
    c, r = CANVAS / 2, 28.0

    def around(n: int, inner: float = 1.0) -> list[tuple[float, float]]:
        angles = [2 * math.pi * i / n - math.pi / 2 for i in range(n)]
        radii = [r if i % 2 == 0 else r * inner for i in range(n)]
        return [(q * math.cos(a), q * math.sin(a)) for a, q in zip(angles, radii, strict=True)]

    polygons = {
        "triangle": around(3),
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "pentagon": around(5),
        "hexagon": around(6),
        "star5": around(10, 0.45),
        "star8": around(16, 0.6),
        "arrow": [(-r, -8), (0, -8), (0, -r), (r, 0), (0, r), (0, 8), (-r, 8)],
    }
    fill = 255 if filled else None
    if name in polygons:
        points = [(c + x, c + y) for x, y in polygons[name]]
        draw.polygon(points, fill=fill)
        draw.line([*points, *points[:2]], fill=255, width=width, joint="curve")
    elif name in ("ring", "disc"):
        box = (c - r, c - r, c + r, c + r)
        draw.ellipse(box, fill=255 if name == "disc" else None, outline=255, width=width)
    elif name == "half_disc":
        draw.chord((c - r, c - r, c + r, c + r), 0, 180, fill=fill, outline=255, width=width)
    elif name == "two_rings":
        draw.ellipse((c - r, c - r, c + r, c + r), outline=255, width=width)
        half = (c - r / 2, c - r / 2, c + r / 2, c + r / 2)
        draw.ellipse(half, fill=fill, outline=255, width=width)
    elif name == "cross":
        draw.line((c - r, c - r, c + r, c + r), fill=255, width=2 * width)
        draw.line((c - r, c + r, c + r, c - r), fill=255, width=2 * width)
    elif name == "grid":
        for offset in (-r, 0, r):
            draw.line((c - r, c + offset, c + r, c + offset), fill=255, width=width)
            draw.line((c + offset, c - r, c + offset, c + r), fill=255, width=width)
    elif name == "zigzag":
        xs = np.linspace(c - r, c + r, 6)
        points = [(float(x), c + (r if i % 2 else -r) / 2) for i, x in enumerate(xs)]
        draw.line(points, fill=255, width=width, joint="curve")


def render(
    label: int, fonts: dict[str, list[ImageFont.FreeTypeFont]], rng: np.random.Generator
) -> np.ndarray:
    """Return one 32 x 32 mask (0 background, 255 ink) of class ``label`` in a random pose."""
    name = CLASSES[label]
    image = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(image)
    if name in fonts:
        font = fonts[name][rng.integers(len(fonts[name]))]
        stroke = int(rng.integers(0, 4))
        draw.text(
            (CANVAS / 2, CANVAS / 2), name, fill=255, font=font, anchor="mm", stroke_width=stroke
        )
    else:
        draw_shape(draw, name, width=int(rng.integers(3, 9)), filled=bool(rng.random() < 0.5))
    left, top, right, bottom = image.getbbox() or (0, 0, CANVAS, CANVAS)
    # The affine map goes from an output pixel to the place in the drawing that it shows.
    side = max(right - left, bottom - top)
    zoom = side / (CANVAS * rng.uniform(0.5, 1.0))
    stretch, angle = math.exp(rng.uniform(-0.3, 0.3)), math.radians(rng.uniform(-18, 18))
    shear = rng.uniform(-0.3, 0.3)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = zoom * rotation @ np.array([[stretch, shear], [0.0, 1.0]])
    shift = rng.uniform(-0.08, 0.08, size=2) * CANVAS
    offset = np.array([left + right, top + bottom]) / 2 - matrix @ (CANVAS / 2 + shift)
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    posed = image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(posed.resize((32, 32), Image.Resampling.BOX))


def appearance(
    masks: torch.Tensor, generator: torch.Generator, strength: float = 1.0
) -> torch.Tensor:
    """Turn uint8 masks (B, 32, 32) into normalised RGB images with random looks.

    At ``strength`` 0 they are sharp and white on black; at 1 the variation is at its full width.
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    ink = masks[:, None].float() / 255
    parts = []
    for part in ink.chunk(4):  # each quarter of the batch gets a resolution of its own
        size = (8, 8, 10, 12, 16, 32, 32, 32)[int(uniform(1) * 8)]
        mode = ("bilinear", "bicubic", "nearest")[int(uniform(1) * 3)]
        if uniform(1) >= strength:
            pass
        elif size < 32:
            part = F.interpolate(F.interpolate(part, size=size, mode="area"), size=32, mode=mode)
        elif uniform(1) < 0.3:
            part = F.avg_pool2d(part, 3, stride=1, padding=1)
        parts.append(part)
    n = len(ink)
    ink = torch.cat(parts).clamp(0, 1) ** uniform(n, 1, 1, 1, low=0.6, high=1.6)
    sign = torch.where(uniform(n, 1, 1, 1) < 0.5 * strength, -1.0, 1.0)
    # Half of the images stay grey, the others get tints for paper and ink.
    tint = torch.where(uniform(n, 1, 1, 1) < 0.5, 0.0, 0.25 * strength)
    contrast = sign * uniform(n, 1, 1, 1, low=1.0 - 0.6 * strength, high=1.0)
    paper = 0.5 - contrast / 2 + tint * uniform(n, 3, 1, 1, low=-1.0)
    colour = 0.5 + contrast / 2 + tint * uniform(n, 3, 1, 1, low=-1.0)
    noise = torch.randn(n, 3, 32, 32, generator=generator)
    noise *= uniform(n, 1, 1, 1, high=0.1 * strength)
    return ((paper + (colour - paper) * ink + noise).clamp(0, 1) - 0.5) / 0.5


def initialise(model: VisionTransformer) -> None:
    """Start from Glorot weights and sinusoidal positions, which shortens training a lot here."""
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    torch.nn.init.xavier_uniform_(model.patch_embed.proj.weight.data.flatten(1))
    side = MODEL_ARGS["img_size"] // MODEL_ARGS["patch_size"]
    frequencies = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    phases = torch.arange(side)[:, None] * frequencies * (2 * math.pi / side)
    waves = torch.cat([phases.sin(), phases.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    grid = torch.cat([rows, columns], dim=1)
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.5 * grid.repeat(1, MODEL_ARGS["embed_dim"] // grid.shape[1])


def main() -> None:
    """Draw the pictures, train the classifier, report its accuracy and save the backbone."""
    parser = argparse.ArgumentParser(description="Pre-train a tiny ViT on glyphs and shapes.")
    parser.add_argument("--out", type=Path, default=Path("vit_tiny_glyphs.safetensors"))
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps of 64 images")
    parser.add_argument("--pool", type=int, default=50_000, help="number of training pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    start, held_out, fonts = time.perf_counter(), 4000, load_fonts()
    labels = torch.from_numpy(rng.integers(len(CLASSES), size=args.pool + held_out))
    pool = torch.from_numpy(np.stack([render(int(label), fonts, rng) for label in labels]))
    print(f"{len(pool)} pictures of {len(CLASSES)} classes, {time.perf_counter() - start:.0f} s")

    model = VisionTransformer(**(MODEL_ARGS | {"num_classes": len(CLASSES)}))
    initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, args.steps, pct_start=0.1)
    for step in range(args.steps):
        batch = torch.randint(args.pool, (64,), generator=generator)
        strength = min(1.0, step / (0.4 * args.steps))  # from easy pictures to the full variety
        logits = model(appearance(pool[batch], generator, strength))
        loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            elapsed = time.perf_counter() - start
            print(f"step {step + 1}: loss {loss.item():.3f}, {elapsed:.0f} s", flush=True)

    model.eval()
    with torch.inference_mode():
        hits = [
            (model(appearance(pool[chunk], generator)).argmax(1) == labels[chunk]).float()
            for chunk in torch.arange(args.pool, args.pool + held_out).split(200)
        ]
    print(f"accuracy on {held_out} held-out pictures: {100 * torch.cat(hits).mean():.1f} %")
    state = {k: v.half() for k, v in model.state_dict().items() if not k.startswith("head.")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, args.out, metadata={"model_args": json.dumps(MODEL_ARGS)})
    print(f"wrote {args.out.name}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
