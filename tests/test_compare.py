"""The comparison of protocols on a folder of images, by library and by command line."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import draw_task
from zoo import build

from peft_vpt import load_task_adapter
from peft_vpt.cli import main
from peft_vpt.data import Split, decode, eval_transform, open_task
from peft_vpt.errors import SpecError, VPTError
from peft_vpt.experiments import run as runs
from peft_vpt.experiments.compare import Plan, compare
from peft_vpt.experiments.records import read_records, select
from peft_vpt.experiments.report import write_report
from peft_vpt.experiments.sums import file_sum, split_sum
from peft_vpt.experiments.variants import Variant
from peft_vpt.training import preset

IMAGES = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
          "crop": None}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bright and dark images in noise, easy to tell apart."""
    return draw_task(tmp_path / "task")


PLAN = Plan(
    protocols=("linear", "vpt-deep"),
    options={"vpt-deep": {"length": 2}},
    epochs=2,
    factors=(0.1, 1.0),
    seeds=(0, 1),
    changes={"batch_size": 8},
)


def run(folder: Path, output: Path, plan: Plan = PLAN, weights: str | None = None) -> Any:
    make = partial(build, "timm/cls", torch.float32)
    transform = eval_transform(IMAGES)
    return compare(
        open_task(folder), transform, make, backbone="tiny", folder=output, plan=plan,
        group="Natural", weights=weights, progress=False,
    )  # fmt: skip


def test_rates_are_chosen_on_val_and_test_is_seen_by_the_final_runs_alone(
    folder: Path, tmp_path: Path
) -> None:
    records = run(folder, tmp_path / "out")
    tried = [r for r in records if r["split"] == "val"]
    final = [r for r in records if r["split"] == "test" and r["config"].get("recipe")]
    assert len(tried) == len(final) == 4
    for protocol in ("linear", "vpt-deep"):
        of, used = (
            {r["config"]["recipe"]["base_lr"]: r["metrics"]["top1"]
             for r in select(some, protocol=protocol)}
            for some in (tried, final)
        )  # fmt: skip
        assert list(used) == [min(of, key=lambda rate: (-of[rate], rate))]
    assert {r["config"]["train"] for r in tried} == {"train"}
    assert {r["config"]["train"] for r in final} == {"trainval"}
    assert {r["seed"] for r in final} == {0, 1}
    controls = {r["protocol"]: r["metrics"]["top1"] for r in records if not r["trainable"]}
    assert controls == {"majority class": 0.5, "16x16 pixels": 1.0}
    # What was recorded is what the saved adapter does.
    task = open_task(folder)
    transform, split = eval_transform(IMAGES), task.split("test")
    pixels = torch.stack([transform(split.image(i)) for i in range(len(split))])
    for record in final:
        assert record["adapter"].startswith(f"task/{record['protocol']}-{record['seed']}-")
        path = tmp_path / "out" / record["adapter"]
        model = load_task_adapter(build("timm/cls", torch.float32), path).eval()
        right = model(pixels).argmax(1) == torch.tensor(split.labels)
        assert record["metrics"]["top1"] == pytest.approx(float(right.float().mean()))
        assert record["stored_bytes"] == (path / "adapter.safetensors").stat().st_size
        assert model.prompts.info["labels"] == ["dark", "light"]


def test_a_comparison_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    once = runs.run_once

    def counted(given: runs.Run) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(given.variant.protocol)
        return once(given)

    monkeypatch.setattr(runs, "run_once", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out")
    first = read_records(tmp_path / "out" / "records.jsonl")
    done.clear()
    done.append("spare")
    monkeypatch.setattr(runs, "run_once", once)
    records = run(folder, tmp_path / "out")
    assert records[: len(first)] == first
    assert len(records) == 2 + 8
    monkeypatch.setattr(runs, "run_once", counted)
    done[:] = ["full"] * 3
    assert run(folder, tmp_path / "out") == records


def test_results_of_other_images_and_other_weights_are_not_taken_for_these(
    folder: Path, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PLAN, protocols=("linear",), factors=(1.0,), seeds=(0,))
    first = run(folder, tmp_path / "out", plan)
    shutil.copytree(folder, tmp_path / "moved" / "task")
    assert run(tmp_path / "moved" / "task", tmp_path / "out", plan) == first
    # Same names and labels; the classes of one split are exchanged.
    other = tmp_path / "other" / "task"
    shutil.copytree(folder, other)
    for name, source in (("dark", "light"), ("light", "dark")):
        shutil.copytree(folder / "test" / source, other / "test" / name, dirs_exist_ok=True)
    found = run(other, tmp_path / "out", plan)
    pixels = [r["metrics"]["top1"] for r in (*first, *found) if r["protocol"] == "16x16 pixels"]
    assert pixels == [1.0, 0.0]
    assert len(found) == len(first) == 3
    assert not [r for r in found if r in first]
    weighed = run(folder, tmp_path / "out", plan, weights="abc")
    assert weighed[:2] == first[:2]
    assert weighed[2]["config"]["weights"] == "abc"
    assert len({r["adapter"] for r in (first[2], found[2], weighed[2])}) == 3
    # Of the runs that are there, those on these images with these weights stand beside.
    bias = dataclasses.replace(plan, protocols=("bias",))
    beside = run(other, tmp_path / "out", bias)
    assert [r for r in beside if r["protocol"] == "linear"] == found[2:]


def test_a_run_that_diverged_is_marked_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for("test_vit", folder, tmp_path / "out", "--protocols", "linear,vpt-deep")
    assert main([*words, "--preset", "paper", "--factors", "1e36", "--epochs", "3"]) == 0
    out, err = capsys.readouterr()
    assert "0.0 (1 of 1 diverged)" in out.replace("*", "")
    assert "Runs that diverged. They count as wrong everywhere." in out
    assert "- vpt-deep on task, test, seed 0, learning rate" in out
    assert re.search(r"diverged: vpt-deep, test: fit: epoch \d, step", err)
    lost = [r for r in read_records(tmp_path / "out" / "records.jsonl") if "failure" in r]
    assert {r["protocol"] for r in lost} >= {"vpt-deep"}
    assert all("step" in r["failure"] or "logits" in r["failure"] for r in lost)


def test_a_run_whose_last_step_broke_it_is_recorded(folder: Path, tmp_path: Path) -> None:
    # One step: the weights are finite behind it, what the model makes of them is not.
    plan = dataclasses.replace(
        PLAN, protocols=("linear",), epochs=1, factors=(1e37,), seeds=(0,), kind="paper",
        changes={"batch_size": 24},
    )  # fmt: skip
    records = run(folder, tmp_path / "out", plan)
    assert [r["metrics"].get("diverged") for r in records][-1] == 1.0
    assert run(folder, tmp_path / "out", plan) == records


def test_fixed_prompts_have_the_length_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    words = words_for("test_vit", folder, tmp_path / "out")
    assert main([*words, "--protocols", "prompt-fixed,vpt-deep", "--length", "2"]) == 0
    records = read_records(tmp_path / "out" / "records.jsonl")
    found = {r["protocol"]: r["config"].get("options") for r in records if r["trainable"]}
    assert found == {"prompt-fixed": {"length": 2}, "vpt-deep": {"length": 2, "init": "tokens"}}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Prompts begin as tokens of training images." in page


@pytest.mark.parametrize("words", [("--init", "random"), ("--preset", "paper")])
def test_prompts_begin_at_random_where_that_is_asked_for(
    words: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    given = words_for("test_vit", folder, tmp_path / "out", "--protocols", "vpt-deep", *words)
    assert main(given) == 0
    records = read_records(tmp_path / "out" / "records.jsonl")
    found = [r["config"]["options"] for r in records if r["trainable"]]
    assert found == [{"length": 20}]
    assert "Prompts begin at random." in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--protocols", "linear,prompt-fixed", "--init", "tokens"), "no prompts train there"),
        (("--ablation", "location", "--init", "random"), "has its own first values"),
    ],
)
def test_first_values_are_refused_where_nothing_begins(
    words: tuple[str, ...], match: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main([*words_for("test_vit", folder, tmp_path / "out"), *words]) == 2
    assert match in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_prompts_that_began_otherwise_do_not_stand_beside(folder: Path, tmp_path: Path) -> None:
    def rows(protocol: str, **begin: str) -> set[str]:
        plan = dataclasses.replace(
            PLAN, protocols=(protocol,), options={protocol: {"length": 2, **begin}}, epochs=1,
            factors=(1.0,), seeds=(0,),
        )  # fmt: skip
        return {r["protocol"] for r in run(folder, tmp_path / "out", plan) if r["trainable"]}

    assert rows("vpt-deep") == {"vpt-deep"}
    assert rows("vpt-shallow", init="tokens") == {"vpt-shallow"}
    assert rows("vpt+bias") == {"vpt-deep", "vpt+bias"}


def test_lengths_are_tried_against_the_tokens_of_all_training_images() -> None:
    from peft_vpt.experiments.backbones import refusal

    def reason(images: int, *lengths: int) -> str:
        choices = tuple({"length": length} for length in lengths)
        row = Variant("deep", "vpt-deep", {"init": "tokens"}, choices=choices)
        return str(refusal(row, build("timm/cls", torch.float32), 2, (32, 32), images) or "")

    # An image has 16 tokens.
    assert reason(2, 20, 32) == ""
    assert "32 tokens, fewer than 33 prompts" in reason(2, 20, 33)
    assert reason(3, 20, 33) == ""


def test_prompts_of_a_comparison_begin_as_tokens_of_its_training_images(folder: Path) -> None:
    task, transform = open_task(folder), eval_transform(IMAGES)
    pixels = runs.Pixels(task, transform)
    make = partial(build, "timm/cls", torch.float32)
    deep = Variant("deep", "vpt-deep", {"length": 2, "init": "tokens"})
    model = runs.prepared(runs.Run(pixels, deep, make, preset("vpt-deep", seed=3), "tiny"))
    kept: list[torch.Tensor] = []
    bare = make()
    bare.blocks[1].register_forward_pre_hook(lambda _, args: kept.append(args[0][:, 1:]))
    with torch.no_grad():
        bare(pixels.split("train").images)
    tokens = kept[0].reshape(-1, kept[0].shape[-1])
    near = torch.nn.functional.cosine_similarity(
        model.prompts.stored(1).detach()[:, None], tokens[None], dim=-1
    )
    assert (near.max(dim=1).values > 1 - 1e-6).all()


def test_a_backbone_without_tokens_begins_at_random_or_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for("test_resnet", folder, tmp_path / "out", "--protocols", "vpt-shallow")
    words += ["--length", "2"]
    assert main([*words, "--init", "tokens"]) == 1
    assert "--init tokens: vpt-shallow: prompts with location=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    assert "vpt-shallow: prompts begin at random" in capsys.readouterr().err


def test_rows_that_fail_in_a_forward_are_left_out_before_anything(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for("test_vit", folder, tmp_path / "out")
    words[words.index("--size") + 1] = "48"
    assert main([*words, "--protocols", "linear,sidetune"]) == 1
    assert "sidetune: no forward of an image of 48x48 pixels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_local_folder_of_other_weights_is_another_backbone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=32, patch_size=8, intermediate_size=32, **sizes)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})

    def write(seed: int) -> None:
        torch.manual_seed(seed)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        processor.save_pretrained(tmp_path / "vit")

    words = ["compare", "--data", str(folder), "--model", str(tmp_path / "vit"), "--output",
             str(tmp_path / "out"), "--epochs", "1", "--factors", "1", "--seeds", "1",
             "--protocols", "linear"]  # fmt: skip

    def runs_of_linear() -> int:
        assert main(words) == 0, capsys.readouterr().err
        records = read_records(tmp_path / "out" / "records.jsonl")
        return sum(r["protocol"] == "linear" for r in records)

    write(0)
    assert runs_of_linear() == 1
    assert runs_of_linear() == 1
    write(1)
    assert runs_of_linear() == 2


def test_other_names_of_classes_are_another_task(folder: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, protocols=("linear",), factors=(1.0,), seeds=(0,))
    first = run(folder, tmp_path / "out", plan)
    task = open_task(folder)
    renamed = dataclasses.replace(task, classes=("dark", "dusk"))
    make = partial(build, "timm/cls", torch.float32)
    found = compare(
        renamed, eval_transform(IMAGES), make, backbone="tiny", folder=tmp_path / "out", plan=plan,
        group="Natural", progress=False,
    )  # fmt: skip
    assert found[-1]["config"]["classes"] != first[-1]["config"]["classes"]
    assert found[-1]["adapter"] != first[-1]["adapter"]


def test_checksums_tell_splits_and_files_apart(folder: Path, tmp_path: Path) -> None:
    split = open_task(folder).split("val")
    total = split_sum(split)
    assert split_sum(split.subset(reversed(range(len(split))))) != total
    assert split_sum(Split(split.paths, tuple(1 - x for x in split.labels))) != total
    images = [split.image(i) for i in range(len(split))]
    held = Split((), split.labels, images)
    assert split_sum(held) == split_sum(Split((), split.labels, [x.copy() for x in images]))
    assert split_sum(Split((), split.labels, images[::-1])) != split_sum(held)
    decoded = [decode(part, eval_transform(IMAGES)) for part in (held, split)]
    assert split_sum(decoded[0]) == split_sum(decoded[1])
    decoded[0].images[0, 0, 0, 0] += 1
    assert split_sum(decoded[0]) != split_sum(decoded[1])
    file = tmp_path / "file"
    sums = []
    for text in ("one", "two"):
        file.write_text(text)
        os.utime(file, ns=(1, len(sums)))
        sums.append(file_sum(file))
    assert sums[0] != sums[1]
    with pytest.raises(VPTError, match="cannot be read"):
        file_sum(tmp_path / "absent")


def test_a_recipe_follows_from_the_length_and_is_checked_before_anything(
    folder: Path, tmp_path: Path
) -> None:
    long = Plan(protocols=("vpt-deep",), options={"vpt-deep": {"length": 200}}, kind="paper")
    # Jia et al. 2022, Table 8.
    assert long.recipe(long.rows()[0], "vit_base_patch16_224", 1.0, 0).batch_size == 64
    for wrong in ({"kind": "papr"}, {"changes": {"epoch": 3}}):
        with pytest.raises(SpecError, match="preset"):
            run(folder, tmp_path / "out", dataclasses.replace(PLAN, **wrong))
    shutil.rmtree(folder / "val")
    task = open_task(folder, val_fraction=0.1)
    lacking = dataclasses.replace(task, splits={"train": task.split("train")})
    with pytest.raises(VPTError, match="no split 'val'"):
        compare(lacking, eval_transform(IMAGES), torch.nn.Identity, backbone="b",
                folder=tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_a_step_costs_is_recorded_and_shown(folder: Path, tmp_path: Path) -> None:
    records = run(folder, tmp_path / "out")
    of = {r["protocol"]: r for r in records if r["trainable"]}
    linear, deep = of["linear"], of["vpt-deep"]
    weights = sum(4 * p.numel() for p in build("timm/cls", torch.float32).parameters())
    assert weights < linear["train_bytes"] < deep["train_bytes"]
    page = write_report(records, tmp_path, title="T", intro="I").read_text()
    assert "ms per step | training memory (MB) |" in page
    older = [{k: v for k, v in r.items() if k not in ("train_bytes", "preset", "adapter")}
             for r in records]  # fmt: skip
    page = write_report(older, tmp_path, title="T", intro="I").read_text()
    assert "|                    - |" in page
    assert "majority class" not in page.split("## Tests")[1]


def test_the_report_is_made_from_records_alone(folder: Path, tmp_path: Path) -> None:
    records = run(folder, tmp_path / "out")
    page = write_report(records, tmp_path, title="Here", intro="Words.").read_text()
    assert "| linear" in page
    assert "| majority class" in page
    assert "accuracy.svg" in page
    again = write_report(read_records(tmp_path / "out" / "records.jsonl"), tmp_path, title="Here",
                         intro="Words.").read_text()  # fmt: skip
    assert again == page


def words_for(model: str, folder: Path, output: Path, *more: str) -> list[str]:
    """A short comparison on a timm model of random weights, which lie beside the output."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = output.parent / f"{model}.safetensors"
    save_file(timm.create_model(model).state_dict(), weights)
    return ["compare", "--data", str(folder), "--model", model, "--size", "64", "--weights",
            str(weights), "--output", str(output), "--epochs", "1", "--factors", "1", "--seeds",
            "1", *more]  # fmt: skip


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = words_for("test_vit", folder, tmp_path / "out", "--protocols", "linear,bias")
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "# Comparison on task" in out
    assert "resize to 64x64" in err
    assert {p.suffix for p in (tmp_path / "out").iterdir()} >= {".md", ".svg", ".png", ".jsonl"}
    record = read_records(tmp_path / "out" / "records.jsonl")[-1]
    assert record["preset"] == "default"
    assert record["config"]["weights"] == file_sum(tmp_path / "test_vit.safetensors")
    assert main([*arguments, "--factors", "a"]) == 2
    assert main([*arguments, "--protocols", "lora"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_tasks_and_presets_in_one_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = words_for("test_vit", folder, output, "--protocols", "linear,bias")
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    assert main(words) == 0
    first = (output / "report.md").read_bytes()
    assert main([*words, "--preset", "paper"]) == 0
    assert "preset paper" in (output / "report.md").read_text()
    assert main(words) == 0
    assert (output / "report.md").read_bytes() == first
    assert main([*words, "--data", str(second)]) == 0
    # The first task keeps its page, and the joint one has runs of one preset.
    assert (output / "report.md").read_bytes() == first
    assert "# Comparison on second" in (output / "report-second.md").read_text()
    assert (output / "accuracy-second.svg").exists()
    joint = (output / "all-tasks.md").read_text()
    assert "linear" in joint
    assert "seeds 0" in joint
    assert "the last one counts" not in joint
    records = read_records(output / "records.jsonl")
    assert {r["preset"] for r in records if r["protocol"] == "bias"} == {"default", "paper"}
    assert all((output / r["adapter"]).is_dir() for r in records if r.get("adapter"))


def test_protocols_that_a_backbone_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = words_for("test_resnet", folder, output)
    assert main([*words, "--protocols", "linear,adapter"]) == 1
    assert "--protocols: adapter: " in capsys.readouterr().err
    assert not output.exists()
    assert main(words) == 0
    assert "left out: adapter: " in capsys.readouterr().err
    done = {r["protocol"] for r in read_records(output / "records.jsonl")}
    assert done >= {"linear", "bias", "full", "vpt-shallow"}
    assert "adapter" not in done


BAD: dict[str, tuple[list[str], int, str]] = {
    "broken": ([], 1, "3 of the images cannot be read"),
    "preset": (["--preset", "papr"], 2, "--preset"),
    "output": (["--output", "FILE"], 1, "is no folder"),
    "size": (["--size", "50"], 1, "50x50"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_commands_leave_nothing(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, code, match = BAD[case]
    words = words_for("test_vit", folder, tmp_path / "out")
    broken = ("train/dark/3.png", "train/light/1.png", "test/dark/0.png")
    for name in broken if case == "broken" else ():
        (folder / name).write_bytes(b"no image")
    (tmp_path / "FILE").write_text("")
    assert main([*words, *(word.replace("FILE", str(tmp_path / "FILE")) for word in more)]) == code
    out, err = capsys.readouterr()
    assert match in " ".join(err.split())
    assert out == ""
    assert not (tmp_path / "out").exists()
    if case == "broken":
        assert all(str(folder / name) in err for name in broken)
        fewer = ["--skip-broken", "--protocols", "linear", "--fraction", "0.5"]
        assert main([*words, *fewer]) == 0
        run_on = read_records(tmp_path / "out" / "records.jsonl")[-1]["config"]["images"]
        # Half of 24 at most, without those of them that are broken.
        assert 10 <= int(run_on["train"].split(",")[0]) <= 12
        assert run_on["test"].startswith("11,")


def test_bad_plans(folder: Path, tmp_path: Path) -> None:
    for plan in (Plan(protocols=()), Plan(factors=()), Plan(seeds=())):
        with pytest.raises(SpecError, match="at least"):
            run(folder, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()
    with pytest.raises(VPTError):
        run(folder, tmp_path / "out", Plan(protocols=("lora",)))


def test_a_page_says_how_the_prompts_of_its_rows_begin() -> None:
    from peft_vpt.cli.compare import beginnings

    rows = [Variant(name, "vpt-deep", {"init": name}) for name in ("tokens", "prototypes")]
    rows += [Variant("random", "vpt-deep"), Variant("linear", "linear")]
    assert beginnings(rows) == (
        " Prompts begin as tokens of training images in tokens; as class prototypes in "
        "prototypes; at random in random."
    )
