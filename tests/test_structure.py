"""The shape of the package: layers, lightness, signatures, docstrings, documents that run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_vpt
from peft_vpt import PromptSpec

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_vpt"
# From the top down; a file may import from its own layer and from those below.
LAYERS = (
    ("cli", "__main__"),
    ("experiments",),
    ("training",),
    ("matrix",),
    ("data", "segmentation"),
    ("hub", "card", "card_code", "push_content", "match_head", "pretrained"),
    (
        "adapters",
        "adapter_install",
        "adapter_match",
        "adapter_fields",
        "adapter_file",
        "adapter_head",
        "adapter_metadata",
        "container",
        "preprocessing",
        "source",
    ),
    ("protocols",),
    ("inject", "fingerprint", "from_tokens"),
    ("undo",),
    ("decoder",),
    ("forms",),
    ("hosts", "initialise"),
    ("prompts",),
    ("pixels",),
    ("backbones",),
    ("spec",),
    ("errors", "randomness", "whole_file", "wording"),
)


def layer_of(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if module.split(".")[0] in names:
            return index
    raise AssertionError(f"{module} belongs to no layer of tests/test_structure.py")


def test_imports_go_down() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts
        if own == ("__init__",):
            continue
        tree = ast.parse(path.read_text())
        typing_only = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
                base = own[: len(own) - node.level]
                target = ".".join((*base, *(node.module or "").split("."))).strip(".")
                if target:
                    assert layer_of(target) >= layer_of(own[0]), f"{'.'.join(own)} imports {target}"


def test_import_is_light() -> None:
    script = """
import sys, peft_vpt
heavy = [n for n in ("torch", "timm", "transformers", "huggingface_hub") if sys.modules.get(n)]
assert not heavy, heavy
from peft_vpt import inject_prompts, save_task_adapter
heavy = [n for n in ("timm", "transformers", "huggingface_hub") if sys.modules.get(n)]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


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
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


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


def test_functions_and_files_stay_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 45, f"{path.name}: {node.name} has {lines} lines"
