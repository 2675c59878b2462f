"""Damaged adapter files: what can be wrong with one, generated from small sound ones.

Everything is seeded; a case is known by its label.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from peft_vpt import PromptSpec
from peft_vpt.adapter.file import canonical, checksum, read_adapter, write_adapter

Tensors = dict[str, torch.Tensor]
DEEP = 100_000
HUGE = (2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
DTYPES = ("BOOL", "U8", "I8", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64")
DTYPES += ("F8_E4M3", "F8_E5M2", "F4", "C64", "U64", "f32", "", "F128", "object")
NAMES = [
    "prompts.../../x",
    "../x",
    "/tmp/x",
    "prompts./x",
    "prompts.0\0",
    "prompts.0\n",
    "prompts.",
]
NAMES += ["prompts.\u0663", "prompts.\u202e0", "Prompts.0", "", ".", "prompts.-1", "prompts.9"]
NAMES += ["head.x", "head.module.../x", "head.module.", "C:\\x", "prompts.0/../1", "x" * 5000]
NAMES += ["__metadata__", "prompts.pixel.x", "prompts.shared.0.x", "delta.0.q", "prompts. 0"]
NAMES += ["delta.x.q.bias", "delta.cls.x", "delta.0.adapter.left.bias", "delta.0.path", "delta"]
VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 3, 1.5, -0.5, 1e300, 10**18, 10**30, "")
VALUES += ("x", "../../x", "/etc/passwd", "\0", "\ud800", "x" * 20_000, [], [None], [[]], [-1], [1])
VALUES += ([0.5], ["a"], [10**9, 10**9], {}, {"a": 1}, [0] * 5000, "owner/../..", [1, 0], [True])
NULLABLE = {"head", "preprocessing", "task", "metrics", "hub_id", "revision", "fingerprint", "crop"}
NULLABLE |= {"labels"}
OPTIONAL = {"crop", "bias", "class", "quantized", "rest"}
OPTIONAL |= {"size", "interpolation"}
# What a file may leave out, and what is read then.
DEFAULTS: dict[str, Any] = dict.fromkeys(("spec", "head", "preprocessing", "task", "metrics"))
DEFAULTS |= {"library_version": "unknown"}
INSIDE = {
    "backbone": dict.fromkeys(("hub_id", "revision", "fingerprint")),
    "head": {"labels": None},
}
OPTIONAL |= {*DEFAULTS, *INSIDE["backbone"], *INSIDE["head"], "protocol", "reduction"}
IMAGES = {"size": [8, 8], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
# Each field for itself is sound, or nearly so.
CONTRADICTIONS: list[dict[str, Any]] = [
    {"backbone.dims": []},
    {"backbone.depth": 0, "backbone.fingerprint": None},
    {"spec.length": 2**20 + 1, "spec.sharing": "intra"},
    {"spec.length": 2**20},
    {"spec.dropout": None},
    {"spec.location": "pad", "spec.deep": True},
    {"spec.location": "add", "spec.pooling": "prompt"},
    {"spec.form": "kv", "spec.location": "add"},
    {"preprocessing": IMAGES | {"mean": [0.5, 0.5]}},
    {"preprocessing": IMAGES | {"std": [0.0]}},
    {"preprocessing": IMAGES | {"size": [8]}},
    {"preprocessing": IMAGES | {"size": [10**5, 10**5]}},
    {"preprocessing": IMAGES | {"size": [8, 2**12 + 1]}},
    {"preprocessing": IMAGES | {"size": [2**12, 8], "crop": 0.5}},
    {"preprocessing": IMAGES | {"crop": 0.05}},
    {"preprocessing": IMAGES | {"crop": 11}},
    {"preprocessing": IMAGES | {"interpolation": "cubic"}},
    {"metrics": {"a": 2**63}},
    *(
        {"backbone.revision": name}
        for name in ("..", "../x", "a/../b", "/x", "a//b", "a\n", "\u00e9")
    ),
    *({"backbone.hub_id": name} for name in ("/etc/x", "../x/y", "x/..", "~/x", "x\\y", "x/\0")),
]


@dataclass(frozen=True)
class Sample:
    """A sound file."""

    data: bytes
    tensors: Tensors
    metadata: dict[str, Any]

    @property
    def header(self) -> bytes:
        return self.data[8 : 8 + struct.unpack("<Q", self.data[:8])[0]]

    @property
    def body(self) -> bytes:
        return self.data[8 + len(self.header) :]


@dataclass(frozen=True)
class Case:
    """A file made from a sample; `metadata` is what it holds if it may be read at all.

    With `told`, reading must fail: its content is another one, or is none. With `by_layout` it may
    be read, since no model is at hand, and loading it must fail.
    """

    label: str
    data: bytes
    sample: Sample
    told: bool = False
    metadata: dict[str, Any] | None = None
    by_layout: bool = False


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """Return metadata of a file with what it may leave out."""
    full = DEFAULTS | values
    full |= {name: some | full[name] for name, some in INSIDE.items() if full[name] is not None}
    if full["spec"] is not None:
        full["spec"] = (
            PromptSpec.from_dict(full["spec"]).resolve(full["backbone"]["depth"]).to_dict()
        )
    if full.get("protocol") == {"name": "adapter"}:
        full["protocol"] = {"name": "adapter", "reduction": 8}
    return {name: value for name, value in full.items() if (name, value) != ("protocol", None)}


def sample(path: Path) -> Sample:
    adapter = read_adapter(path)
    return Sample(path.read_bytes(), adapter.tensors, adapter.metadata)


def samples(folder: Path) -> list[Sample]:
    """Return small adapters: deep in float32, shared in bf16, a border in float16, protocols."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    head = {"classes": 3, "labels": ["a", "b", "ü"], "in_features": 4, "reads": "cls"}
    bare, two, pad = (
        head | {"bias": False},
        PromptSpec(length=2),
        PromptSpec(length=1, location="pad"),
    )
    low, half = {"dtype": torch.bfloat16}, {"dtype": torch.float16}
    deep = {f"prompts.{i}": draw(2, 4) for i in range(2)}
    shared = {"prompts.shared.0": draw(2, 2, **low), "prompts.project.4.weight": draw(4, 2, **low)}
    biases = {f"delta.{i}.{role}.bias": draw(4) for i in range(2) for role in ("q", "fc2")}
    narrow = {f"delta.{i}.adapter.down.weight": draw(2, 4, **half) for i in range(2)}
    narrow |= {f"delta.{i}.adapter.up.weight": draw(4, 2, **half) for i in range(2)}
    border = {"prompts.pixel.tb": draw(3, 2, 6, **half), "prompts.pixel.lr": draw(3, 4, 2, **half)}
    content: list[tuple[Tensors, dict[str, Any]]] = [
        (deep | {"head.weight": draw(3, 4), "head.bias": draw(3)}, metadata(two, head=head)),
        (
            shared | {"prompts.project.4.bias": draw(4, **low)},
            metadata(PromptSpec(length=2, sharing="inter", project=2), fingerprint=None),
        ),
        (
            border | {"head.weight": draw(3, 4).double()},
            metadata(pad, head=bare | {"labels": None}, preprocessing=None),
        ),
        (
            deep | biases | {"delta.norm.bias": draw(4), "head.weight": draw(3, 4)},
            metadata(two, head=bare, protocol={"name": "vpt+bias"}),
        ),
        (narrow, metadata(None, protocol={"name": "adapter", "reduction": 2})),
    ]
    paths = (folder / f"{i}.safetensors" for i in range(len(content)))
    return [sample(write_adapter(path, *parts)) for path, parts in zip(paths, content, strict=True)]


def metadata(spec: PromptSpec | None, **changes: Any) -> dict[str, Any]:
    """Return metadata of an adapter for a backbone of two blocks of width 4."""
    table = {"dtype": "float32", "blocks": [[0.5] * 9] * 2, "norm": [0.25] * 3}
    backbone = {
        "library": "timm",
        "architecture": "tiny",
        "hub_id": "timm/tiny",
        "revision": None,
        "dims": [4],
        "depth": 2,
        "fingerprint": changes.pop("fingerprint", table),
    }
    return {
        "spec": spec and spec.resolve(2).to_dict(),
        "backbone": backbone,
        "head": None,
        "preprocessing": IMAGES | {"crop": 0.9},
        "task": "pets",
        "metrics": {"accuracy": 0.5},
        "library_version": "0.1.0",
    } | changes


def packed(header: str | bytes | dict[str, Any], body: bytes) -> bytes:
    """Return a file with this header."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + body


def signed(tensors: Tensors, values: Any) -> bytes:
    """Return a file with a checksum that fits, without any check."""
    values = values | {"checksum": checksum(tensors, values)}
    return save(tensors, {"peft_vpt": canonical(values)})


def walk(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field below a JSON value."""
    for key in value if isinstance(value, dict) else range(min(len(value), 2)):
        yield (*at, key)
        if isinstance(value[key], dict | list):
            yield from walk(value[key], (*at, key))


def changed(values: dict[str, Any], path: tuple[Any, ...], *new: Any) -> dict[str, Any]:
    """Return a copy with one field set, or without it."""
    result = copy.deepcopy(values)
    at = result
    for key in path[:-1]:
        at = at[key]
    if new:
        at[path[-1]] = new[0]
    else:
        del at[path[-1]]
    return result


def cases(found: list[Sample], seed: int = 0) -> Iterator[Case]:
    """Yield every damaged file."""
    rng = random.Random(seed)
    for index, one in enumerate(found):
        for kind in (flips, cuts, splices, headers, tables, texts, fields, numbers, strangers):
            for case in kind(one, rng):
                yield replace(case, label=f"{index}/{kind.__name__}/{case.label}")
    yield from swaps(found, rng)


def flips(one: Sample, rng: random.Random, count: int = 500) -> Iterator[Case]:
    """One bit in the length, the header, the data."""
    data, start = one.data, 8 + len(one.header)
    bits = list(range(64)) + [rng.randrange(64, 8 * start) for _ in range(count)]
    bits += [rng.randrange(8 * start, 8 * len(data)) for _ in range(count // 2)]
    for bit in bits:
        edited = bytearray(data)
        edited[bit // 8] ^= 1 << bit % 8
        yield Case(f"bit {bit}", bytes(edited), one, told=bit >= 8 * start)


def cuts(one: Sample, rng: random.Random) -> Iterator[Case]:
    """Truncation at every kind of place, and bytes too many."""
    start, size = 8 + len(one.header), len(one.data)
    places = {*range(16), *range(start - 8, start + 8), *range(size - 8, size)}
    for place in sorted(places | {rng.randrange(size) for _ in range(100)}):
        yield Case(f"cut at {place}", one.data[:place], one, told=True)
    for more in (b"\0", b" " * 8, one.body, one.data):
        yield Case(f"{len(more)} more", one.data + more, one, told=True)


def splices(one: Sample, rng: random.Random, count: int = 250) -> Iterator[Case]:
    """Ranges deleted, doubled, zeroed, scrambled, moved."""
    for number in range(count):
        a, b = sorted(rng.sample(range(len(one.data)), 2))
        b = min(b, a + rng.choice((2, 8, 64, 1000)))
        part, kind = one.data[a:b], number % 5
        new = (b"", part * 2, bytes(b - a), rng.randbytes(b - a), part[::-1])[kind]
        yield Case(f"{number}: kind {kind} at {a}:{b}", one.data[:a] + new + one.data[b:], one)


def headers(one: Sample, rng: random.Random) -> Iterator[Case]:
    """Offsets, dtypes, shapes and names in the header that do not belong to the data."""
    header = json.loads(one.header)
    names = sorted(set(header) - {"__metadata__"})
    for name in names:
        entry = header[name]
        a, b = entry["data_offsets"]
        other = header[names[names.index(name) - 1]]["data_offsets"]
        wrong: list[Any] = [[b, a], [-1, b], [a - 1, b], [a, b + 1], [a + 1, b], [a, a], [b, b]]
        wrong += [other, [a], [a, b, b], [], None, "x", [str(a), b], [a + 0.5, b], {}, [None, None]]
        wrong += [[a, n] for n in HUGE] + [[n, n + b - a] for n in HUGE] + [[-n, b] for n in HUGE]
        edits: list[dict[str, Any]] = [{"data_offsets": w} for w in wrong]
        edits += [{"dtype": d} for d in DTYPES if d != entry["dtype"]]
        shapes: list[Any] = [entry["shape"][::-1], [], [0], [-1], [1.5], None, "x", [1] * 300]
        shapes += [[n] for n in HUGE] + [[n, 0] for n in HUGE] + [[0, n] for n in HUGE]
        shapes += [[n, n] for n in HUGE] + [[*entry["shape"], 0], [*entry["shape"], 1]]
        edits += [{"shape": s} for s in shapes if s != entry["shape"]]
        # A small file that says it holds 16 GiB, and one that says it holds nothing.
        edits += [{"shape": [2**32], "data_offsets": [a, a + 2**34]}]
        edits += [{"shape": [n, 0], "data_offsets": [a, a]} for n in HUGE]
        for edit in edits:
            data = packed(header | {name: entry | edit}, one.body)
            yield Case(f"{name}: {str(edit)[:80]}", data, one, told=True)
        for key in entry:
            rest = {k: v for k, v in entry.items() if k != key}
            yield Case(f"{name} without {key}", packed(header | {name: rest}, one.body), one, True)
        size = {"dtype": "F4", "shape": [(b - a) * 2]}
        yield Case(f"{name} as F4", packed(header | {name: entry | size}, one.body), one, told=True)
        yield Case(f"{name} null", packed(header | {name: None}, one.body), one, told=True)
        more = header | {name: entry | {"more": 1}}
        yield Case(f"{name} with more", packed(more, one.body), one)
        rest = {k: v for k, v in header.items() if k != name}
        yield Case(f"no {name}", packed(rest, one.body), one, told=True)
        for new in NAMES:
            yield Case(f"{name} as {new[:20]!r}", packed(rest | {new: entry}, one.body), one, True)


def tables(one: Sample, rng: random.Random) -> Iterator[Case]:
    """Headers that are no table of tensors, or one with other metadata."""
    header, text = json.loads(one.header), one.header.decode()
    ours = header["__metadata__"]
    bad: list[Any] = [None, [], "x", {}, {"peft_vpt": None}, {"peft_vpt": 1}, {"peft_vpt": {}}]
    bad += [ours | {"format": "pt"}, {"format": "pt"}, {"peft-vpt": ours["peft_vpt"]}, [ours]]
    for values in bad:
        data = packed(header | {"__metadata__": values}, one.body)
        yield Case(f"metadata {str(values)[:40]}", data, one, told=True)
    raw: list[str | bytes] = ["", "null", "[]", "1", "{", "{}", "[" * DEEP, '{"a":' * DEEP]
    raw += [b"\xff" + one.header, b"\xef\xbb\xbf" + one.header, text + "x", text.replace('"', "'")]
    raw += ['{"__metadata__":{"peft_vpt":' + "[" * DEEP + "]" * DEEP + "}}", "\\ud800", b"\0" * 64]
    for number, new in enumerate(raw):
        yield Case(f"raw {number}", packed(new, one.body), one, told=True)
    doubled = text.rstrip()[:-1] + "," + text.lstrip()[1:]
    first = f'{{"__metadata__":{{"peft_vpt":"x"}},{text[1:]}'
    for number, new in enumerate((doubled, first, text + " " * 100, " " + text)):
        yield Case(f"odd {number}", packed(new, one.body), one)
    for length in (*HUGE[:6], 10**8, 10**8 + 1, len(one.data), len(one.data) - 8):
        data = struct.pack("<Q", length) + one.data[8:]
        yield Case(f"header of {length}", data, one, told=True)


def texts(one: Sample, rng: random.Random) -> Iterator[Case]:
    """Metadata that is no canonical JSON."""
    text = canonical(one.metadata)
    bad = ["", " ", "null", "[]", '"x"', "1", "{}", "{"]
    bad += [text[:-1], text + " ", " " + text, text * 2]
    bad += [brackets * DEEP for brackets in ("[", "{", '{"a":', '[{"a":')]
    bad += ["[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "9" * 10**5, "NaN", "-"]
    bad += [f'{{"metrics":{"[" * n + "]" * n}}}' for n in (40, 300, 900, 3000)]
    bad += [text.replace("0.5", new) for new in ("NaN", "1e999", "0.50", "-Infinity", "5e-1", ".5")]
    bad += [text.replace('"task":"pets"', '"task":"pets","task":"pets"'), text.replace(":", ": ")]
    bad += [text.replace("\\u00fc", "ü") + " ", text.replace('"', "'"), text.replace("{", "{,", 1)]
    bad += ["\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), text.upper(), text + "\n"]
    for number, new in enumerate(bad):
        data = save(one.tensors, {"peft_vpt": new})
        yield Case(f"text {number}: {new[:30]!r}", data, one, told=new != text)


def fields(one: Sample, rng: random.Random) -> Iterator[Case]:
    """Every metadata field removed, of another type or size, and unknown fields; signed again."""
    values = one.metadata
    for path in walk(values):
        if path[0] == "checksum":
            continue
        old = values
        for key in path:
            old = old[key]
        free, last = path[0] == "metrics" and len(path) > 1, path[-1]
        for new in VALUES:
            if type(new) is type(old) and new == old:
                continue
            kinds = {type(old), type(new)}
            other = len(kinds) == 2 and not (kinds == {int, float} or type(None) in kinds)
            null = new is None and last not in NULLABLE
            after = changed(values, path, new)
            data = signed(one.tensors, after)
            told = (other or null) and not free
            # Without it, the shapes are those of another model, if of any.
            shapes = path == ("spec", "project")
            label = f"{path} = {repr(new)[:30]}"
            yield Case(label, data, one, told, metadata=after, by_layout=shapes and new is None)
        if isinstance(last, str):
            after = changed(values, path)
            # A missing option of prompts takes its default.
            option = path[0] == "spec" and len(path) > 1
            told = not free and not option and last not in OPTIONAL
            yield Case(f"no {path}", signed(one.tensors, after), one, told, metadata=after)
        if isinstance(old, dict):
            after = changed(values, (*path, "unknown"), 1)
            told = path[0] in ("spec", "protocol", "head")
            yield Case(f"more in {path}", signed(one.tensors, after), one, told, metadata=after)
    for key in ("unknown", "", "protocol", "FORMAT_VERSION", "\0"):
        after = values | {key: None}
        yield Case(f"with {key!r}", signed(one.tensors, after), one, metadata=after)
    for version in (0, 2, 10**6, -1, "1", 1.0, None, True, [1], 2**63):
        after = values | {"format_version": version}
        yield Case(f"version {version!r}", signed(one.tensors, after), one, told=True)
    for changes in CONTRADICTIONS:
        after = values
        if values["spec"] is None and any(path.startswith("spec.") for path in changes):
            continue
        for path, new in changes.items():
            after = changed(after, tuple(path.split(".")), new)
        yield Case(str(changes)[:80], signed(one.tensors, after), one, told=True)
    for digest in (None, 0, "", "0" * 64, values["checksum"].upper(), values["checksum"] + " "):
        data = save(one.tensors, {"peft_vpt": canonical(values | {"checksum": digest})})
        yield Case(f"checksum {digest!r}", data, one, told=True)


def numbers(one: Sample, rng: random.Random) -> Iterator[Case]:
    """Tensors that are not finite, of another type or name, missing or left over; signed again."""
    parts = tuple({f"{name.partition('.')[0]}." for name in one.tensors})
    for name, tensor in one.tensors.items():
        for bad in (math.nan, math.inf, -math.inf):
            for _ in range(3):
                broken = tensor.clone()
                broken.view(-1)[rng.randrange(tensor.numel())] = bad
                data = signed(one.tensors | {name: broken}, one.metadata)
                yield Case(f"{name} with {bad}", data, one, told=True)
        for kind in (torch.int32, torch.bool, torch.uint8, torch.complex64, torch.float8_e5m2):
            data = save(
                one.tensors | {name: tensor.to(kind)}, {"peft_vpt": canonical(one.metadata)}
            )
            yield Case(f"{name} as {kind}", data, one, told=True)
        rest = {k: v for k, v in one.tensors.items() if k != name}
        for new in NAMES[:20]:
            data = signed(rest | {new: tensor}, one.metadata)
            inside = new.startswith(parts)
            yield Case(f"{name} as {new[:20]!r}", data, one, told=True, by_layout=inside)
    spare = torch.ones(1)
    for new in NAMES:
        if new != "__metadata__":
            data = signed(one.tensors | {new: spare}, one.metadata)
            inside = new.startswith(parts)
            yield Case(f"and {new[:20]!r}", data, one, told=True, by_layout=inside)


def strangers(one: Sample, rng: random.Random) -> Iterator[Case]:
    """Files of other kinds."""
    files = {
        "empty": b"",
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "pickle": pickle.dumps({"prompts.0": [0.0]}),
        "zip": b"PK\x03\x04" + bytes(200),
        "json": canonical(one.metadata).encode(),
        "html": b"<!doctype html><title>404</title>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "no metadata": save(one.tensors),
        "other metadata": save(one.tensors, {"format": "pt"}),
        "no tensors": save({}, {"peft_vpt": canonical(one.metadata)}),
        "no tensors, signed": signed({}, one.metadata),
        "twice": one.data * 2,
        "backwards": one.data[::-1],
    } | {f"noise {n}": rng.randbytes(n) for n in (1, 8, 9, 100, 5000)}
    for label, data in files.items():
        yield Case(label, data, one, told=True)


def swaps(found: list[Sample], rng: random.Random) -> Iterator[Case]:
    """Headers and data of different files put together."""
    for index, one in enumerate(found):
        others = [o for o in found if o is not one]
        for _ in range(20):
            drawn = {k: torch.rand(t.shape).to(t.dtype) + 2 for k, t in one.tensors.items()}
            data = signed(drawn, one.metadata)
            others.append(Sample(data, drawn, one.metadata))
        for number, other in enumerate(others):
            halves = {
                "header": packed(one.header, other.body),
                "data": packed(other.header, one.body),
                "length": one.data[:8] + other.data[8:],
                "metadata": save(one.tensors, {"peft_vpt": other_text(other)}),
            }
            for label, data in halves.items():
                if data != other.data:
                    yield Case(f"{index}/swaps/{label} {number}", data, one, told=data != one.data)


def other_text(other: Sample) -> str:
    """Return the metadata text in a file's header."""
    return str(json.loads(other.header)["__metadata__"]["peft_vpt"])
