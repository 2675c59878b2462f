"""The support matrix: a sample against the page, and the whole walk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from matrix.page import render
from matrix.walk import walk

PAGE = Path(__file__).parent.parent / "docs" / "supported-models.md"
SAMPLE = {
    "timm": ["test_vit", "swin_tiny_patch4_window7_224", "maxvit_rmlp_pico_rw_256", "resnet18"],
    "transformers": ["ViTForImageClassification", "SwinForImageClassification", "DetrModel"],
}
REFUSED = {"timm": ["resnet18", "xcit_nano_12_p8_224"], "transformers": ["DetrModel"]}


@pytest.mark.parametrize("library", list(SAMPLE))
def test_a_sample_is_as_the_page_says(library: str) -> None:
    pytest.importorskip(library)
    page = PAGE.read_text()
    listed = page.partition(f"## {library}\n")[2].partition("### Names")[2].partition("\n## ")[0]
    results = list(walk(library, SAMPLE[library]))
    for result in results:
        assert result.status in ("supported", "refused"), result
        assert (f"`{result.name}`" in listed) == (result.status == "supported"), result.name
        assert (result.name in REFUSED[library]) == (result.status == "refused")
        assert result.reason if result.status == "refused" else result.checked
    assert f"`{results[0].name}`" in render(results, {library: "1"})


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_every_architecture_is_supported_or_refused_with_a_reason(library: str) -> None:
    pytest.importorskip(library)
    results = list(walk(library))
    assert [r.name for r in results if r.status == "error"] == []
    assert all(r.reason for r in results if r.status == "refused")
    counts = Counter(r.status for r in results)
    assert counts["supported"] > (550 if library == "timm" else 120), counts
