"""Tasks, transforms and loaders: every layout, every kind of image, every kind of bad input."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_vpt.data import (
    TASKS,
    Split,
    Task,
    check_images,
    check_masks,
    decode,
    eval_transform,
    loader,
    open_segmentation,
    open_task,
    paper_task,
    preprocessing_for,
    segmentation_loader,
    segmentation_transform,
    train_transform,
)
from peft_vpt.data.drawing import stratified
from peft_vpt.data.layouts import folder_names
from peft_vpt.data.masks import SegmentationSplit, SegmentationTask
from peft_vpt.errors import SpecError, VPTError
from peft_vpt.preprocessing import load_image, timm_transform

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")
pytest.importorskip("torchvision")


VALUES = {
    "size": [32, 32],
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.25, 0.2],
    "interpolation": "bicubic",
    "crop": 0.9,
}
Save = Callable[..., Path]


def save(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Write a random image of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def fill(folder: Path, counts: Mapping[str, int]) -> Path:
    """Write `counts[class]` images into a folder per class."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            save(folder / name / f"{index:03d}.png", 1000 * label + index, (8, 8))
    return folder


def vtab(folder: Path, sizes: tuple[int, int, int] = (6, 3, 4), classes: int = 3) -> Path:
    """Write a folder in the VTAB-1k layout."""
    lines: dict[str, list[str]] = {}
    for name, size in zip(("train800", "val200", "test"), sizes, strict=True):
        for index in range(size):
            save(folder / f"images/{name}/{index} a.png", index, (8, 8))
        lines[name] = [f"images/{name}/{i} a.png {i % classes}" for i in range(size)]
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return folder


def sizes(task: Task) -> dict[str, int]:
    return {name: len(split) for name, split in task.splits.items()}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


# ------------------------------------------------------------------------------- layouts


def test_vtab_lists(tmp_path: Path) -> None:
    task = open_task(vtab(tmp_path / "pets"))
    assert (task.name, task.classes) == ("pets", ("0", "1", "2"))
    assert sizes(task) == {"train": 6, "val": 3, "test": 4}
    assert task.splits["train"].labels == (0, 1, 2, 0, 1, 2)
    assert task.splits["val"].paths[1] == str(tmp_path / "pets/images/val200/1 a.png")
    joined = task.trainval()
    assert joined.paths == task.splits["train"].paths + task.splits["val"].paths
    assert joined.labels == (0, 1, 2, 0, 1, 2, 0, 1, 2)
    assert task.notes == ()
    assert task.describe() == "pets: 3 classes, train 6, val 3, test 4 (VTAB-1k lists)"
    (tmp_path / "pets" / "classes.txt").write_text("\ufeffcat\r\nred dog\r\nfox\r\n", "utf-8")
    named = open_task(str(tmp_path / "pets"), name="other")
    assert (named.name, named.classes) == ("other", ("cat", "red dog", "fox"))


def test_vtab_classes_that_train_lacks(tmp_path: Path) -> None:
    """A name or a gap makes a class known; a number beyond all training labels does not."""
    folder = vtab(tmp_path / "a")
    edit(folder / "test.txt", "3 a.png 0", "3 a.png 3")
    with pytest.raises(VPTError, match=r"1 classes of 'test' are unknown to train: 3\."):
        open_task(folder)
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    task = open_task(folder)
    assert task.notes == ("1 of 4 classes have no training image: d",)
    gap = vtab(tmp_path / "b")
    for name in ("train800", "train800val200"):
        file = gap / f"{name}.txt"
        file.write_text(re.sub(r"(train800/. a\.png) 1\n", r"\1 2\n", file.read_text()))
    assert open_task(gap).notes == ("1 of 3 classes have no training image: 1",)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("test", "a.png 2", "a.png -1", r"1 lines without .* 'images/test/2 a.png -1'"),
        ("test", "a.png 2", "a.png 1.5", "without a path and a whole number"),
        ("test", "a.png 2", "a.png dog", "without a path and a whole number"),
        ("test", "images/test/2 a.png 2", "2", r"line 3 '2'"),
        ("test", "test/1 a.png", "test/9.png", r"test\.txt: names 1 images .*images/test/9\.png"),
        ("test", "images/test/1 a.png", "images/train800/1 a.png", "1 images are in 'train' and"),
        ("train800val200", "a.png 2", "a.png 1", "holds other lines than"),
        ("test", "test/1 a.png", "test/0 a.png", r"with the labels 0 and 1"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    edit(vtab(tmp_path) / f"{name}.txt", old, new)
    with pytest.raises(VPTError, match=message):
        open_task(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classes", "a\nb\n", r"1 classes of 'train' are unknown .*: 2\. Train has 2"),
        ("classes", "a\nb\nb\n", r"classes\.txt: names b twice"),
        ("classes", "\n", r"classes\.txt: is empty"),
        ("classes", "a\n\nb\nc\n", r"classes\.txt: line 2 is empty"),
        ("classes", "\na\nb\nc", r"classes\.txt: line 1 is empty"),
        ("classes", "a\nb\n \nc", r"classes\.txt: line 3 is empty"),
        ("train800", "\n", r"train800\.txt: is empty"),
        ("val200", "\n", r"val200\.txt: is empty"),
        ("test", "\n", r"test\.txt: is empty"),
        ("test", None, r"test\.txt: is missing"),
        ("test", b"\xff\xfe\x00a 1", r"test\.txt: cannot be read as UTF-8"),
    ],
)
def test_bad_files_of_lists(
    tmp_path: Path, file: str, content: str | bytes | None, message: str
) -> None:
    place = vtab(tmp_path) / f"{file}.txt"
    (tmp_path / "train800val200.txt").unlink()
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(VPTError, match=message):
        open_task(tmp_path)


@pytest.mark.parametrize("label", [6, 1_000_000, int("9" * 60)])
def test_a_label_beyond_the_number_of_images_is_a_mistake(tmp_path: Path, label: int) -> None:
    folder = vtab(tmp_path)
    (folder / "train800val200.txt").unlink()
    edit(folder / "train800.txt", "5 a.png 2", f"5 a.png {label}")
    match = f"has the label {label}, which makes {label + 1} classes of 6 images"
    if label > 1e18:
        match = "1 lines without a path and a whole number"
    with pytest.raises(VPTError, match=match):
        open_task(folder)
    edit(folder / "train800.txt", f"5 a.png {label}", "5 a.png 5")
    assert len(open_task(folder).classes) == 6
    (folder / "classes.txt").write_text("\n".join("abcdefgh"))
    edit(folder / "train800.txt", "5 a.png 5", "5 a.png 7")
    assert len(open_task(folder).classes) == 8


def test_empty_lines_behind_the_classes_are_none(tmp_path: Path) -> None:
    (vtab(tmp_path) / "classes.txt").write_text("a\nb\nc\n\n \n")
    assert open_task(tmp_path).classes == ("a", "b", "c")


def test_missing_images_are_counted_and_ten_are_named(tmp_path: Path) -> None:
    folder = vtab(tmp_path, (20, 3, 4))
    for index in range(15):
        (folder / f"images/train800/{index} a.png").unlink()
    with pytest.raises(VPTError, match="names 15 images") as caught:
        open_task(folder)
    assert str(caught.value).count("a.png") == 10
    assert "and 5 more" in str(caught.value)


def test_duplicate_lines_count_and_are_reported(tmp_path: Path) -> None:
    folder = vtab(tmp_path)
    with (folder / "test.txt").open("a") as file:
        file.write("images/test/1 a.png 1\n")
    task = open_task(folder)
    assert sizes(task)["test"] == 5
    assert task.notes == ("test names 1 images again; each counts as often as it is named",)


def test_image_folders(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"b": 3, "a": 2})
    fill(tmp_path / "validation", {"a": 1})
    fill(tmp_path / "test", {"b": 2, "a": 1})
    save(tmp_path / "train/a/deeper/x.JPG")
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/.git").mkdir()
    save(tmp_path / "train/a/._y.png")
    task = open_task(tmp_path)
    assert task.classes == ("a", "b")
    assert sizes(task) == {"train": 6, "val": 1, "test": 3}
    assert task.splits["train"].labels == (0, 0, 0, 1, 1, 1)
    assert [Path(p).name for p in task.splits["test"].paths] == ["000.png", "000.png", "001.png"]
    (tmp_path / "val").mkdir()
    with pytest.raises(VPTError, match="has val and validation, both of which may be 'val'"):
        open_task(tmp_path)


def test_links_are_followed_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        fill(tmp_path / split, {"a": 3, "b": 3})
    fill(tmp_path / "elsewhere", {"more": 6})
    folder = tmp_path / "train"
    (folder / "a/more").symlink_to((tmp_path / "elsewhere").rename(tmp_path / ".kept") / "more")
    # Links round in a circle end.
    (folder / "b/round").symlink_to(folder / "b")
    save(folder / "a/x.png").rename(folder / "a/x.jpe")
    assert sizes(open_task(tmp_path)) == {"train": 13, "val": 3 + 3, "test": 6}
    assert open_task(tmp_path).notes == ()
    for name in ("b/x.heic", "b/y.HEIC", "a/plain", "a/Thumbs.db", "a/.hidden"):
        (folder / name).write_bytes(b"")
    for index in range(4):
        save(folder / f"{index}.png")
    (folder / "readme.txt").write_text("no image of a class")
    notes = (
        "3 files of train left out, no images by their suffix (.heic 2, no suffix 1): "
        "a/plain, b/x.heic, b/y.HEIC",
        "4 images of train left out, beside the folders of classes: 0.png, 1.png, 2.png and 1 more",
    )
    assert open_task(tmp_path).notes == notes
    # As a folder of classes.
    assert open_task(folder).notes[:2] == notes


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_is_the_image_that_it_leads_to(tmp_path: Path, link: str) -> None:
    for split in ("train", "val", "test"):
        fill(tmp_path / split, {"a": 3, "b": 3})
    if link == "file":
        (tmp_path / "test/a/000.png").unlink()
        (tmp_path / "test/a/000.png").symlink_to(tmp_path / "train/a/001.png")
    else:
        (tmp_path / "test/a/deeper").symlink_to(tmp_path / "train/a")
    count = {"file": 1, "folder": 3}[link]
    with pytest.raises(VPTError, match=rf"{count} images are in 'train' and in 'test': .*001\.png"):
        open_task(tmp_path)
    (tmp_path / "test").rename(tmp_path / ".test")
    (tmp_path / "train/a/again.png").symlink_to(tmp_path / "train/a/000.png")
    note = "train names 1 images again; each counts as often as it is named"
    assert open_task(tmp_path).notes == (note, "no test split: only val can be measured")
    (tmp_path / "train/b/as_b.png").symlink_to(tmp_path / "train/a/000.png")
    with pytest.raises(VPTError, match=r"000\.png occurs in 'train' with the labels 0 and 1"):
        open_task(tmp_path)


@pytest.mark.parametrize(
    "names", [("train", "valid", "test"), ("Training", "dev", "Testing"), ("TRAIN", "Val", "Test")]
)
def test_split_folders_by_other_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, count in zip(names, (6, 2, 3), strict=True):
        fill(tmp_path / name, {"a": count, "b": count})
    (tmp_path / ".cache").mkdir()
    task = open_task(tmp_path)
    assert task.classes == ("a", "b")
    assert sizes(task) == {"train": 12, "val": 4, "test": 6}
    assert task.notes == ()
    fill(tmp_path / "extra", {"a": 1})
    assert open_task(tmp_path).notes == (f"folders beside {names[0]} that are not used: extra",)
    fill(tmp_path / "testing_too", {"a": 1})
    (tmp_path / "testing_too").rename(tmp_path / ("test" if names[2] != "test" else "Test"))
    with pytest.raises(VPTError, match="both of which may be 'test'"):
        open_task(tmp_path)


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    fill(tmp_path / "vehicles", {"Bus": 5, "Train": 5})
    assert open_task(tmp_path / "vehicles").classes == ("Bus", "Train")
    fill(tmp_path / "tickets", {"invalid": 5, "valid": 5})
    assert open_task(tmp_path / "tickets").classes == ("invalid", "valid")
    for names in (("Valid", "Testing"), ("dev",), ("Test", "other")):
        folder = tmp_path / "-".join(names)
        fill(folder, dict.fromkeys(names, 5))
        with pytest.raises(VPTError, match="no classes or no training images"):
            open_task(folder)


def test_missing_splits_are_cut_from_train(tmp_path: Path) -> None:
    fill(tmp_path / "three/train", {"a": 20, "b": 40})
    fill(tmp_path / "three/test", {"a": 1, "b": 1})
    task = open_task(tmp_path / "three")
    assert sizes(task) == {"train": 54, "val": 6, "test": 2}
    assert Counter(task.splits["val"].labels) == {0: 2, 1: 4}
    assert task.notes == ("val is 6 images cut from train (stratified, seed 0)",)
    assert open_task(tmp_path / "three") == task
    assert open_task(tmp_path / "three", seed=1).splits["val"] != task.splits["val"]
    alone = open_task(tmp_path / "three/train", val_fraction=0.25, test_fraction=0.5)
    assert sizes(alone) == {"train": 22, "val": 8, "test": 30}
    assert Counter(alone.splits["test"].labels) == {0: 10, 1: 20}
    paths = [p for split in alone.splits.values() for p in split.paths]
    assert len(set(paths)) == 60
    fill(tmp_path / "two/train", {"a": 2})
    fill(tmp_path / "two/val", {"a": 1})
    both = open_task(tmp_path / "two")
    assert list(both.splits) == ["train", "val"]
    assert both.notes == ("no test split: only val can be measured",)
    with pytest.raises(VPTError, match="has no split 'test'; it has train, val"):
        both.split("test")
    assert both.split("trainval") == both.trainval()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"val/a": 1}, "no classes or no training images found; it has val"),
        ({"train": 1}, "train: has no class folders"),
        ({"train/a": 2, "val/a": 1, "val/c": 1}, "1 classes of 'val' are unknown to train: c"),
        ({"train/a": 2, "train/b": 0}, "train: 1 of 2 class folders have no images: b"),
        ({"train/a": 2, "test/a": 0}, "split 'test' is empty"),
        ({"a": 1, "b": 1}, "no split 'test', and none can be cut from 2"),
    ],
)
def test_bad_folders(tmp_path: Path, counts: Mapping[str, int], message: str) -> None:
    with pytest.raises(VPTError, match=message):
        open_task(fill(tmp_path, counts))


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(VPTError, match="is not there; give a folder"):
        open_task(tmp_path / "nothing")
    with pytest.raises(VPTError, match="is a file"):
        open_task(save(tmp_path / "a.png"))
    with pytest.raises(VPTError, match=r"no classes or no training images found; it has a\.png"):
        open_task(tmp_path)


def fgvc(folder: Path, root: str = "", names: tuple[Any, ...] = ("owl", "jay")) -> Path:
    for split, count in (("train", 20), ("test", 4)):
        rows = {f"{split}/{i}.png": names[i % len(names)] for i in range(count)}
        for path in rows:
            save(folder / root / path, size=(8, 8))
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("root", ["", "images"])
def test_fgvc_json_splits(tmp_path: Path, root: str) -> None:
    task = open_task(fgvc(tmp_path, root))
    assert task.classes == ("jay", "owl")
    assert sizes(task) == {"train": 18, "val": 2, "test": 4}
    assert Counter(task.splits["val"].labels) == {0: 1, 1: 1}
    assert task.splits["test"].labels == (1, 0, 1, 0)
    assert task.splits["test"].paths[0] == str(tmp_path / root / "test/0.png")
    train = json.loads((tmp_path / "train.json").read_text())
    val = {path: train.pop(path) for path in list(train)[:5]}
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "val.json").write_text(json.dumps(val))
    own = open_task(tmp_path)
    assert sizes(own) == {"train": 15, "val": 5, "test": 4}
    assert own.notes == ()


def test_fgvc_numbers_need_not_begin_at_zero(tmp_path: Path) -> None:
    with pytest.raises(VPTError, match=r"10 of 20 images of 'train' have no label \(-1\)"):
        open_task(fgvc(tmp_path, names=(-1, 2)))
    task = open_task(fgvc(tmp_path, names=(10, 2, 7)))
    assert task.classes == ("2", "7", "10")
    assert task.splits["test"].labels == (2, 0, 1, 2)
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghijk"))
    assert open_task(tmp_path).splits["test"].labels == (10, 2, 7, 10)


def test_fgvc_fractions_have_files_of_their_own(tmp_path: Path) -> None:
    folder = fgvc(tmp_path, names=(5, 3))
    (folder / "train_10.json").write_text(json.dumps({"train/3.png": 3}))
    (folder / "val.json").write_text(json.dumps({"train/0.png": 5}))
    edit(folder / "train.json", '"train/0.png": 5, ', "")
    task = open_task(folder, fraction=0.1)
    assert task.classes == ("3", "5")
    assert (task.splits["train"].labels, task.splits["val"].labels) == ((0,), (1,))
    assert "train is 1 images of train_10.json" in task.notes
    assert sizes(open_task(folder, fraction=0.5))["train"] == round(19 / 2)
    # The file is of 10 %, not of what rounds to it.
    rounded = open_task(folder, fraction=0.104)
    assert sizes(rounded)["train"] == round(19 * 0.104)
    assert "train is 2 of 19 images (stratified, seed 0)" in rounded.notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("{}", r"test\.json: is empty"),
        ('{"test/0.png": 1.5}', r"1 labels that are neither .* test/0\.png: 1\.5"),
        ('{"test/0.png": true}', "neither whole numbers nor"),
        ('{"test/0.png": null}', "neither whole numbers nor"),
        (
            '{"test/0.png": 3}',
            "all numbers or all names; they begin with a name in train, a number",
        ),
        ('{"test/0.png": "emu"}', "1 classes of 'test' are unknown to train: emu"),
        ('{"test/99.png": "owl"}', r"names 1 images .*test/99\.png"),
        ('{"train/0.png": "owl"}', "1 images are in"),
        ('{"test/0.png": "owl", "test/0.png": "jay"}', "with the labels 1 and 0"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, message: str) -> None:
    (fgvc(tmp_path) / "test.json").write_text(text)
    with pytest.raises(VPTError, match=message):
        open_task(tmp_path)
    (tmp_path / "test.json").unlink()
    with pytest.raises(VPTError, match=r"test\.json: is missing"):
        open_task(tmp_path)


@pytest.mark.parametrize("saved", [True, False])
def test_hugging_face_datasets(tmp_path: Path, saved: bool, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "birds"
    for name, count in (("train", 20), ("test", 3)):
        fill(folder / name, {"owl": count, "jay": count})
    if saved:
        loaded = datasets.load_dataset(
            "imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache")
        )
        folder = tmp_path / "saved" / "birds"
        loaded.save_to_disk(folder)
    task = open_task(f"hf:{folder}")
    assert (task.name, task.classes) == ("birds", ("jay", "owl"))
    assert sizes(task) == {"train": 36, "val": 4, "test": 6}
    assert Counter(task.splits["val"].labels) == {0: 2, 1: 2}
    assert check_images(task) == []
    joined = task.trainval()
    assert len(joined) == 40
    batches = list(loader(joined, eval_transform(VALUES), batch_size=16, shuffle=True))
    assert [tuple(pixels.shape) for pixels, _ in batches] == [(n, 3, 32, 32) for n in (16, 16, 8)]
    # The images that go with the labels: class jay was drawn with seeds from 1000 up.
    position = task.splits["test"].labels.index(0)
    expected = {
        np.asarray(load_image(p)).tobytes() for p in (tmp_path / "birds/test/jay").iterdir()
    }
    assert np.asarray(task.splits["test"].image(position)).tobytes() in expected


def test_hugging_face_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    picture = Image.new("L", (4, 4))
    columns = {"img": [picture] * 12, "a": ["x", "y"] * 6, "fine": [0, 1] * 6}
    features = {"img": datasets.Image(), "a": datasets.Value("string")}

    def write(name: str, kind: Any, **changes: Any) -> str:
        content = columns | changes
        schema = datasets.Features({k: (features | {"fine": kind})[k] for k in content})
        datasets.Dataset.from_dict(content, features=schema).save_to_disk(tmp_path / name)
        return f"hf:{tmp_path / name}"

    task = open_task(write("plain", datasets.ClassLabel(names=["n", "m"])), val_fraction=0.2)
    assert task.classes == ("n", "m")
    assert sizes(task) == {"train": 8, "val": 2, "test": 2}
    with pytest.raises(VPTError, match="needs one label column, found a, fine among"):
        open_task(write("two", datasets.Value("int64")))
    bad = [0, -1] * 6
    with pytest.raises(VPTError, match="6 of 12 images of 'train' have no label"):
        open_task(write("hidden", datasets.ClassLabel(names=["n", "m"]), fine=bad))
    with pytest.raises(VPTError, match="datasets cannot read it"):
        open_task(f"hf:{tmp_path / 'nowhere'}")


Saved = tuple[Any, Sequence[Any]]


def hub(folder: Path, **parts: Saved) -> str:
    """Save a dataset of splits, each with its kind of labels (class names or a dtype)."""
    datasets = pytest.importorskip("datasets")
    held = datasets.DatasetDict()
    for split, (kind, labels) in parts.items():
        named = isinstance(kind, list)
        label = datasets.ClassLabel(names=kind) if named else datasets.Value(kind)
        schema = datasets.Features({"image": datasets.Image(), "label": label})
        rows = {"image": [Image.new("L", (4, 4))] * len(labels), "label": list(labels)}
        held[split] = datasets.Dataset.from_dict(rows, features=schema)
    held.save_to_disk(folder)
    return f"hf:{folder}"


def test_labels_of_hugging_face_splits_go_by_their_names(tmp_path: Path) -> None:
    val: Saved = ("string", "mmn")
    name = hub(
        tmp_path / "a", train=(["n", "m"], [0, 1] * 4), val=val, test=(["m", "n"], [0, 0, 1])
    )
    task = open_task(name)
    assert task.classes == ("n", "m")
    assert task.splits["test"].labels == task.splits["val"].labels == (1, 1, 0)
    name = hub(tmp_path / "b", train=(["n", "m"], [0, 1] * 4), test=(["m", "x"], [0, 1]))
    with pytest.raises(VPTError, match="1 classes of 'test' are unknown to train: x"):
        open_task(name)
    name = hub(tmp_path / "c", train=(["n", "m"], [0, 1] * 4), test=("int64", [0, 1]))
    with pytest.raises(
        VPTError, match="all numbers or all names; they begin with a name in train, a number"
    ):
        open_task(name)


@pytest.mark.parametrize("kind", ["int64", ["n", "m"], "string"])
def test_hugging_face_labels_that_are_missing(tmp_path: Path, kind: Any) -> None:
    good: list[Any] = ["n", "m"] if kind == "string" else [0, 1]
    for number, absent in enumerate((None,) if kind == "string" else (None, -1)):
        train, test = (kind, [*good, absent] * 3), (kind, good)
        with pytest.raises(VPTError, match="3 of 9 images of 'train' have no label"):
            open_task(hub(tmp_path / f"{number}", train=train, test=test))
        hidden = hub(
            tmp_path / f"hidden {number}", train=(kind, good * 5), test=(kind, [absent] * 2)
        )
        assert "test has no labels (all -1) and is left out" in open_task(hidden).notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rename_column", "label", "kind"), "columns image and label of train, but image and"),
        (("remove_columns", "label"), "its split 'test' needs one label column, found none"),
    ],
)
def test_hugging_face_splits_of_other_columns(
    tmp_path: Path, change: tuple[str, ...], message: str
) -> None:
    part: Saved = (["n", "m"], [0, 1] * 4)
    hub(tmp_path / "a", train=part, test=part)
    held = pytest.importorskip("datasets").load_from_disk(tmp_path / "a")
    held["test"] = getattr(held["test"], change[0])(*change[1:])
    held.save_to_disk(tmp_path / "b")
    with pytest.raises(VPTError, match=message):
        open_task(f"hf:{tmp_path / 'b'}")


@pytest.mark.parametrize("empty", ["train", "test"])
def test_hugging_face_splits_without_rows(tmp_path: Path, empty: str) -> None:
    parts: dict[str, Saved] = dict.fromkeys(("train", "test"), (["n", "m"], [0, 1] * 4))
    with pytest.raises(VPTError, match="datasets cannot read it"):
        open_task(hub(tmp_path, **parts | {empty: (["n", "m"], [])}))


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_a_format_saved_with_a_dataset_changes_nothing(tmp_path: Path, form: str) -> None:
    datasets = pytest.importorskip("datasets")
    name = hub(tmp_path / "a", train=(["n", "m"], [0, 1] * 4), test=(["n", "m"], [0, 1]))
    datasets.load_from_disk(tmp_path / "a").with_format(form).save_to_disk(tmp_path / "b")
    task, plain = open_task(f"hf:{tmp_path / 'b'}"), open_task(name)
    assert {n: s.labels for n, s in task.splits.items()} == {
        n: s.labels for n, s in plain.splits.items()
    }
    assert task.split("test").image(1).size == (4, 4)


def test_hugging_face_splits_by_other_names(tmp_path: Path) -> None:
    part: Saved = (["n", "m"], [0, 1] * 2)
    task = open_task(hub(tmp_path / "a", Training=part, dev=part, testing=part, extra=part))
    assert sizes(task) == {"train": 4, "val": 4, "test": 4}
    assert task.notes == ("splits that are not used: extra",)
    with pytest.raises(VPTError, match="has dev and validation, both of which may be 'val'"):
        open_task(hub(tmp_path / "b", train=part, dev=part, validation=part))


def test_hugging_face_without_datasets(monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(VPTError, match="needs the package datasets; pip install"):
        open_task("hf:owner/name")


# -------------------------------------------------------------------------- draws and values


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.8])
def test_fractions_are_stratified(tmp_path: Path, share: float) -> None:
    counts = {"a": 50, "b": 30, "c": 1}
    fill(tmp_path / "train", counts)
    fill(tmp_path / "val", {"a": 4})
    fill(tmp_path / "test", {"a": 4})
    task = open_task(tmp_path, fraction=share)
    found = Counter(task.splits["train"].labels)
    assert found == {0: round(50 * share), 1: round(30 * share), 2: 1}
    assert sizes(task)["val"] == 4
    assert task == open_task(tmp_path, fraction=share)
    assert task.splits["train"] != open_task(tmp_path, fraction=share, seed=3).splits["train"]


def test_stratified_totals_and_fairness() -> None:
    labels = [index % 7 for index in range(70)]
    for share in (0.01, 0.15, 0.33, 0.99):
        drawn, rest = stratified(labels, share, 0)
        assert len(drawn) == max(round(70 * share), 1)
        assert sorted(drawn + rest) == list(range(70))
        counts = Counter(labels[i] for i in drawn)
        assert max(counts.values()) - min(counts[c] for c in range(7)) <= 1
    # One image of 7 equal classes: every class has its turn over the seeds.
    assert {labels[stratified(labels, 0.01, seed)[0][0]] for seed in range(60)} == set(range(7))
    assert stratified([0, 0, 1], 0.99, 0, keep=1)[0] in ([0], [1])


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), "half"])
@pytest.mark.parametrize("name", ["fraction", "val_fraction", "test_fraction"])
def test_fractions_out_of_range(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=name):
        open_task(vtab(tmp_path), **{name: value})


@pytest.mark.parametrize("seed", ["x", -1, 1.5, None, True])
def test_seeds_that_are_none(tmp_path: Path, seed: Any) -> None:
    for call in (open_task, open_segmentation):
        match = rf"{call.__name__}\(seed={seed!r}\): must be an integer >= 0"
        with pytest.raises(SpecError, match=match):
            call(tmp_path, seed=seed)


def test_hand_made_tasks_are_checked() -> None:
    split = Split(("/a.png", "/b.png"), (0, 1))
    with pytest.raises(VPTError, match="no classes"):
        Task("t", (), {"train": split})
    with pytest.raises(VPTError, match=r"1 labels of 'train' .* 0 to 0: /b\.png: 1"):
        Task("t", ("x",), {"train": split})
    for label in (-1, 1.0, True, "1"):
        with pytest.raises(VPTError, match="no integers from 0 to 1"):
            Task("t", ("x", "y"), {"train": Split(("/a.png",), (label,))})  # type: ignore[arg-type]
    with pytest.raises(VPTError, match="no split 'train'"):
        Task("t", ("x", "y"), {"test": split})
    with pytest.raises(VPTError, match=r"1 images are in 'train' and in 'val': /a\.png"):
        Task("t", ("x", "y"), {"train": split, "val": Split(("/c/../a.png",), (0,))})
    with pytest.raises(VPTError, match="2 images but 1 labels"):
        Split(("/a", "/b"), (0,))
    picture = Split((), (0,), [Image.new("RGB", (2, 2))])
    with pytest.raises(VPTError, match="one split holds paths"):
        split.joined(picture)
    assert split.subset([1, 1]).paths == ("/b.png", "/b.png")
    again = picture.joined(picture).subset([1, 0]).subset([0])
    assert (len(again), again.image(0).size, again.where(0)) == (1, (2, 2), "number 0")


# --------------------------------------------------------------------------------- transforms


def test_vtab_transform_is_a_plain_resize(tmp_path: Path) -> None:
    image = load_image(save(tmp_path / "a.png", size=(50, 30)))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = (np.asarray(VALUES[name], dtype=np.float32) for name in ("mean", "std"))
    for transform in (train_transform(VALUES), eval_transform(VALUES)):
        found = transform(image).permute(1, 2, 0).numpy()
        # Rounding of float32 division in another order.
        np.testing.assert_allclose(found, (expected - mean) / std, atol=1e-5)
        assert not transform.random
        assert transform.preprocessing == VALUES | {"crop": None}
    assert train_transform(VALUES, size=(16, 24))(image).shape == (3, 16, 24)
    text = "resize to 32x32 (bicubic), mean (0.5, 0.4, 0.3), std (0.5, 0.25, 0.2)"
    assert eval_transform(VALUES).describe() == text


@pytest.mark.parametrize(("size", "edge"), [(224, 256), (384, 438), (448, 512)])
def test_fgvc_transform(tmp_path: Path, size: int, edge: int) -> None:
    image = load_image(save(tmp_path / "a.png", size=(600, 520)))
    resized = image.resize((int(edge * 600 / 520), edge), Image.Resampling.BICUBIC)
    values = VALUES | {"mean": [0.0] * 3, "std": [1.0] * 3}
    pixels = np.asarray(resized).transpose(2, 0, 1) / 255
    evaluated = eval_transform(values, size, kind="fgvc")
    top, left = ((length - size) / 2 for length in pixels.shape[1:])
    centre = pixels[:, round(top) :, round(left) :][:, :size, :size]
    np.testing.assert_allclose(evaluated(image).numpy(), centre, atol=1e-6)
    assert f"resize short side to {edge}, centre crop {size}x{size}" in evaluated.describe()
    trained = train_transform(values, "fgvc", size)
    assert trained.random
    windows = {False: 0, True: 0}
    for seed in range(6):
        torch.manual_seed(seed)
        found = trained(image).numpy()
        for flipped in windows:
            window = found[:, :, ::-1] if flipped else found
            corners = window[:, 0, 0][:, None, None] == pixels[:, : edge - size + 1].astype("f4")
            starts = np.argwhere(corners.all(0))
            windows[flipped] += any(
                np.allclose(pixels[:, y : y + size, x : x + size], window, atol=1e-6)
                for y, x in starts
                if x + size <= pixels.shape[2]
            )
    assert sum(windows.values()) == 6
    assert min(windows.values()) > 0
    assert "random crop" in trained.describe()
    assert "flip" in trained.describe()


def test_timm_transform_is_the_backbones_own(tmp_path: Path) -> None:
    image = load_image(save(tmp_path / "a.png", size=(50, 40)))
    expected = timm_transform(VALUES)(image)
    assert torch.equal(eval_transform(VALUES, kind="timm")(image), expected)
    assert torch.equal(train_transform(VALUES, "timm")(image), expected)
    config = {
        "input_size": (3, 32, 32),
        "mean": VALUES["mean"],
        "std": VALUES["std"],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }
    assert preprocessing_for(config, "timm") == VALUES


def test_bad_transforms() -> None:
    with pytest.raises(SpecError, match="must be one of vtab, fgvc, timm"):
        train_transform(VALUES, "imagenet")
    with pytest.raises(SpecError, match="lacks mean"):
        eval_transform({k: v for k, v in VALUES.items() if k != "mean"})
    for make in (eval_transform, lambda values: segmentation_transform(values, "eval")):
        with pytest.raises(SpecError, match=r"interpolation='random'\): must be one of nearest"):
            make(VALUES | {"interpolation": "random"})
    for size in (0, -3, (1, 2, 3), (4.0, 4), True):
        with pytest.raises(SpecError, match="must be an edge"):
            eval_transform(VALUES, size)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- images


def gradient() -> np.ndarray[Any, Any]:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey_modes() -> dict[str, Any]:
    """Images of one grey gradient, by how they are stored."""
    grey = gradient()
    wide = grey.astype(np.uint16) * 257
    palette = Image.fromarray(grey)
    palette = palette.convert("P")
    half = Image.fromarray(np.full((16, 16), 128, dtype=np.uint8))
    rgb = Image.fromarray(grey).convert("RGB")
    rgba, la = rgb.copy(), Image.fromarray(grey).convert("LA")
    rgba.putalpha(half)
    la.putalpha(half)
    return {
        "I;16.png": Image.fromarray(wide),
        "I;16.tiff": Image.fromarray(wide),
        "I.tiff": Image.fromarray(wide.astype(np.int32)),
        "F.tiff": Image.fromarray(grey.astype(np.float32)),
        "L.png": Image.fromarray(grey),
        "P.png": palette,
        "RGBA.png": rgba,
        "LA.png": la,
        "CMYK.tiff": rgb.convert("CMYK"),
        "CMYK.jpg": rgb.convert("CMYK"),
    }


@pytest.mark.parametrize("name", list(grey_modes()))
def test_modes_read_as_the_same_image(tmp_path: Path, name: str) -> None:
    quality = {"quality": 100, "subsampling": 0} if name.endswith("jpg") else {}
    grey_modes()[name].save(tmp_path / name, **quality)
    image = Split((str(tmp_path / name),), (0,)).image(0)
    assert image.mode == "RGB"
    values = np.asarray(image).astype(int)
    # JPEG loses up to two levels at quality 100.
    tolerance = 2 if quality else 0
    assert np.abs(values - gradient()[..., None]).max() <= tolerance


def test_white_follows_from_the_values_where_the_mode_does_not_say_it(tmp_path: Path) -> None:
    grey = gradient().astype(np.int32)
    for factor in (1, 257, 65537):
        Image.fromarray(grey * factor).save(tmp_path / "a.tiff")
        with Image.open(tmp_path / "a.tiff") as file:
            assert file.mode == "I"
        found = np.asarray(load_image(tmp_path / "a.tiff")).astype(int)
        assert np.array_equal(found, gradient()[..., None].repeat(3, 2)), factor
    for bad in (np.nan, np.inf):
        values = grey.astype(np.float32)
        values[3, 4] = bad
        Image.fromarray(values).save(tmp_path / "f.tiff")
        with pytest.raises(VPTError, match=r"f\.tiff: cannot be read: OSError: .*not finite"):
            Split((str(tmp_path / "f.tiff"),), (0,)).image(0)


def test_one_bit_and_transparent_palettes(tmp_path: Path) -> None:
    bits = Image.fromarray(gradient() > 100)
    bits.save(tmp_path / "bits.png")
    assert Image.open(tmp_path / "bits.png").mode == "1"
    found = np.asarray(load_image(tmp_path / "bits.png"))
    assert np.array_equal(found, np.where(gradient() > 100, 255, 0)[..., None].repeat(3, 2))
    palette = Image.fromarray(gradient() % 4).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for name, transparency in (("index", 1), ("bytes", b"\x00\x80\xff\xff")):
        palette.save(tmp_path / f"{name}.png", transparency=transparency)
        found = np.asarray(load_image(tmp_path / f"{name}.png"))
        # Transparency is dropped: the colours are those of the palette.
        assert found[0, :4].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # a bright upper left quarter
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), upright)
    held = Split((), (0,), [Image.open(tmp_path / "a.png")])
    assert np.array_equal(np.asarray(held.image(0)), upright)


def broken_task(folder: Path) -> tuple[Task, list[str]]:
    """A task with a text file, an empty file, a cut JPEG and a cut PNG among its images."""
    fill(folder / "train", {"a": 4, "b": 4})
    fill(folder / "val", {"a": 2})
    fill(folder / "test", {"a": 2})
    cut = folder / "train/b/cut.jpg"
    for path in (cut, folder / "val/a/cut.png"):
        save(path, size=(64, 64))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (folder / "train/a/text.png").write_text("not an image")
    (folder / "test/a/empty.png").write_bytes(b"")
    names = ["train/a/text.png", "train/b/cut.jpg", "val/a/cut.png", "test/a/empty.png"]
    return open_task(folder), [str(folder / name) for name in names]


def test_broken_images_are_listed_skipped_or_refused(tmp_path: Path) -> None:
    task, broken = broken_task(tmp_path)
    assert check_images(task, progress=False) == broken
    assert check_images(task.splits["val"]) == broken[2:3]
    transform = eval_transform(VALUES)
    with pytest.raises(VPTError, match="2 of 10 images cannot be used") as caught:
        loader(task.splits["train"], transform, batch_size=4)
    assert all(path in str(caught.value) for path in broken[:2])
    kept = loader(task.splits["train"], transform, batch_size=4, skip_broken=True)
    labels = torch.cat([labels for _, labels in kept])
    assert labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(VPTError, match="none of 1 images can be used"):
        loader(task.splits["test"].subset([2]), transform, batch_size=1, skip_broken=True)
    unchecked = loader(task.splits["train"], transform, batch_size=10, check=False, workers=1)
    with pytest.raises(VPTError, match=re.escape(broken[0])):
        next(iter(unchecked))


def test_a_repaired_image_is_read_again(tmp_path: Path) -> None:
    task, broken = broken_task(tmp_path)
    assert check_images(task) == broken
    for path in broken:
        save(Path(path))
    assert check_images(task) == []


# ------------------------------------------------------------------------------------ loaders


@pytest.fixture
def split(tmp_path: Path) -> Split:
    paths = [save(tmp_path / f"{i}.png", i, (24, 20)) for i in range(10)]
    return Split(tuple(str(path) for path in paths), tuple(range(10)))


def epoch(batches: Any, number: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    if number is not None:
        batches.sampler.set_epoch(number)
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def test_loader_gives_pixels_and_labels(split: Split) -> None:
    transform = eval_transform(VALUES)
    batches = list(loader(split, transform, batch_size=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    pixels, labels = batches[0]
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(pixels[1], transform(load_image(split.paths[1])))
    assert labels.tolist() == [0, 1, 2, 3]
    assert len(loader(split, transform, batch_size=4, drop_last=True)) == 2


def test_epochs_follow_from_the_seed(split: Split) -> None:
    transform = train_transform(VALUES, "fgvc")
    batches = loader(split, transform, batch_size=4, shuffle=True, seed=5)
    first, second = epoch(batches, 0), epoch(batches, 1)
    assert first[1].tolist() != second[1].tolist()
    assert sorted(first[1].tolist()) == list(range(10))
    for workers in (0, 2):
        other = loader(split, transform, batch_size=4, shuffle=True, seed=5, workers=workers)
        for number, expected in ((1, second), (0, first)):
            found = epoch(other, number)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert epoch(loader(split, transform, batch_size=4, shuffle=True, seed=6), 0)[1].tolist() != (
        first[1].tolist()
    )
    fresh = loader(split, transform, batch_size=4, shuffle=True, seed=5)
    assert torch.equal(epoch(fresh)[0], first[0])
    assert not torch.equal(epoch(fresh)[1], first[1])
    # The same image is drawn differently in another epoch.
    places = [labels.tolist().index(3) for _, labels in (first, second)]
    assert not torch.equal(first[0][places[0]], second[0][places[1]])


def test_drawing_leaves_the_global_state_alone(split: Split) -> None:
    images = loader(split, train_transform(VALUES, "fgvc"), batch_size=4, shuffle=True).dataset
    state = torch.get_rng_state()
    assert torch.equal(images[3, 7][0], images[3, 7][0])
    assert not torch.equal(images[3, 7][0], images[3, 8][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_accelerate_keeps_the_order_and_resumes_in_an_epoch(split: Split) -> None:
    accelerate = pytest.importorskip("accelerate")
    transform = train_transform(VALUES, "fgvc")

    def make() -> Any:
        return loader(split, transform, batch_size=3, shuffle=True, seed=2)

    expected = [epoch(make(), number) for number in range(3)]
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(make())
    for number in range(2):
        found = epoch(prepared)
        assert all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True))
    resumed = accelerator.prepare(make())
    resumed.set_epoch(2)
    rest = epoch(accelerate.skip_first_batches(resumed, 2))
    assert all(torch.equal(a, b[6:]) for a, b in zip(rest, expected[2], strict=True))


def test_decoded_images(split: Split) -> None:
    transform = eval_transform(VALUES)
    held = decode(split, transform)
    plain = epoch(loader(split, transform, batch_size=4, shuffle=True, seed=1), 3)
    found = epoch(loader(held, None, batch_size=4, shuffle=True, seed=1), 3)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert torch.equal(held.subset([3, 1]).images, held.images[[3, 1]])
    assert len(held.joined(held)) == 20
    with pytest.raises(SpecError, match="drawn once for all epochs"):
        decode(split, train_transform(VALUES, "fgvc"))
    with pytest.raises(SpecError, match="pixels already"):
        decode(held, transform)


def test_bad_loaders(split: Split) -> None:
    transform = eval_transform(VALUES)
    for options in ({"batch_size": 0}, {"batch_size": 2.0}, {"batch_size": 1, "workers": -1}):
        with pytest.raises(SpecError, match="must be an integer >= "):
            loader(split, transform, **options)  # type: ignore[arg-type]
    for seed in (-1, "a"):
        with pytest.raises(SpecError, match="seed"):
            loader(split, transform, batch_size=2, shuffle=True, seed=seed)  # type: ignore[arg-type]
    with pytest.raises(VPTError, match="the split is empty"):
        loader(split.subset([]), transform, batch_size=2)
    with pytest.raises(SpecError, match="None goes with a split of decode"):
        loader(split, None, batch_size=2)
    with pytest.raises(SpecError, match="None goes with a split of decode"):
        loader(decode(split, transform), transform, batch_size=2)


# ------------------------------------------------------------------------------- segmentation


def ade(folder: Path, counts: Mapping[str, int], size: tuple[int, int] = (40, 30)) -> Path:
    """Write images whose red channel is 10 times the label of their mask."""
    for split, count in counts.items():
        for index in range(count):
            generator = np.random.default_rng(index)
            mask = generator.integers(0, 4, (size[1] // 10, size[0] // 10), dtype=np.uint8)
            mask = mask.repeat(10, 0).repeat(10, 1)
            for kind, values, suffix in (
                ("images", np.stack([mask * 10] * 3, -1), "bmp"),
                ("annotations", mask, "png"),
            ):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(folder / kind / split / f"{index}.{suffix}")
    return folder


COUNTS = {"training": 6, "validation": 2, "test": 3}
PLAIN = VALUES | {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "nearest"}


def test_segmentation_folders(tmp_path: Path) -> None:
    task = open_segmentation(ade(tmp_path / "ade", COUNTS))
    assert (task.name, task.classes) == ("ade", ("0", "1", "2", "3"))
    assert {n: len(s) for n, s in task.splits.items()} == {"train": 6, "val": 2, "test": 3}
    assert "train 6, val 2, test 3" in task.describe()
    image, mask = task.splits["train"].pairs[4]
    assert image == str(tmp_path / "ade/images/training/4.bmp")
    assert mask == str(tmp_path / "ade/annotations/training/4.png")
    assert open_segmentation(tmp_path / "ade", reduce_zero_label=True).classes == ("0", "1", "2")
    (tmp_path / "ade/classes.txt").write_text("wall\nsky\ntree\nroad\nsea\n")
    assert open_segmentation(tmp_path / "ade").classes[4] == "sea"
    cut = open_segmentation(ade(tmp_path / "cut", {"training": 10}))
    assert {n: len(s) for n, s in cut.splits.items()} == {"train": 9, "val": 1}
    assert cut.notes == ("val is 1 images cut from train (seed 0)",)


def test_segmentation_modes(tmp_path: Path) -> None:
    split = open_segmentation(ade(tmp_path, COUNTS)).splits["train"]
    full = segmentation_transform(PLAIN, "full")
    pixels, masks = next(iter(segmentation_loader(split, full, batch_size=1)))
    assert (pixels.shape, masks.shape) == ((1, 3, 30, 40), (1, 30, 40))
    assert (pixels.dtype, masks.dtype) == (torch.float32, torch.int64)
    assert torch.equal((pixels[:, 0] * 25.5).round().long(), masks)
    expected = torch.from_numpy(np.array(Image.open(split.pairs[0][1])))
    assert torch.equal(masks[0], expected.long())
    evaluate = segmentation_transform(PLAIN, "eval", (15, 80))
    pixels, masks = next(iter(segmentation_loader(split, evaluate, batch_size=6)))
    assert (pixels.shape, masks.shape) == ((6, 3, 15, 80), (6, 15, 80))
    # Half the height and twice the width hit pixels of the 10-pixel tiles exactly.
    assert torch.equal(masks[0], expected[1::2].repeat_interleave(2, 1).long())
    with pytest.raises(SpecError, match="one by one; use batch_size=1"):
        segmentation_loader(split, full, batch_size=2)


def test_images_and_masks_move_together_in_training(tmp_path: Path) -> None:
    split = open_segmentation(ade(tmp_path, COUNTS)).splits["train"]
    train = segmentation_transform(PLAIN, "train", 32)
    batches = segmentation_loader(split, train, batch_size=3, shuffle=True, seed=1)
    first = epoch(batches, 0)
    assert first[0].shape == (6, 3, 32, 32)
    inside = first[1] != 255
    assert inside.any()
    assert not inside.all()
    agree = (first[0][:, 0] * 25.5).round().long() == first[1]
    # Two nearest-neighbour rules may pick other pixels along tile edges.
    assert agree[inside].float().mean() > 0.9
    assert (first[0][:, 0][~inside] == 0).all()
    again = segmentation_loader(split, train, batch_size=3, shuffle=True, seed=1, workers=1)
    assert all(torch.equal(a, b) for a, b in zip(epoch(again, 0), first, strict=True))
    assert not torch.equal(epoch(again, 1)[0], first[0])
    assert "random crop 32x32" in train.describe()
    flips = [train(*split.read(0))[1] for _ in range(8)]
    assert len({flip.numpy().tobytes() for flip in flips}) > 1


def test_zero_is_ignored_where_it_is_no_class(tmp_path: Path) -> None:
    plain = open_segmentation(ade(tmp_path, COUNTS)).splits["train"].read(0)[1]
    reduced = open_segmentation(tmp_path, reduce_zero_label=True).splits["train"].read(0)[1]
    assert torch.equal(reduced == 255, plain == 0)
    assert torch.equal(reduced[plain > 0], plain[plain > 0] - 1)
    file = tmp_path / "annotations/training/0.png"
    Image.fromarray(np.full((30, 40), 255, dtype=np.uint8)).save(file)
    assert (
        (open_segmentation(tmp_path, reduce_zero_label=True).splits["train"].read(0)[1])
        .eq(255)
        .all()
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_lies_over_its_image_as_it_is_shown(tmp_path: Path, orientation: int) -> None:
    """The red channel says the label, so that a wrong turn shows at once."""
    labels, exif, way = np.arange(24, dtype=np.uint8).reshape(4, 6), Image.Exif(), Image.Transpose
    exif[0x0112] = orientation
    turn = (
        *(way.FLIP_LEFT_RIGHT, way.ROTATE_180, way.FLIP_TOP_BOTTOM, way.TRANSPOSE),
        *(way.ROTATE_270, way.TRANSVERSE, way.ROTATE_90),
    )
    Image.fromarray(np.stack([labels * 10] * 3, -1)).save(tmp_path / "image.png", exif=exif)
    stored = Image.fromarray(labels)
    stored.save(tmp_path / "stored.png")
    shown = stored.transpose(turn[orientation - 2]) if orientation > 1 else stored
    shown.save(tmp_path / "shown.png")

    def read(mask: str) -> Any:
        return SegmentationSplit(((str(tmp_path / "image.png"), str(tmp_path / mask)),), 25).read(0)

    image, mask = read("shown.png")
    assert np.array_equal(np.asarray(image)[..., 0], 10 * mask.numpy())
    if orientation > 4:
        with pytest.raises(VPTError, match=r"is 6x4 as it is shown, but its mask is 4x6; .*EXIF"):
            read("stored.png")


def test_bad_masks(tmp_path: Path) -> None:
    (ade(tmp_path, COUNTS) / "classes.txt").write_text("a\nb\nc\nd\n")
    masks = tmp_path / "annotations/training"
    Image.new("L", (40, 30), 4).save(masks / "0.png")
    Image.new("L", (30, 40), 0).save(masks / "1.png")
    Image.new("RGB", (40, 30)).save(masks / "2.png")
    Image.fromarray(np.full((30, 40), 300, dtype=np.uint16)).save(masks / "3.png")
    (masks / "4.png").write_bytes(b"")
    split = open_segmentation(tmp_path).splits["train"]
    problems = check_masks(split)
    assert list(problems) == [0, 1, 2, 3, 4]
    for index, message in enumerate(
        (
            "the label 4, but there are 4 classes",
            "the image is 30x40 as it is shown, but its mask is 40x30",
            "one channel",
            "has 300 to 300",
        )
    ):
        assert message in problems[index]
    transform = segmentation_transform(PLAIN, "eval")
    with pytest.raises(VPTError, match="5 of 6 images cannot be used"):
        segmentation_loader(split, transform, batch_size=1)
    assert len(segmentation_loader(split, transform, batch_size=1, skip_broken=True)) == 1
    bad = split.subset([0])
    with pytest.raises(VPTError, match="none of 1 images can be used"):
        segmentation_loader(bad, transform, batch_size=1, skip_broken=True)
    (masks / "5.png").unlink()
    with pytest.raises(VPTError, match=r"training: 1 of 6 images have no mask: .*5\.png"):
        open_segmentation(tmp_path)
    with pytest.raises(VPTError, match="images/training and annotations/training not found"):
        open_segmentation(tmp_path / "images")
    for path in (tmp_path / "images/test").iterdir():
        path.unlink()
    save(masks / "5.png")
    with pytest.raises(VPTError, match="test: is empty"):
        open_segmentation(tmp_path)
    with pytest.raises(SpecError, match="segmentation_transform"):
        segmentation_transform(PLAIN, "test")
    for scale in ((2, 1), 2.0, (1, float("inf")), (float("nan"), 1), ("a", 2), (1, 2, 3), "12"):
        with pytest.raises(SpecError, match=r"scale=.*two rising numbers > 0, finite"):
            segmentation_transform(PLAIN, "train", scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names",
    [("train", "val", "Testing"), ("TRAINING", "valid", "test"), ("training", "dev", "Test")],
)
def test_segmentation_splits_by_other_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    ade(tmp_path, COUNTS)
    for kind in ("images", "annotations"):
        for old, new in zip(COUNTS, names, strict=True):
            (tmp_path / kind / old).rename(tmp_path / kind / "moved")
            (tmp_path / kind / "moved").rename(tmp_path / kind / new)
    task = open_segmentation(tmp_path)
    assert {n: len(s) for n, s in task.splits.items()} == {"train": 6, "val": 2, "test": 3}
    assert task.notes == ()
    # Masks and images need not agree on the spelling.
    (tmp_path / "annotations" / names[1]).rename(tmp_path / "annotations/Validation")
    (tmp_path / "images/extra").mkdir()
    (tmp_path / "annotations/other").mkdir()
    task = open_segmentation(tmp_path)
    assert len(task.splits["val"]) == 2
    assert task.notes == ("folders that are not used: images/extra, annotations/other",)
    (tmp_path / "annotations/Validation").rename(tmp_path / "annotations/other/masks")
    with pytest.raises(VPTError, match=rf"images/{names[1]} has no folder of masks"):
        open_segmentation(tmp_path)
    (tmp_path / "images/extra").rename(tmp_path / "images/validation")
    with pytest.raises(VPTError, match="both of which may be 'val'"):
        open_segmentation(tmp_path)


def test_masks_are_found_whatever_case_their_suffix_has(tmp_path: Path) -> None:
    masks = ade(tmp_path, COUNTS) / "annotations/training"
    (masks / "0.png").rename(masks / "0.PNG")
    assert open_segmentation(tmp_path).splits["train"].pairs[0][1] == str(masks / "0.PNG")
    save(masks / "0.png")
    with pytest.raises(VPTError, match="annotations/training: 1 files differ in their suffix"):
        open_segmentation(tmp_path)
    (masks / "0.png").unlink()
    save(tmp_path / "images/training/1.png")
    with pytest.raises(VPTError, match="images/training: 1 files differ in their suffix"):
        open_segmentation(tmp_path)
    (tmp_path / "images/training/1.png").rename(tmp_path / "images/training/1.heic")
    note = "1 files of training left out, no images by their suffix (.heic 1): 1.heic"
    assert open_segmentation(tmp_path).notes == (note,)
    (tmp_path / "images/test/0.bmp").unlink()
    (tmp_path / "images/test/0.bmp").symlink_to(tmp_path / "images/training/0.bmp")
    with pytest.raises(VPTError, match="1 images are in 'train' and in 'test'"):
        open_segmentation(tmp_path)


def relabel(folder: Path, labels: Mapping[int, int]) -> Path:
    """Write other labels into the masks of an `ade` folder."""
    for path in (folder / "annotations").rglob("*.png"):
        old = np.asarray(Image.open(path))
        new = sum((old == one) * other for one, other in labels.items())
        Image.fromarray(np.asarray(new, dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 255, 255, 255), "have one class, 0 beside 255, which is ignored; .*write 1 in the"),
        ((7, 7, 7, 7), "have one class, 7; segmentation needs two"),
        ((255, 255, 255, 255), "have no class beside 255"),
        ((0, 1, 0, 254), "have the labels 0, 1, 254, so that 252 of 255 classes never occur"),
        ((0, 85, 170, 255), "have the labels 0, 85, 170, so that 168 of 171 classes"),
    ],
)
def test_masks_of_other_values_than_classes(
    tmp_path: Path, labels: tuple[int, ...], message: str
) -> None:
    relabel(ade(tmp_path, COUNTS), dict(enumerate(labels)))
    with pytest.raises(VPTError, match=message):
        open_segmentation(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(255)))
    if len({*labels} - {255}) < 2:
        with pytest.raises(VPTError, match=message):
            open_segmentation(tmp_path)
    else:
        note = f"{255 - len({*labels} - {255})} of 255 classes are in no training mask: class "
        assert note in open_segmentation(tmp_path).notes[-1]


def test_classes_that_no_training_mask_has_are_told(tmp_path: Path) -> None:
    relabel(ade(tmp_path, COUNTS), {0: 0, 1: 2, 2: 3, 3: 3})
    note = "1 of 4 classes are in no training mask: 1"
    assert open_segmentation(tmp_path).notes == (note,)
    (tmp_path / "classes.txt").write_text("wall\nsky\ntree\nroad\nsea\n")
    note = "2 of 5 classes are in no training mask: sky, sea"
    assert open_segmentation(tmp_path).notes == (note,)
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(256)))
    with pytest.raises(VPTError, match="has 256 classes; segmentation takes 2 to 255"):
        open_segmentation(tmp_path)
    (tmp_path / "classes.txt").write_text("wall\n\nsky\n")
    with pytest.raises(VPTError, match=r"open_segmentation: .*classes\.txt: line 2 is empty"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize("value", [0, 1, 5, -1, float("nan"), "x", True])
def test_shares_of_masks_out_of_range(tmp_path: Path, value: Any) -> None:
    with pytest.raises(SpecError, match=r"open_segmentation\(val_fraction=.*> 0 and < 1"):
        open_segmentation(ade(tmp_path, {"training": 4}), val_fraction=value)


def test_wrong_options_of_a_loader_of_masks(tmp_path: Path) -> None:
    split = open_segmentation(ade(tmp_path, COUNTS)).splits["train"]
    transform = segmentation_transform(PLAIN, "eval")
    for options in ({"batch_size": 0}, {"batch_size": 1, "workers": -1}, {"batch_size": "a"},
                    {"batch_size": 1, "seed": "a"}):  # fmt: skip
        with pytest.raises(SpecError, match=r"segmentation_loader.*must be an integer >= "):
            segmentation_loader(split, transform, **options)  # type: ignore[arg-type]


# -------------------------------------------------------------------------- the paper's tasks


def test_the_papers_tasks() -> None:
    groups = Counter(task.group for task in TASKS)
    assert groups == {"FGVC": 5, "Natural": 7, "Specialized": 4, "Structured": 8}
    assert len({task.name for task in TASKS}) == 24
    vtab = [task for task in TASKS if task.group != "FGVC"]
    assert {(task.train, task.val) for task in vtab} == {(800, 200)}
    assert paper_task("vtab-sun397").classes == paper_task("SUN397").classes == 397
    assert paper_task("Stanford Dogs").test == 8580
    with pytest.raises(SpecError, match="no such task; the paper's are cub"):
        paper_task("imagenet")
    assert not any(task.lengths_verified for task in TASKS)


@pytest.mark.parametrize(("method", "entries", "total"), [("deep", 12, 1.18), ("shallow", 1, 1.04)])
def test_prompt_lengths_give_the_papers_totals(method: str, entries: int, total: float) -> None:
    """Table 1, "total params": one ViT-B/16 backbone, and prompts and head of each of 24 tasks."""
    backbone = 85_798_656
    added = sum(entries * getattr(task, method) * 768 + task.classes * 769 for task in TASKS)
    assert (backbone + added) / backbone == pytest.approx(total, abs=0.005)


@pytest.mark.slow
def test_real_tasks() -> None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("PEFT_VPT_DATA") or beside)
    if not (root / "vtab-mini").is_dir():
        pytest.skip("the folder of real images is not here (PEFT_VPT_DATA)")
    pattern = r"\| `vtab-mini/(\S+)`(?:, `(\w+)`)? \|[^|]*\|[^|]*\| (\d+) \| (\d+)/(\d+)/(\d+) \|"
    rows = re.findall(pattern, (root / "SOURCES.md").read_text())
    stated = {n: tuple(map(int, r[2:])) for r in rows for n in r[:2] if n}
    assert len(stated) == 6
    for name, (classes, *counts) in stated.items():
        task = open_task(root / "vtab-mini" / name)
        assert (len(task.classes), list(sizes(task).values())) == (classes, counts), name
        assert task.notes == (), name
        assert check_images(task) == [], name
    masks = open_segmentation(root / "nuclei_seg")
    assert {n: len(s) for n, s in masks.splits.items()} == {"train": 400, "val": 64, "test": 200}
    assert len(masks.classes) == 2
    assert check_masks(masks.splits["train"]) == {}


# ------------------------------------------------------------------- what is no image, or no text


def test_links_to_themselves_are_no_folders(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "val", {"a": 1, "b": 1})
    for place in (tmp_path, tmp_path / "train", tmp_path / "val"):
        (place / "loop").symlink_to(place / "loop")
    assert open_task(tmp_path).classes == ("a", "b")


def test_names_that_are_no_text_are_refused_when_a_task_is_opened(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 8, "caf\udce9": 8})
    with pytest.raises(VPTError, match=r"class 'caf\\udce9' cannot be written as UTF-8"):
        open_task(tmp_path)
    split = {"train": Split(("x", "y"), (0, 1))}
    for name, classes in (("t\udce9", ("a", "b")), ("t", (0, 1))):
        with pytest.raises(VPTError, match="cannot be written as UTF-8"):
            Task(name, classes, split)  # type: ignore[arg-type]
    with pytest.raises(VPTError, match="cannot be written as UTF-8"):
        SegmentationTask("t", ("a", "\udce9"), {})


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a": 8, "b": 8})
    for name in ("scandir", "listdir"):
        real = getattr(os, name)

        def refusing(path: Any, real: Any = real) -> Any:
            if str(path).endswith("/b"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, refusing)
            if name == "scandir":
                with pytest.raises(VPTError, match=r"b: cannot be read \(Permission denied\)"):
                    open_task(tmp_path)
            else:
                with pytest.raises(VPTError, match=r"call: .*b: cannot be read"):
                    folder_names(tmp_path / "b", "call")


def test_wide_grey_images_have_the_white_that_their_header_says(tmp_path: Path) -> None:
    values = np.array([[0, 200], [100, 50]], dtype=np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + values.astype(">u2").tobytes())
    assert np.asarray(load_image(tmp_path / "a.pgm")).max() == 1
    held = Split((), (0,), [Image.open(tmp_path / "a.pgm")])
    assert np.asarray(held.image(0)).max() == 1
    wide = np.array([[0, 65535], [257, 0]], dtype=np.uint16)
    picture = Image.fromarray(wide)
    picture.save(tmp_path / "plain.tif")
    picture.save(tmp_path / "inverted.tif", tiffinfo={262: 0})
    assert np.asarray(load_image(tmp_path / "plain.tif"))[..., 0].tolist() == [[0, 255], [1, 0]]
    inverted = np.asarray(load_image(tmp_path / "inverted.tif"))[..., 0]
    with Image.open(tmp_path / "inverted.tif") as file:
        assert file.tag_v2[262] == 0
    assert inverted.tolist() == [[255, 0], [254, 255]]
    held = Split((), (0,), [Image.open(tmp_path / "inverted.tif")])
    assert np.array_equal(np.asarray(held.image(0))[..., 0], inverted)
