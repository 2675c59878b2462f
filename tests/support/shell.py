"""Running a command of `peft-vpt` in this process."""

from __future__ import annotations

import re

import pytest

import peft_vpt
from peft_vpt.cli import main

Capture = pytest.CaptureFixture[str]
# What somebody who calls from Python writes, and nobody at a shell.
_PYTHON = re.compile(
    rf"\b({'|'.join(peft_vpt.__all__)}|load_backbone_with_adapter|build_backbone|open_task)\b"
    r"|\b[a-z_]+=|\b[a-z_]+\([^)]*\)\s*[:;.]"
)


def call(capsys: Capture, *arguments: object, code: int = 0) -> tuple[str, str]:
    """Run a command, check its exit code and the words of its errors; return stdout and stderr."""
    capsys.readouterr()
    given = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert given == code, (out, err)
    assert "Traceback" not in err
    for line in err.splitlines():
        if line.startswith(("error: ", "warning: ", "left out: ")):
            found = _PYTHON.search(line)
            assert found is None, f"{found} in the words of the shell: {line}"
    return out, err
