"""The shape of the package: rooms, lightness, signatures, docstrings, documents that run."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import graphlib
import inspect
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import peft_vpt
from peft_vpt import PromptSpec
from peft_vpt.protocols.options import PROMPTED
from peft_vpt.spec import LOCATIONS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_vpt"
# Folders and loose modules from the top down; each imports from itself and from what stands below.
# fmt: off
ROOMS = (
    "__main__", "cli", "experiments", "training", "segmentation", "data", "pretrained", "hub",
    "adapter", "protocols", "inject", "forms", "rehearsal", "undo", "hosts", "prompts",
    "preprocessing", "backbones", "spec", "files", "randomness", "checks", "errors",
)
# fmt: on
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
NOUNS = "adapter backbones cli data experiments forms hub protocols segmentation training"
# Lines of code: without blank lines, comments and docstrings.
BODY, CODE, CLOSURE = 45, 13_500, 5_600
FILES, LOOSE, SINGLE = 115, 14, 20
# What is still to go on the way there; nothing at the end.
TO_GO = {"code": 2_330, "closure": 1_020}
UPWARD: set[tuple[str, str]] = set()


def name_of(path: Path) -> str:
    """Name a module below the package; a folder's `__init__` by the folder, the front page `""`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports(module: str) -> set[str]:
    """Return the modules that one imports anywhere, for types too."""
    home = module if module in FOLDERS else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = home if node.level == 1 else home.rpartition(".")[0]
            base = ".".join(filter(None, [above, node.module]))
            for name in node.names:
                inner = f"{base}.{name.name}".strip(".")
                found.add(inner if inner in MODULES else base)
    return found


GRAPH = {module: imports(module) for module in MODULES}


def code_lines(tree: ast.AST, text: str) -> int:
    quiet: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if ast.get_docstring(node) else None
            quiet.update(range(first.lineno, first.end_lineno + 1) if first else ())
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and number not in quiet for number, line in lines)


def code_of(files: Iterable[Path]) -> int:
    texts = [path.read_text() for path in files]
    return sum(code_lines(ast.parse(text), text) for text in texts)


def test_a_folder_is_a_noun_and_loose_modules_are_few() -> None:
    assert " ".join(sorted(FOLDERS)) == NOUNS
    assert not list(PACKAGE.glob("*/*/*.py"))
    assert len(list(PACKAGE.glob("*.py"))) <= LOOSE
    assert len(MODULES) <= FILES


def test_imports_go_down_and_in_no_circle() -> None:
    assert {module.split(".")[0] for module in MODULES} - {""} == set(ROOMS)
    # Its names are imported on first use.
    height = {room: place for place, room in enumerate(("", *ROOMS))}
    for module, targets in GRAPH.items():
        room = module.split(".")[0]
        up = {t for t in targets if height[t.split(".")[0]] < height[room]}
        assert not up, f"{module} imports {up}"
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_a_module_with_one_importer_lives_in_it() -> None:
    importers = Counter(target for targets in GRAPH.values() for target in targets)
    alone = [m for m in MODULES if importers[m] == 1 and m not in FOLDERS]
    assert len(alone) <= SINGLE, alone


def test_functions_are_short_and_the_package_is_small() -> None:
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= BODY, f"{module}: {node.name} has {lines} lines"
    assert code_of(PACKAGE.rglob("*.py")) <= CODE + TO_GO["code"]


def test_nobody_compares_the_name_of_a_location_or_protocol() -> None:
    """Of those that are no other word too; where the paper's columns are told apart, it is data."""
    names = {*LOCATIONS, *PROMPTED, "sidetune"}
    for module in MODULES.keys() - {"spec", "protocols.options"}:
        if module.partition(".")[0] in ROOMS[ROOMS.index("training") + 1 :]:
            compared = [n for n in ast.walk(MODULES[module]) if isinstance(n, ast.Compare)]
            words = {n.value for c in compared for n in ast.walk(c) if isinstance(n, ast.Constant)}
            assert not words & names, module


def test_the_wheel_holds_every_file() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packed = config["options.package_data"]["peft_vpt"].split()
    named = {path for pattern in packed for path in PACKAGE.glob(pattern)}
    assert named == {p for p in PACKAGE.rglob("*.*") if p.suffix not in (".py", ".pyc")}


def test_the_first_page_needs_a_small_part(tmp_path: Path) -> None:
    """Count what one use of inject, save and load imports; `info` needs no compiler."""
    pytest.importorskip("timm")
    script = f"""
import sys
sys.path.insert(0, "tests")
from zoo import build
from peft_vpt import inject_prompts, load_task_adapter, save_task_adapter
model = inject_prompts(build("timm/cls"), 2, num_classes=3)
save_task_adapter(model, {str(tmp_path)!r})
load_task_adapter(model, {str(tmp_path)!r})
print(*(m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "peft_vpt"))
"""
    assert code_of(map(Path, run(script).split())) <= CLOSURE + TO_GO["closure"]
    script = f"""
import sys
from peft_vpt.cli import main
assert main(["info", {str(tmp_path)!r}]) == 0
heavy = {{"torch._dynamo", "timm", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    run(script)


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    script = """
import sys, peft_vpt
heavy = [n for n in ("torch", "timm", "transformers", "huggingface_hub") if sys.modules.get(n)]
assert not heavy, heavy
from peft_vpt import inject_prompts, save_task_adapter
heavy = [n for n in ("timm", "transformers", "huggingface_hub") if sys.modules.get(n)]
assert not heavy, heavy
"""
    run(script)


@pytest.mark.parametrize(
    ("absent", "name"), [("timm", "transformers/vit"), ("transformers", "timm/cls")]
)
def test_one_library_works_without_the_other(absent: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip(name.partition("/")[0])
    script = f"""
import sys
sys.modules[{absent!r}] = None
sys.path.insert(0, "tests")
from zoo import build, image
from peft_vpt import inject_prompts, load_task_adapter, save_task_adapter
model = inject_prompts(build({name!r}), 2, num_classes=3)
model(image())
save_task_adapter(model, {str(tmp_path)!r})
load_task_adapter(build({name!r}), {str(tmp_path)!r})
"""
    run(script)


def test_all_names_resolve_and_are_documented() -> None:
    assert list(peft_vpt.__all__) == sorted(peft_vpt.__all__)
    for name in peft_vpt.__all__:
        thing = getattr(peft_vpt, name)
        text = inspect.getdoc(thing) or ""
        assert text, name
        if inspect.isfunction(thing):
            for parameter in inspect.signature(thing).parameters:
                if len(inspect.signature(thing).parameters) > 1:
                    assert re.search(rf"\b{parameter}:", text), f"{name}: {parameter}"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = peft_vpt.nonsense


def test_signature_and_spec_agree() -> None:
    parameters = inspect.signature(peft_vpt.inject_prompts).parameters
    options = {n: p.default for n, p in parameters.items()}
    for name in ("model", "num_classes", "generator"):
        options.pop(name)
    assert options == {f.name: f.default for f in dataclasses.fields(PromptSpec)}
    assert [p for p, v in parameters.items() if v.kind is v.POSITIONAL_OR_KEYWORD] == [
        "model",
        "length",
    ]


DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_documents_run(document: Path, tmp_path: Path) -> None:
    """Run a document's python blocks in order, as one script, offline."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    if not blocks:
        return
    source = "import torch; torch.set_num_threads(1)\n" + "\n".join(blocks)
    script = tmp_path / "document.py"
    script.write_text(source)
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_docstring_examples() -> None:
    import doctest
    import importlib

    pytest.importorskip("timm")
    for name in ("peft_vpt", "peft_vpt.inject"):
        module = importlib.import_module(name)
        assert doctest.testmod(module).failed == 0
