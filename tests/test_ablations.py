"""The paper's ablations as values: rows, runs, pages, ensembles; how pretrainings are pooled."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import draw_task
from torch import Tensor, nn
from torch.nn import functional
from zoo import build, image, perturb

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


from peft_vpt import apply_protocol, count_parameters, inject_prompts, load_task_adapter
from peft_vpt.backbones.find import says_its_size
from peft_vpt.cli import main
from peft_vpt.data import eval_transform, loader, open_task
from peft_vpt.errors import SpecError, VPTError
from peft_vpt.experiments import embeddings
from peft_vpt.experiments import run as runs
from peft_vpt.experiments.backbones import facts_of, pooled, refusal, usual_pool
from peft_vpt.experiments.compare import Plan, compare
from peft_vpt.experiments.ensemble import ensemble_record
from peft_vpt.experiments.records import config_hash, is_ensemble, read_records, select
from peft_vpt.experiments.report import like, newest, placed, write_ablation, write_report
from peft_vpt.experiments.run import Pixels, Run, reduced
from peft_vpt.experiments.sums import image_sums, text_sum
from peft_vpt.experiments.variants import (
    ABLATIONS,
    DECAYS,
    MLP_LAYERS,
    REDUCTIONS,
    Facts,
    Variant,
    distinct,
    rows_of,
    with_fraction,
    with_lengths,
)
from peft_vpt.training import classification_metrics, paper_grid, preset

IMAGES = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
          "crop": None}  # fmt: skip
VIT_B = Facts("tokens", 12, 197, 1, True, 224, 47)
SWIN_B = Facts("windows", 24, None, 0, False, 224, 47)
RESNET = Facts("convolutions", 0, None, 0, False, 224, 47)
DEEP = Variant("vpt-deep", "vpt-deep", {"length": 2})


def labels(name: str, facts: Facts = VIT_B) -> list[str]:
    return [variant.label for variant in distinct(rows_of(name, facts))]


# Rows


def vit12() -> nn.Module:
    return build("timm/cls", torch.float32, depth=12)


def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer(
        img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=3
    ).eval()


def resnet() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tokens": vit12, "windows": swin, "convolutions": resnet,
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_every_row_of_every_ablation_is_taken_by_its_kind_of_backbone(kind: str) -> None:
    facts = facts_of(MODELS[kind](), 32, 4)
    assert facts.kind == kind
    seen = set()
    for name, ablation in ABLATIONS.items():
        if kind not in ablation.kinds:
            with pytest.raises(SpecError, match=ablation.paper):
                rows_of(name, facts)
            continue
        for variant in with_lengths(distinct(rows_of(name, facts)), [3]):
            options = {**variant.options, "length": 0}
            settings = (variant.protocol, json.dumps(options, sort_keys=True))
            if settings not in seen and variant.size is None:
                model = says_its_size(MODELS[kind](), (32, 32))
                reason = str(refusal(variant, model, 4, (32, 32), 64) or "")
                # The network beside the backbone pools three times, down from a quarter.
                assert bool(reason) == (variant.protocol == "sidetune"), (variant, reason)
                assert "no forward of an image of 32x32" in reason or not reason
            seen.add(settings)
    assert len(seen) > 10


def test_rows_hold_the_numbers_of_the_paper() -> None:
    assert labels("length")[:6] == [f"vpt-deep p={p}" for p in (1, 5, 10, 50, 100, 200)]
    assert labels("length", SWIN_B)[:4] == [f"vpt-deep p={p}" for p in (1, 5, 10, 50)]
    assert labels("pad", RESNET) == [f"vpt pad p={p}" for p in (1, 3, 5, 7, 9, 11)]
    assert list(DECAYS) == paper_grid("linear")["weight_decay"]
    assert (MLP_LAYERS, REDUCTIONS) == ((2, 3, 5, 9), (8, 64, 256))
    assert labels("partial") == ["partial-1", "partial-2", "partial-4"]
    assert labels("methods")[:3] == ["full", "linear", "partial-1"]
    assert "vpt-deep" not in labels("methods", RESNET)
    # Table 11: 380 prompts make a sequence at 224 pixels as long as that at 384.
    assert labels("size")[-1] == "vpt-deep 224 px p=380"
    assert {v.size for v in distinct(rows_of("size", VIT_B))} == {None, 384}
    # Figure 13: as many prompts as classes, 200 at most.
    many = dataclasses.replace(VIT_B, classes=397)
    lengths = [[r.options["length"] for r in rows_of("init", f)] for f in (VIT_B, many)]
    assert lengths == [[47] * 6, [200] * 6]
    assert [r.fraction for r in rows_of("fraction", VIT_B)][::6] == [0.1, 0.2, 0.4, 0.8]
    with pytest.raises(SpecError, match="must be one of methods"):
        rows_of("colour", VIT_B)


def test_depth_goes_up_from_the_image_and_down_from_the_head() -> None:
    rows = rows_of("depth", VIT_B)
    found = {
        series: [(r.place, r.options["layers"]) for r in rows if r.series == series]
        for series in ("bottom-up", "top-down")
    }
    every = list(range(12))
    assert found["bottom-up"] == [(n, every[:n]) for n in (1, 3, 6, 9, 12)]
    assert found["top-down"] == [(n, every[-n:]) for n in (1, 3, 6, 9, 12)]
    # All blocks stand on both lines and are trained once.
    assert len(distinct(rows)) == len(rows) - 1
    shares = [[r.place for r in rows_of("depth", facts)][::2]
              for facts in (SWIN_B, dataclasses.replace(VIT_B, depth=3))]  # fmt: skip
    assert shares == [[2, 6, 12, 18, 24], [1, 2, 3]]


@pytest.mark.parametrize(("name", "expected"), [
    ("depth", {"vpt-deep blocks 1-3": 3 * 3, "vpt-deep blocks 10-12": 3 * 3,
               "vpt-deep blocks 1-12": 12 * 3}),
    ("sharing", {"vpt-deep sharing none": 12 * 3, "vpt-deep sharing inter": 3,
                 "vpt-deep sharing intra": 12, "vpt-deep sharing all": 1, "vpt-deep p=1": 12,
                 "linear": 0}),
    ("location", {"vpt-deep add": 12 * 17, "vpt-shallow add": 17, "vpt-shallow prepend": 3}),
    ("control", {"deep, fixed": 0, "shallow, fixed": 0, "shallow, learned p=1": 1, "cls": 1}),
])  # fmt: skip
def test_rows_train_as_many_vectors_as_they_say(name: str, expected: dict[str, int]) -> None:
    facts = facts_of(vit12(), 32, 4)
    variants = {v.label: v for v in with_lengths(distinct(rows_of(name, facts)), [3])}
    for label, vectors in expected.items():
        variant, model = variants[label], vit12()
        apply_protocol(model, variant.protocol, num_classes=4, **variant.options)
        assert count_parameters(model).trainable == 32 * vectors + 4 * 33, label


def test_facts_and_refusals() -> None:
    facts = facts_of(build("timm/registers", torch.float32), 32, 4)
    assert (facts.tokens, facts.prefix, facts.depth, facts.has_cls) == (21, 5, 3, True)
    assert facts.tokens_at(48) == 5 + 36
    with pytest.raises(VPTError, match="no whole number"):
        facts.tokens_at(44)
    with pytest.raises(VPTError, match="no whole number"):
        SWIN_B.tokens_at(384)
    with pytest.raises(VPTError, match="does not take images of 40 x 40"):
        facts_of(vit12(), 40, 4)
    assert facts_of(build("transformers/vit", torch.float32), 32, 4).tokens == 17
    assert labels("pooling", facts_of(build("timm/gap", torch.float32), 32, 4))[0] == (
        "vpt-deep image pooling"
    )
    few = Variant("partial-4", "partial-4")
    assert "partial-4" in str(refusal(few, build("timm/cls", torch.float32), 4, (32, 32), 64))
    enough = Variant("partial-3", "partial-3")
    assert not refusal(enough, build("timm/cls", torch.float32), 4, (32, 32), 64)


def test_lengths_and_shares_are_given_to_rows_that_have_none() -> None:
    rows = (Variant("linear", "linear"), DEEP, Variant("vpt-shallow", "vpt-shallow"),
            Variant("prompt-fixed", "prompt-fixed"))  # fmt: skip
    one = with_lengths(rows, [7])
    assert [v.options for v in one] == [{}, {"length": 2}, {"length": 7}, {"length": 7}]
    several = with_lengths(rows, [1, 5])
    assert [len(v.choices) for v in several] == [1, 1, 2, 2]
    share = with_fraction(rows, 0.25)
    assert [v.label for v in share][:2] == ["linear 25 %", "vpt-deep 25 %"]
    assert {(v.fraction, v.final) for v in share} == {(0.25, "train")}
    assert with_fraction(rows, 1.0) == rows
    with pytest.raises(SpecError, match="no lengths"):
        with_lengths(rows, [])
    for wrong in ({"fraction": 0.0}, {"fraction": 1.5}, {"final": "val"}, {"choices": ()}):
        with pytest.raises(SpecError, match="Variant"):
            Variant("a", "linear", **wrong)
    with pytest.raises(SpecError, match="one of"):
        Variant("a", "lora")
    with pytest.raises(SpecError, match="stands there twice"):
        Plan(variants=(DEEP, DEEP)).rows()


# Runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three levels of brightness under noise."""
    levels = {"dark": 40, "grey": 110, "light": 190}
    return draw_task(tmp_path / "task", (10, 4, 4), levels, (36, 36))


def run(folder: Path, output: Path, variants: Any, **changes: Any) -> Any:
    given = {"epochs": 1, "factors": (1.0,), "seeds": (0,), "changes": {"batch_size": 8}}
    options = {k: changes.pop(k) for k in ("reopen", "resize") if k in changes}
    return compare(
        open_task(folder), eval_transform(IMAGES), partial(build, "timm/cls", torch.float32),
        backbone="tiny", folder=output, plan=Plan(variants=variants, **(given | changes)),
        progress=False, **options,
    )  # fmt: skip


def test_a_protocol_has_one_key_as_it_is_and_as_a_variant(folder: Path, tmp_path: Path) -> None:
    records = run(
        folder, tmp_path / "out", (), protocols=("linear", "vpt-deep"),
        options={"vpt-deep": {"length": 2}},
    )  # fmt: skip
    for record in records[2:]:
        options = {"length": 2} if record["protocol"] == "vpt-deep" else {}
        recipe = preset(record["protocol"], epochs=1, batch_size=8)
        by_hand = {"recipe": recipe.to_dict(), "options": options, "preprocessing": IMAGES,
                   "train": "trainval", "weights": None,
                   "classes": text_sum(open_task(folder).classes),
                   "images": image_sums(open_task(folder), ("train", "val", "test"))}  # fmt: skip
        assert config_hash(record["config"]) == config_hash(by_hand)
    assert [r["protocol"] for r in records[2:]] == ["linear", "vpt-deep"]
    assert (tmp_path / "out" / records[3]["adapter"] / "adapter.safetensors").exists()
    # The same settings as a variant are the same run.
    assert run(folder, tmp_path / "out", (DEEP,)) == records[3:]


def test_val_chooses_among_lengths_and_rates_together(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = preset("vpt-deep").base_lr
    # On val; of the two that are equal the smaller rate is taken.
    tried = [(n, factor) for n in (1, 4, 9) for factor in (0.1, 1.0)]
    top1 = dict(zip(tried, (0.3, 0.5, 0.7, 0.7, 0.2, 0.6), strict=True))
    seen: list[tuple[Any, ...]] = []

    def scripted(run: Run) -> Any:
        at = run.variant.options["length"], round(run.recipe.base_lr / rate, 6)
        seen.append((*at, run.recipe.seed, run.train, run.test))
        return run.record({"top1": top1[at]})

    monkeypatch.setattr(runs, "run_once", scripted)
    row = Variant("deep", "vpt-deep", {"dropout": 0.0}, choices=[{"length": n} for n in (1, 4, 9)])
    records = run(folder, tmp_path / "out", (row,), factors=(1.0, 0.1), seeds=(3, 4))
    assert seen[:6] == [(*at, 3, "train", "val") for at in tried]
    assert seen[6:] == [(4, 0.1, seed, "trainval", "test") for seed in (3, 4)]
    assert all(r["config"]["options"]["dropout"] == 0.0 for r in records)
    assert run(folder, tmp_path / "out", (row,), factors=(1.0, 0.1), seeds=(3, 4)) == records
    assert len(seen) == 8


def test_a_share_of_the_images_trains_on_that_share_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    once = runs.run_once

    def counted(run: Run) -> Any:
        seen.append((run.train, *(len(run.pixels.split(part)) for part in (run.train, run.test))))
        return once(run)

    monkeypatch.setattr(runs, "run_once", counted)
    rows = with_fraction((DEEP,), 0.3)
    records = run(folder, tmp_path / "out", rows, factors=(0.1, 1.0))
    # 9 of 30 training images; val and test are whole.
    assert seen == [("train", 9, 12), ("train", 9, 12), ("train", 9, 12)]
    assert {(r["protocol"], r["config"]["fraction"]) for r in records} == {("vpt-deep 30 %", 0.3)}
    assert run(folder, tmp_path / "out", rows, factors=(0.1, 1.0)) == records
    task = open_task(folder)
    assert reduced(task, 0.3).splits["train"] == open_task(folder, fraction=0.3).splits["train"]
    assert reduced(task, 1.0) is task
    opened: list[float] = []

    def reopen(fraction: float) -> Any:
        opened.append(fraction)
        return open_task(folder, fraction=fraction)

    assert len(seen) == 3
    assert run(folder, tmp_path / "two", rows, reopen=reopen)[0]["config"]["fraction"] == 0.3
    assert opened == [0.3]


def test_smaller_shares_use_the_decoded_val_and_test_of_the_whole(folder: Path) -> None:
    task, transform = open_task(folder), eval_transform(IMAGES)
    whole = Pixels(task, transform)
    part = Pixels(reduced(task, 0.3), transform, whole)
    assert part.split("test") is whole.split("test")
    assert part.split("val") is whole.split("val")
    assert len(part.split("train")) == 9
    other = dataclasses.replace(task, splits={**task.splits, "val": task.splits["val"].subset([0])})
    assert len(Pixels(other, transform, whole).split("val")) == 1


def test_another_size_has_its_own_backbone_and_images(folder: Path, tmp_path: Path) -> None:
    made: list[int] = []

    def resize(edge: int) -> tuple[Any, Any]:
        made.append(edge)
        model = partial(build, "timm/cls", torch.float32, img_size=edge)
        return eval_transform(IMAGES, edge), model

    larger = dataclasses.replace(DEEP, label="vpt-deep 48 px", size=48)
    records = run(folder, tmp_path / "out", (DEEP, larger), resize=resize)
    assert made == [48]
    assert [r["config"]["preprocessing"]["size"] for r in records] == [[32, 32], [48, 48]]
    with pytest.raises(SpecError, match="needs resize"):
        run(folder, tmp_path / "two", (DEEP, larger))
    assert not (tmp_path / "two").exists()


def test_class_prototypes_are_the_first_values_of_prompts(folder: Path, tmp_path: Path) -> None:
    options = {"length": 3, "init": "prototypes"}
    rows = (Variant("fixed", "prompt-fixed", options), Variant("learned", "vpt-deep", options))
    records = run(folder, tmp_path / "out", rows)
    assert [r["config"]["options"]["init"] for r in records] == ["prototypes"] * 2
    bare = partial(build, "timm/cls", torch.float32)
    pixels = Pixels(open_task(folder), eval_transform(IMAGES))
    batches = loader(pixels.split("trainval"), None, batch_size=100)
    found, classes = embeddings.features(bare(), batches)
    means = torch.stack([found[classes == c].mean(dim=0) for c in range(3)])
    fixed, learned = (
        load_task_adapter(bare(), tmp_path / "out" / record["adapter"]) for record in records
    )
    for block in range(3):
        # Sums in double precision there, in single here.
        torch.testing.assert_close(fixed.prompts.stored(block), means, rtol=1e-5, atol=1e-5)
        change = (learned.prompts.stored(block) - means).abs().max()
        assert 0 < change < 0.5


def test_convnets_get_a_border_for_the_images_in_use(folder: Path, tmp_path: Path) -> None:
    task = open_task(folder)
    row = Variant("pad", "vpt-shallow", {"location": "pad", "length": 2})
    plan = Plan(variants=(row,), epochs=1, factors=(1.0,), seeds=(0, 1), ensemble=True)
    # The model says 160 pixels of itself, and takes any size.
    records = compare(
        task, eval_transform(IMAGES), resnet, backbone="resnet", folder=tmp_path, plan=plan,
        progress=False,
    )  # fmt: skip
    border = 3 * (36**2 - 32**2)
    assert records[0]["trainable"] == border + 3 * (resnet().num_features + 1)
    assert [r["protocol"] for r in records] == ["pad", "pad", "pad ensemble"]


# Ensembles and embeddings


def by_hand(folder: Path, adapters: list[Path]) -> dict[str, float]:
    """Mean probabilities of each adapter by itself."""
    pixels = Pixels(open_task(folder), eval_transform(IMAGES)).split("test")
    shares = []
    for path in adapters:
        model = load_task_adapter(build("timm/cls", torch.float32), path).eval()
        with torch.no_grad():
            shares.append(model(pixels.images).softmax(dim=1))
    mean = torch.stack(shares).mean(dim=0)
    return classification_metrics(mean.log(), torch.tensor(pixels.labels))


def test_an_ensemble_of_the_seeds_is_their_mean_probability(folder: Path, tmp_path: Path) -> None:
    rows = (Variant("linear", "linear"), Variant("bias", "bias"), Variant("full", "full"),
            Variant("mlp-2", "mlp-2"), Variant("adapter", "adapter"), DEEP)  # fmt: skip
    records = run(folder, tmp_path / "out", rows, seeds=(0, 1), ensemble=True)
    found = {r["protocol"]: r for r in records if is_ensemble(r)}
    assert set(found) == {f"{row.label} ensemble" for row in rows}
    for row in rows:
        metrics = found[f"{row.label} ensemble"]["metrics"]
        members = select(records, protocol=row.label)
        expected = by_hand(folder, [tmp_path / "out" / r["adapter"] for r in members])
        # float32 logits of order 1, in another order of sums.
        assert {k: metrics[k] for k in expected} == pytest.approx(expected, abs=1e-5)
        alone = [r["metrics"]["top1"] for r in members]
        assert metrics["members_best_top1"] == max(alone)
        assert metrics["members_mean_top1"] == pytest.approx(sum(alone) / 2)
    assert found["vpt-deep ensemble"]["config"]["members"] == [0, 1]
    # Once more, nothing is done; other seeds are another ensemble.
    assert run(folder, tmp_path / "out", rows, seeds=(0, 1), ensemble=True) == records
    more = run(folder, tmp_path / "out", (DEEP,), seeds=(0, 1, 2), ensemble=True)
    assert [r["config"]["members"] for r in more if is_ensemble(r)] == [[0, 1, 2]]


def test_adapters_of_other_runs_are_no_members(folder: Path, tmp_path: Path) -> None:
    records = run(folder, tmp_path / "out", (DEEP,), seeds=(0, 1))
    pixels = Pixels(open_task(folder), eval_transform(IMAGES))
    make = partial(ensemble_record, records, pixels, partial(build, "timm/cls", torch.float32))
    made = make(tmp_path / "out")
    # Runs of other settings put their adapters beside these.
    other = run(folder, tmp_path / "out", (DEEP,), seeds=(0, 1), epochs=2)
    assert len({r["adapter"] for r in [*records, *other]}) == 4
    assert make(tmp_path / "out")["metrics"] == made["metrics"]
    # Older records do not name them.
    for record in records:
        old = tmp_path / "old" / "task" / f"vpt-deep-{record['seed']}"
        shutil.copytree(tmp_path / "out" / record["adapter"], old)
    nameless = [{k: v for k, v in r.items() if k != "adapter"} for r in records]
    bare = partial(build, "timm/cls", torch.float32)
    found = ensemble_record(nameless, pixels, bare, tmp_path / "old")
    assert found["metrics"] == made["metrics"]
    mine, theirs = (tmp_path / "out" / r[0]["adapter"] for r in (records, other))
    shutil.copytree(theirs, mine, dirs_exist_ok=True)
    with pytest.raises(VPTError, match="of another run"):
        make(tmp_path / "out")
    with pytest.raises(VPTError, match=r"is not at .*run the comparison again"):
        make(tmp_path)


def test_embeddings_are_drawn_and_shown(folder: Path, tmp_path: Path) -> None:
    rows = (Variant("linear", "linear"), DEEP)
    records = run(folder, tmp_path / "out", rows, tsne=True)
    drawn = {p.name for p in (tmp_path / "out").glob("tsne-*")}
    assert len(drawn) == 4
    page = write_report(records, tmp_path / "out", title="T", intro="I").read_text()
    shown = dict(re.findall(r"!\[t-SNE, ([\w-]+) on task\]\((tsne-task-.*\.svg)\)", page))
    assert set(shown) == {"linear", "vpt-deep"}
    assert set(shown.values()) < drawn
    # Other runs into the same folder do not stand beside figures of these.
    others = run(folder, tmp_path / "out", rows, epochs=3)
    assert "t-SNE" not in write_report(others, tmp_path / "out", title="T", intro="I").read_text()


# Pages


def test_pages_of_ablations_are_made_from_records_and_the_table(
    folder: Path, tmp_path: Path
) -> None:
    facts = facts_of(build("timm/cls", torch.float32), 32, 3)
    rows = with_lengths(rows_of("depth", facts), [2])
    records = run(folder, tmp_path / "out", distinct(rows), seeds=(0, 1))
    assert {r["protocol"] for r in records} == {
        f"vpt-deep blocks {span}" for span in ("1-1", "1-2", "1-3", "2-3", "3-3")
    }
    at_rows = placed(records, rows)
    # The row of all blocks stands on both lines.
    assert len(at_rows) == len(records) + 2
    assert {(r["series"], r["place"]) for r in at_rows if "1-3" in r["protocol"]} == {
        ("bottom-up", 3), ("top-down", 3),
    }  # fmt: skip
    texts = []
    for name in ("one", "two"):
        page = write_ablation(
            records, rows, ABLATIONS["depth"], tmp_path / name, name="depth", title="T", intro="I"
        )
        texts.append((page.read_text(), page.with_suffix(".svg").read_bytes()))
    assert texts[0] == texts[1]
    assert texts[0][0].count("| vpt-deep blocks ") == 5
    assert "Figures 7 and 14" in texts[0][0]
    with pytest.raises(VPTError, match="no record"):
        write_ablation([], rows, ABLATIONS["depth"], tmp_path, name="x", title="T", intro="I")


def test_rates_are_shown_on_val_alone(folder: Path, tmp_path: Path) -> None:
    rows = rows_of("rates", dataclasses.replace(VIT_B, depth=3))
    rows = [r for r in rows if r.place in (0, 0.01) and r.series == "linear"]
    records = run(folder, tmp_path, distinct(rows), factors=(0.1, 1.0), final=False)
    assert {r["split"] for r in records} == {"val"}
    assert {r["config"]["recipe"]["weight_decay"] for r in records} == {0.0, 0.01}
    page = write_ablation(
        records, rows, ABLATIONS["rates"], tmp_path, name="rates", title="T", intro="I"
    )
    assert page.read_text().count("| linear wd=") == 2
    assert (tmp_path / "rates-1.svg").exists()


def test_pages_tell_ensembles_and_other_settings_apart(folder: Path, tmp_path: Path) -> None:
    rows = (Variant("linear", "linear"), DEEP)
    first = run(folder, tmp_path / "out", rows, seeds=(0, 1), ensemble=True)
    page = write_report(first, tmp_path / "out", title="T", intro="I").read_text()
    tests, together = page.split("## Tests")[1].split("## Ensembles of the seeds")
    assert "ensemble" not in tests
    assert together.count("linear ensemble") == 1
    # A row that has run twice on another task counts once, and never ends a page.
    twice = [*first, *(r | {"metrics": r["metrics"] | {"top1": 0.125}} for r in first)]
    text = write_report(twice, tmp_path / "out", title="T", intro="I").read_text()
    assert f"the last one counts ({len(first) - 2} left out)" in text
    assert text.count("**12.50**") >= 2
    assert len(newest([r | {"split": "val"} for r in twice])[0]) == len(twice)
    with pytest.raises(VPTError, match="choose one backbone"):
        write_report(
            [*first, *(r | {"backbone": "b"} for r in first)], tmp_path, title="", intro=""
        )
    # Other epochs are other runs, and a page holds those of its plan alone.
    second = run(folder, tmp_path / "out", rows, seeds=(0, 1), epochs=2)
    assert {r["config"]["recipe"]["epochs"] for r in second} == {2}
    assert [r["protocol"] for r in second] == ["linear", "linear", "vpt-deep", "vpt-deep"]
    # Further protocols come beside those that are there; rows of ablations do not.
    run(folder, tmp_path / "out", (dataclasses.replace(DEEP, label="vpt-deep blocks 1-3"),))
    beside = run(folder, tmp_path / "out", (), protocols=("bias",))
    assert {r["protocol"].removesuffix(" ensemble") for r in beside} == {
        "majority class", "16x16 pixels", "bias", "linear", "vpt-deep",
    }  # fmt: skip
    other = [r | {"task": "second"} for r in first]
    assert like(first, [*other, *second, *(r | {"task": "third"} for r in second)]) == first + other
    # Another preset, or other weights, are another comparison; other images are another task.
    apart = [r | {"preset": "paper"} for r in other]
    apart += [r | {"config": r["config"] | {"weights": "other"}} for r in other]
    images = [r | {"config": r["config"] | {"images": {}}} for r in other]
    assert like(first, [*apart, *images]) == first + images


# The command line


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_the_command_runs_ablations_and_shares(
    folder: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["compare", "--data", str(folder), "--model", "test_vit.r160_in1k", "--size", "48",
             "--weights", str(weights), "--output", str(output), "--epochs", "1", "--factors", "1",
             "--seeds", "1"]  # fmt: skip
    assert main([*words, "--ablation", "pooling", "--lengths", "1,2"]) == 0
    out, err = capsys.readouterr()
    assert "# Figure 8: pooling, task" in out
    assert "the head reads" in err
    records = read_records(output / "records.jsonl")
    assert len(records) == 4 * 3
    assert {r["config"]["options"]["pooling"] for r in records} == {
        "cls", "image", "prompt", "global",
    }  # fmt: skip
    assert (output / "pooling-task.svg").exists()
    fewer = ["--protocols", "linear", "--fraction", "0.5", "--pool", "avg"]
    assert main([*words, *fewer]) == 0
    assert "linear 50 %" in (output / "report-50.md").read_text()
    last = read_records(output / "records.jsonl")[-1]
    assert last["backbone"] == "test_vit.r160_in1k (avg)"
    assert last["config"]["fraction"] == 0.5
    capsys.readouterr()
    for wrong in (["--ablation", "colour"], ["--ablation", "length", "--protocols", "linear"],
                  ["--ablation", "fraction", "--fraction", "0.5"], ["--lengths", "0"]):  # fmt: skip
        assert main([*words, *wrong]) == 2
    assert main([*words, "--ablation", "pad"]) == 1
    assert "models without transformer blocks only" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*rows or columns there do nothing")
def test_the_command_names_ablations_and_rows_that_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from safetensors.torch import save_file

    assert main(["compare", "--ablation", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and ablation.paper in listed for name, ablation in ABLATIONS.items())
    torch.manual_seed(0)
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "w.safetensors")
    assert main(["compare", "--data", str(folder), "--model", "test_convnext.r160_in1k", "--size",
                 "32", "--weights", str(tmp_path / "w.safetensors"), "--output",
                 str(tmp_path / "out"), "--epochs", "1", "--factors", "1", "--seeds", "1",
                 "--ablation", "pad"]) == 0  # fmt: skip
    # Its stem has patches of 4, which leave out all of a border of one pixel on one side.
    assert "left out: vpt pad p=1: " in capsys.readouterr().err
    done = [r["config"]["options"]["length"] for r in read_records(tmp_path / "out/records.jsonl")]
    assert done == [3, 5, 7, 9, 11]


def test_the_command_measures_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cost", "--model", "test_vit", "--size", "64", "--batch", "2", "--classes", "5",
             "--lengths", "2,9", "--kinds", "vpt-shallow,vpt-deep-kv,vpt-deep-token", "--protocols",
             "linear,full", "--rounds", "1", "--device", "cpu"]  # fmt: skip
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    names = ["linear", "full", "vpt-shallow p=2", "vpt-shallow p=9", "vpt-deep-kv p=2",
             "vpt-deep-kv p=9", "vpt-deep-token p=2", "vpt-deep-token p=9"]  # fmt: skip
    assert [line.split(" | ")[0].strip("| ") for line in out.splitlines()[4:]] == names
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"cost.md", "cost.json", "train_ms.svg", "train_mb.png", "inference_mb.svg"} <= files
    rows = {r["name"]: r for r in json.loads((tmp_path / "out/cost.json").read_text())["rows"]}
    # What the paper calls VPT-prefix saves work in inference, the more so the more prompts.
    kv, token = ([rows[f"vpt-deep-{form} p={p}"]["inference_flops"] for p in (2, 9)]
                 for form in ("kv", "token"))  # fmt: skip
    assert token[1] - kv[1] > token[0] - kv[0] > 0
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == names
    assert main(["cost", "--model", "test_vit", "--kinds", "vpt"]) == 2
    assert main(["cost", "--model", "test_vit", "--lengths", "0"]) == 2


# Self-supervised backbones

TINY: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32,
                        "patch_size": 8}  # fmt: skip


def mae(**options: Any) -> nn.Module:
    """The timm model of MAE's published weights, small and random, as it comes: no classes."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224.mae", **(TINY | options))
    return perturb(model).double().eval()


def tokens_of(model: Any, pixels: Tensor, prompts: Tensor) -> Tensor:
    """Tokens behind the last block, shallow prompts behind the CLS token, before any norm."""
    patches = model.patch_embed(pixels)
    tokens = torch.cat([model.cls_token.expand(len(pixels), -1, -1), patches], 1) + model.pos_embed
    prompts = prompts.expand(len(pixels), -1, -1)
    return model.blocks(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1))


def logits_by_hand(model: Any, how: str) -> Tensor:
    """Logits of shallow prompts, by a plain forward over all tokens."""
    bare, prompts = mae(), model.prompts.stored(0)
    head = partial(functional.linear, weight=model.head.weight, bias=model.head.bias)
    tokens = tokens_of(bare, image(), prompts)
    length = prompts.shape[0]
    if how == "cls":
        return head(bare.norm(tokens)[:, 0])
    return head(bare.norm(tokens)[:, 1 + length :].mean(dim=1))


def test_a_pretraining_without_classes_reads_its_own_norm() -> None:
    """MAE and MoCo-v3 come without a classifier; the new head stands behind their own norm."""
    model = inject_prompts(mae(), 3, deep=False, num_classes=5)
    assert model.prompts.encoder.head.reads == "cls"
    # MoCo-v3's class token, behind the checkpoint's norm, as its own evaluation reads it.
    torch.testing.assert_close(model(image()), logits_by_hand(model, "cls"))
    assert not model.norm.weight.requires_grad


def test_masked_autoencoders_are_pooled_over_patches_without_prompts() -> None:
    ways: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "option": (mae(), {"pooling": "image"}),
        "model": (pooled(mae(), "avg"), {}),
        "argument": (mae(global_pool="avg", fc_norm=False), {}),
    }
    for name, (bare, options) in ways.items():
        model = inject_prompts(bare, 3, deep=False, num_classes=5, **options)
        # Double precision; the CLS token and the prompts have no part in the mean.
        expected = logits_by_hand(model, "mean of normed")
        torch.testing.assert_close(model(image()), expected, msg=name)
        assert model.prompts.encoder.reads(model.prompts.spec.pooling) == "mean"
        loss = model(image()).sum()
        loss.backward()
        assert model.prompts.stored(0).grad.abs().sum() > 0


def test_a_norm_behind_the_pooling_sees_neither_cls_nor_prompts() -> None:
    """MAE's fine-tuning form: mean of the patches, then `fc_norm`."""
    model = inject_prompts(mae(global_pool="avg"), 3, deep=False, num_classes=5)
    assert model.prompts.encoder.head.reads == "mean:norm-after"
    bare = mae(global_pool="avg")
    tokens = tokens_of(bare, image(), model.prompts.stored(0))[:, 4:]
    expected = model.head(bare.fc_norm(tokens.mean(dim=1)))
    torch.testing.assert_close(model(image()), expected)
    assert not model.fc_norm.weight.requires_grad


def test_pretrained_mae_weights_bring_a_norm_for_tokens_alone(tmp_path: Path) -> None:
    """What docs/paper-map.md says: the published file has no `fc_norm`, so timm cannot load it."""
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "mae.safetensors"
    save_file({n: t.float() for n, t in mae().state_dict().items()}, path)
    load = partial(
        timm.create_model, "vit_base_patch16_224.mae", pretrained=True,
        pretrained_cfg_overlay={"file": str(path)}, **TINY,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="fc_norm"):
        load(global_pool="avg")
    own = mae().norm.weight.float()
    assert torch.equal(load(global_pool="avg", fc_norm=False).norm.weight, own)
    assert torch.equal(pooled(load(), "avg").norm.weight, own)


@pytest.mark.parametrize(("name", "pool"), [
    ("vit_base_patch16_224.mae", "avg"),
    ("timm/vit_huge_patch14_224.mae", "avg"),
    ("vit_base_patch16_224.augreg_in21k", None),
    ("vit_small_patch16_224.dino", None),
    ("hf-hub:1aurent/vit_small_patch16_224.transpath_mocov3", None),
    ("hiera_base_224.mae", None),
])  # fmt: skip
def test_the_command_knows_how_a_pretraining_means_its_tokens(name: str, pool: str | None) -> None:
    assert usual_pool(name) == pool


def test_models_whose_pooling_cannot_be_chosen() -> None:
    model = vit12()
    assert pooled(model, None) is model
    with pytest.raises(SpecError, match="must be one of token, avg"):
        pooled(model, "max")
    for other in (build("timm/gap"), build("transformers/vit"), resnet(), mae(global_pool="avg")):
        with pytest.raises(VPTError, match="no timm ViT with a CLS token"):
            pooled(other, "avg")
    assert pooled(pooled(model, "avg"), "token").global_pool == "token"


# The page


def test_the_page_has_every_table_and_figure_and_names_what_is_there() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "paper-map.md").read_text()
    rows = page.partition("## Tables and figures")[2].partition("\n## ")[0]
    for name in [f"Table {n}" for n in range(1, 15)] + [f"Figure {n}" for n in range(1, 22)]:
        assert rows.count(f"\n| {name} |") == 1, name
    assert {name for name in ABLATIONS if f"`{name}`" in rows or f"--ablation {name}" in rows} == {
        *ABLATIONS
    } - {"partial"}
    assert set(re.findall(r"--ablation ([a-z-]+)", page)) <= {*ABLATIONS, "list"}
    sources = {p.name: p.read_text() for p in (root / "tests").glob("*.py")}
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page):
        assert file in sources, file
        assert not test or f"def {test}(" in sources[file], (file, test)
    everything = "".join(sources.values())
    for test in re.findall(r"(?<!:)`(test_\w+)`", page):
        assert f"def {test}(" in everything, test
