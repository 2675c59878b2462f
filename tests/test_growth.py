"""The library grows: an option or a location touches two files, and old adapters load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIELD = '    form: str = "auto"\n'
MODEL = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from zoo import build, image, logits
from peft_vpt import inject_prompts, load_task_adapter, save_task_adapter
here = Path(".")
"""


def package(tmp_path: Path, changes: dict[str, list[tuple[str, str]]]) -> Path:
    """Copy the package and change some of its files; a new one is a change of nothing."""
    shutil.copytree(ROOT / "peft_vpt", tmp_path / "peft_vpt")
    for name, pairs in changes.items():
        path = tmp_path / "peft_vpt" / name
        text = path.read_text() if path.exists() else ""
        for old, new in pairs:
            assert text.count(old) == 1 or not text, (name, old)
            text = text.replace(old, new) if text else new
        path.write_text(text)
    return tmp_path


def run(home: Path, folder: Path, script: str) -> str:
    script = MODEL.format(tests=str(ROOT / "tests")) + script
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_option_is_two_files_and_old_adapters_load(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    new = package(
        tmp_path / "new",
        {
            "spec.py": [
                ('    form: str = "auto"\n', '    form: str = "auto"\n    shade: float = 0.5\n')
            ],
            "inject.py": [
                ('    form: str = "auto",\n', '    form: str = "auto",\n    shade: float = 0.5,\n'),
                ("        form=form,\n", "        form=form,\n        shade=shade,\n"),
            ],
        },
    )
    save = """
model = inject_prompts(build("timm/cls"), 2, num_classes=3{option})
save_task_adapter(model, "{name}")
torch.save(logits(model(image())), "{name}/logits.pt")
"""
    load = """
model = load_task_adapter(build("timm/cls"), "{name}")
assert torch.equal(logits(model(image())), torch.load("{name}/logits.pt"))
print(getattr(model.prompts.spec, "shade", "no shade"))
"""
    run(ROOT, tmp_path, save.format(option="", name="old"))
    assert run(new, tmp_path, load.format(name="old")) == "0.5\n"
    run(new, tmp_path, save.format(option=", shade=0.25", name="shaded"))
    assert run(new, tmp_path, load.format(name="shaded")) == "0.25\n"
    refused = """
from peft_vpt.errors import AdapterError
try:
    load_task_adapter(build("timm/cls"), "shaded")
except AdapterError as error:
    print(error)
"""
    assert "shade" in run(ROOT, tmp_path, refused)


def test_a_location_is_its_entry_in_the_table_and_its_form(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    entry = 'LOCATIONS = {\n    "append": Location("tokens behind the others", "append.Append"),\n'
    form = "from .prepend import Prepend\nclass Append(Prepend):\n    pass\n"
    new = package(
        tmp_path / "new",
        {"spec.py": [("LOCATIONS = {\n", entry)], "forms/append.py": [("", form)]},
    )
    script = """
model = inject_prompts(build("timm/cls"), 2, location="append", num_classes=3)
save_task_adapter(model, "a")
other = load_task_adapter(build("timm/cls"), "a")
assert torch.equal(logits(other(image())), logits(model.eval()(image())))
print(other.prompts.spec.location, type(other.prompts.place).__name__)
"""
    assert run(new, tmp_path, script) == "append Append\n"
