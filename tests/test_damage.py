"""Damaged files, killed saves, writers at once, full disks: the old values, or a clear error."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import damage
from support.damage import Case, Tensors
from torch import nn
from zoo import build, image, logits

from peft_vpt import PromptSpec, inject_prompts, is_prompted, load_task_adapter, save_task_adapter
from peft_vpt.adapter.file import Adapter, canonical, read_adapter, write_adapter
from peft_vpt.errors import AdapterError, VPTError

ROOT = Path(__file__).parent.parent
SPARE = 256 * 2**20
SECONDS = 5.0


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for a bad file."""


@contextlib.contextmanager
def bounded() -> Iterator[Callable[[], object]]:
    """Stop what asks for more than `SPARE` bytes, or, once started, takes more than `SECONDS`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, hard))

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def same(adapter: Adapter, tensors: Tensors, metadata: dict[str, Any]) -> bool:
    """Compare to the bit; the checksum stands for itself."""

    def plain(values: dict[str, Any]) -> str:
        return canonical({k: v for k, v in values.items() if k != "checksum"})

    def raw(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes()

    names = adapter.tensors.keys() == tensors.keys()
    return (
        names
        and plain(adapter.metadata) == plain(damage.filled(metadata))
        and all(raw(adapter.tensors[n]) == raw(t) for n, t in tensors.items())
    )


def verdict(case: Case, path: Path) -> str:
    """Read a damaged file; return "told", "equal", or what went wrong."""
    path.write_bytes(case.data)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        adapter = read_adapter(path)
    except VPTError as error:
        text = str(error)
        asked = re.search("alloc|out of memory", text)
        named = str(path) in text and len(text) < 20_000
        return "told" if named and not asked else f"message {text[:300]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    if case.told:
        return "no layout" if case.by_layout else "read"
    right = same(adapter, case.sample.tensors, case.metadata or case.sample.metadata)
    return "equal" if right else "other values"


def test_every_damaged_file_is_told_or_reads_as_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = damage.samples(tmp_path)
    here, path = tmp_path / "here", tmp_path / "here" / "adapter.safetensors"
    here.mkdir()
    monkeypatch.chdir(here)
    around = sorted(os.listdir(tmp_path))
    start, results = time.process_time(), Counter[tuple[str, str]]()
    wrong: list[tuple[str, str]] = []
    with bounded():
        for case in damage.cases(found):
            result = verdict(case, path)
            results[case.label.split("/")[1], result] += 1
            if result not in ("told", "equal", "no layout"):
                wrong.append((case.label, result))
    assert not wrong, (len(wrong), wrong[:10])
    assert results.total() >= 5000
    # Kinds of damage that leave some files as good as before; the others must all be told.
    assert {kind for kind, result in results if result == "equal"} <= {
        "fields", "flips", "headers", "splices", "tables",
    }  # fmt: skip
    assert time.process_time() - start < 60
    assert os.listdir(here) == [path.name]
    assert sorted(os.listdir(tmp_path)) == around


def trained(name: str = "timm/cls", **options: Any) -> nn.Module:
    model = inject_prompts(build(name), 2, num_classes=3, **options)
    with torch.no_grad():
        for parameter in model.prompts.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    images = {"size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}
    saved = trained()
    one = damage.sample(save_task_adapter(saved, tmp_path, task="a", preprocessing=images))
    rng, path = random.Random(1), tmp_path / "bad.safetensors"
    cases = [c for kind in (damage.flips, damage.headers) for c in kind(one, rng)][::40]
    cases += [c for c in damage.fields(one, rng) if "fingerprint" not in c.label][::8]
    numbers = list(damage.numbers(one, rng))
    cases += list(damage.fields(one, rng))[::150] + numbers[::15]
    cases += [case for case in numbers if case.by_layout]
    model, results = build("timm/cls"), Counter[str]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    for case in cases:
        path.write_bytes(case.data)
        message = ""
        try:
            load_task_adapter(model, path)
        except VPTError as error:
            message = str(error)
        if message:
            results["told"] += 1
            assert str(path) in message, case.label
        else:
            assert not case.told, case.label
            for name, tensor in saved.prompts.named_parameters():
                assert torch.equal(model.prompts.get_parameter(name), tensor), case.label
            results["equal"] += 1
            model = build("timm/cls")
        assert not is_prompted(model)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), case.label
        assert [p.requires_grad for p in model.parameters()] == grads, case.label
    assert results["told"] > 200
    assert results["equal"] > 5


def test_arbitrary_edits_are_told_or_read_as_saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    folder = tmp_path_factory.mktemp("edits")
    one = damage.samples(folder)[0]
    size = len(one.data)
    place = st.integers(0, size)
    edit = st.tuples(place, place, st.binary(max_size=20))

    @hypothesis.settings(max_examples=300, derandomize=True, database=None, deadline=None)
    @hypothesis.given(st.lists(edit, min_size=1, max_size=4))
    def check(edits: list[tuple[int, int, bytes]]) -> None:
        data = one.data
        for start, end, new in edits:
            data = data[:start] + new + data[max(start, min(end, start + 20)) :]
        case = Case("", data, one)
        assert verdict(case, folder / "bad.safetensors") in ("told", "equal")

    with bounded():
        check()


def test_any_json_comes_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    folder = tmp_path_factory.mktemp("json")
    one = damage.samples(folder)[0]
    # No lone surrogates: JSON can say them, UTF-8 cannot, and they are refused when written.
    text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
    leaf = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | text
    leaf |= st.floats(allow_nan=False, allow_infinity=False)
    value = st.recursive(leaf, lambda x: st.lists(x) | st.dictionaries(text, x), max_leaves=10)

    @hypothesis.settings(max_examples=150, derandomize=True, database=None, deadline=None)
    @hypothesis.given(
        st.none() | text,
        st.none() | st.dictionaries(text, value, max_size=4),
        st.none() | st.lists(text, min_size=3, max_size=3),
    )
    def check(task: str | None, metrics: dict[str, Any] | None, labels: list[str] | None) -> None:
        head = one.metadata["head"] | {"labels": labels}
        values = one.metadata | {"task": task, "metrics": metrics, "head": head}
        given = {k: v for k, v in values.items() if k not in ("checksum", "format_version")}
        path = write_adapter(folder / "a.safetensors", one.tensors, given)
        adapter = read_adapter(path)
        assert same(adapter, one.tensors, values)
        data = path.read_bytes()
        assert write_adapter(path, adapter.tensors, given).read_bytes() == data

    check()


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"a": 2**63}},
        {"metrics": json.loads("[" * 40 + "]" * 40)},
        {"metrics": {"a": json.loads("[" * 40 + "]" * 40)}},
        {"task": 3},
        {"task": "\ud800"},
        {"metrics": {"\udfff": 1}},
        {"protocol": "bias"},
        {"preprocessing": {"size": [32], "mean": [0.5], "std": [0.5], "interpolation": "box"}},
        {"preprocessing": {"size": [4097, 32]}},
        {"preprocessing": {"size": [4096, 32], "crop": 0.9}},
        {"preprocessing": {"crop": 0.09}},
        {"preprocessing": {"crop": 10.1}},
    ],
    ids=lambda c: str(c)[:40],
)
def test_what_could_not_be_read_is_not_written(changes: dict[str, Any], tmp_path: Path) -> None:
    path, values = tmp_path / "a.safetensors", damage.metadata(PromptSpec(length=2))
    tensors = {f"prompts.{i}": torch.ones(2, 4) for i in range(2)}
    with pytest.raises(AdapterError, match=re.escape(str(path))):
        write_adapter(path, tensors, values | changes)
    assert not os.listdir(tmp_path)
    for name, tensor in (("../prompts.0", torch.ones(1)), ("head.bias", torch.ones(1).int())):
        with pytest.raises(AdapterError, match=name):
            write_adapter(path, tensors | {name: tensor}, values)
    write_adapter(path, tensors, values)


@pytest.mark.parametrize("name", ["..", "../x", "a/../b", "a/..", "/x", "a//b", "a\n", "-x", ""])
def test_a_revision_that_leads_elsewhere_is_not_written(name: str, tmp_path: Path) -> None:
    values = damage.metadata(PromptSpec(length=2))
    tensors = {f"prompts.{i}": torch.ones(2, 4) for i in range(2)}
    for good in ("main", "v1.0", "refs/pr/1", "0123456789abcdef"):
        write_adapter(
            tmp_path / "a.safetensors",
            tensors,
            values | {"backbone": values["backbone"] | {"revision": good}},
        )
    with pytest.raises(AdapterError, match=r"revision' .* no path that leads elsewhere"):
        write_adapter(
            tmp_path / "b.safetensors",
            tensors,
            values | {"backbone": values["backbone"] | {"revision": name}},
        )


def test_the_largest_images_are_written(tmp_path: Path) -> None:
    tensors = {f"prompts.{i}": torch.ones(2, 4) for i in range(2)}
    for images in ({"size": [4096, 4096]}, {"size": [409, 409], "crop": 0.1}, {"crop": 10}):
        values = damage.metadata(PromptSpec(length=2)) | {"preprocessing": images}
        write_adapter(tmp_path / "a.safetensors", tensors, values)
        assert read_adapter(tmp_path / "a.safetensors").metadata["preprocessing"] == images


def test_a_newer_file_asks_for_an_update(tmp_path: Path) -> None:
    one, path = damage.samples(tmp_path)[0], tmp_path / "new.safetensors"
    newer = {"format_version": 2, "layout": [1], "checksum": "x"}
    for values in (one.metadata | newer, newer, one.metadata | {"protocol": {"name": "lora"}}):
        path.write_bytes(damage.signed(one.tensors, values))
        with pytest.raises(AdapterError, match=r"[Uu]pdate peft_vpt") as caught:
            read_adapter(path)
        assert str(path) in str(caught.value)


class Bomb:
    """Makes a folder when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_state_dict_saved_by_hand(tmp_path: Path) -> None:
    model = trained()
    files = {name: tmp_path / f"a.{name}" for name in ("safetensors", "pt", "pkl", "pth")}
    save_file(model.state_dict(), files["safetensors"])
    torch.save(model.state_dict(), files["pt"])
    files["pkl"].write_bytes(pickle.dumps({"prompts.0": Bomb(tmp_path / "made")}))
    torch.save(Bomb(tmp_path / "made"), files["pth"], _use_new_zipfile_serialization=False)
    for path in files.values():
        bare = build("timm/cls")
        with pytest.raises(AdapterError, match="state dict") as caught:
            load_task_adapter(bare, path)
        for word in (str(path), "inject_prompts", "load_state_dict"):
            assert word in str(caught.value)
        assert not is_prompted(bare)
    assert not (tmp_path / "made").exists()
    again = inject_prompts(build("timm/cls"), 2, num_classes=3).eval()
    again.load_state_dict(torch.load(files["pt"], weights_only=True))
    assert torch.equal(logits(again(image())), logits(model(image())))


def test_only_the_adapter_file_of_a_folder_counts(tmp_path: Path) -> None:
    folder, model = tmp_path / "task", trained()
    save_task_adapter(model, folder, task="right")
    right = (folder / "adapter.safetensors").read_bytes()
    save_task_adapter(trained(deep=False), folder / "model.safetensors", task="wrong")
    (folder / ".adapter.safetensors.0123456789abcdef.tmp").write_bytes(right[:100])
    for name in ("config.json", "adapter_config.json"):
        (folder / name).write_text('{"task": "wrong", "spec": {"length": 9}}')
    host = load_task_adapter(build("timm/cls"), folder)
    assert host.prompts.info["task"] == "right"
    assert torch.equal(logits(host(image())), logits(model(image())))
    save_task_adapter(host, folder)
    assert (folder / "adapter.safetensors").read_bytes() == right
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match=re.escape(str(folder))):
        load_task_adapter(build("timm/cls"), folder)


def test_what_is_no_file(tmp_path: Path) -> None:
    folder, pipe, loop = (tmp_path / f"{name}.safetensors" for name in ("folder", "pipe", "loop"))
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path in (folder, pipe, loop, tmp_path / "none.safetensors", Path("/dev/zero")):
        for read in (read_adapter, lambda p: load_task_adapter(build("timm/cls"), p)):
            with bounded() as start:
                start()
                with pytest.raises(AdapterError, match=re.escape(str(path))):
                    read(path)
    with pytest.raises(AdapterError, match=re.escape(str(folder))):
        save_task_adapter(trained(), folder)
    assert sorted(os.listdir(tmp_path)) == [p.name for p in (folder, loop, pipe)]


def test_a_file_longer_or_shorter_than_its_header_says_is_not_read(tmp_path: Path) -> None:
    path = save_task_adapter(trained(), tmp_path)
    sound = path.stat().st_size
    for size in (sound + 1, 3 * 10**9, 3 * 10**11, sound - 1):
        # Sparse: it takes no room on the disk.
        os.truncate(path, size)
        with bounded() as start:
            start()
            with pytest.raises(AdapterError, match=f"it has {size} bytes, its header calls for"):
                read_adapter(path)


def test_a_header_of_megabytes_is_not_parsed(tmp_path: Path) -> None:
    path, text = tmp_path / "a.safetensors", b"[" + b"{}," * 7_000_000 + b"{}]"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with bounded() as start:
        start()
        with pytest.raises(AdapterError, match="of them are its header"):
            read_adapter(path)


@pytest.mark.parametrize("sharing", ["intra", "all"])
def test_one_vector_is_not_repeated_a_million_times(sharing: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = inject_prompts(build("timm/cls"), 2, sharing=sharing, num_classes=3)
    adapter = read_adapter(save_task_adapter(model, tmp_path / "sound"))
    spec = adapter.metadata["spec"] | {"length": 2**20}
    path.write_bytes(damage.signed(adapter.tensors, adapter.metadata | {"spec": spec}))
    with pytest.raises(AdapterError, match=r"length=1048576.*from 1 to 65536"):
        load_task_adapter(build("timm/cls"), path)


def test_messages_stay_short_whatever_a_file_calls_its_tensors(tmp_path: Path) -> None:
    adapter, path = damage.samples(tmp_path)[0], tmp_path / "a.safetensors"
    strange = {f"head.module.{'x' * 10_000}{i}": torch.ones(1) for i in range(50)}
    path.write_bytes(damage.signed(adapter.tensors | strange, adapter.metadata))
    with pytest.raises(AdapterError) as caught:
        load_task_adapter(build("timm/cls"), path)
    assert len(str(caught.value)) < 2_000


def test_a_file_keeps_its_permissions_and_needs_no_sync_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_task_adapter(trained(), tmp_path)
    path.chmod(0o600)
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    save_task_adapter(trained(), path, task="new")
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_adapter(path).metadata["task"] == "new"


def test_a_file_written_over_in_place_does_not_change_what_was_read(tmp_path: Path) -> None:
    one = damage.samples(tmp_path)[0]
    path = tmp_path / "0.safetensors"
    adapter = read_adapter(path)
    with path.open("r+b") as file:
        file.write(bytes(len(one.data)))
    assert same(adapter, one.tensors, one.metadata)


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # No teardown of the parent's test run in the child.
            os._exit(code)
    return pid


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write(path: Path, value: int, rows: int = 200) -> Path:
    """Write an adapter of 4 tensors of `rows` x 512 bytes, all filled with one value."""
    names = ("prompts.0", "prompts.1", "head.weight", "head.bias")
    tensors = {name: torch.full((rows, 128), float(value)) for name in names}
    head = {"classes": rows, "in_features": 128, "reads": "cls"}
    values = damage.metadata(PromptSpec(length=rows), metrics={"value": value}, head=head)
    return write_adapter(path, tensors, values)


def value_of(path: Path) -> int:
    """Return the value that a whole file is filled with."""
    adapter = read_adapter(path)
    value = adapter.metadata["metrics"]["value"]
    assert all(bool((tensor == value).all()) for tensor in adapter.tensors.values())
    return int(value)


def kill_at(step: str) -> None:
    """Replace one step of a write by one that the process dies at."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    when, _, name = step.partition(" ")
    if name == "write":
        opened = Path.open

        def half(self: Path, mode: str) -> None:
            with opened(self, mode) as file:
                file.write(b"half a file")
                file.flush()
                die()

        Path.open = half  # type: ignore[assignment,method-assign]
        return
    real = getattr(os, name)

    def step_and_die(*arguments: Any) -> None:
        if when == "after":
            real(*arguments)
        die()

    setattr(os, name, step_and_die)


STEPS = {
    "in write": 1,
    "before fsync": 1,
    "after fsync": 1,
    "before replace": 1,
    "after replace": 2,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_save_killed_at_a_step(step: str, tmp_path: Path) -> None:
    path = write(tmp_path / "adapter.safetensors", 1)

    def work() -> None:
        kill_at(step)
        write(path, 2)

    assert finish(forked(work)) == -signal.SIGKILL
    assert value_of(path) == STEPS[step]
    assert len(os.listdir(tmp_path)) == 1 + (STEPS[step] == 1)
    assert value_of(write(path, 3)) == 3


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_moment_leaves_a_whole_file(kills: int, tmp_path: Path) -> None:
    path, rng, values = tmp_path / "adapter.safetensors", random.Random(0), set[int]()
    write(path, 0)
    # A few saves long, however slow the machine is just now.
    began = time.perf_counter()
    for _ in range(3):
        write(path, 0)
    longest = max(0.03, time.perf_counter() - began)
    for kill in range(kills):
        old, (ready, begun) = value_of(path), os.pipe()

        def work(first: int = old + 1, begun: int = begun) -> None:
            os.write(begun, b"x")
            for value in itertools.count(first):
                write(path, value)

        pid = forked(work)
        os.close(begun)
        assert os.read(ready, 1)
        os.close(ready)
        time.sleep(rng.uniform(0, longest))
        os.kill(pid, signal.SIGKILL)
        assert finish(pid) == -signal.SIGKILL, kill
        assert value_of(path) >= old
        values.add(value_of(path))
    # Otherwise every kill came before the first save was through, or none came within one.
    assert len(values) > kills // 10
    assert value_of(write(path, -1)) == -1


def test_two_processes_saving_to_one_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "adapter.safetensors", 1)

    def work(value: int) -> None:
        for _ in range(25):
            write(path, value)

    running = [forked(lambda v=v: work(v)) for v in (1, 2)]
    seen = []
    while running:
        seen.append(value_of(path))
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            running.remove(done)
    assert set(seen) == {1, 2}
    assert value_of(path) in (1, 2)
    assert os.listdir(tmp_path) == [path.name]


def fails_to_grow(path: Path, why: str) -> None:
    """Check that a larger save fails for `why`, and leaves the old file alone."""
    old = write(path, 1, rows=2).read_bytes()
    with pytest.raises(AdapterError, match=why) as caught:
        write(path, 2)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]
    assert value_of(write(path, 3, rows=2)) == 3


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        fails_to_grow(tmp_path / "adapter.safetensors", "File too large")

    assert finish(forked(work)) == 0


def test_a_full_disk(tmp_path: Path) -> None:
    own = [shutil.which("unshare") or "", "--mount", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=200k none "$0" && exec "$@"'
    probe = [*own, "sh", "-c", mount, str(tmp_path), "true"]
    if not own[0] or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount")
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from pathlib import Path
        from test_damage import fails_to_grow
        fails_to_grow(Path({str(tmp_path)!r}, "adapter.safetensors"), "No space left")
    """
    command = [*own, "sh", "-c", mount, str(tmp_path), sys.executable, "-c"]
    result = subprocess.run(
        [*command, textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
def test_local_files_touch_no_socket(name: str, tmp_path: Path) -> None:
    model, bare = trained(name), build(name)

    def work() -> None:
        asked: list[str] = []
        # A hook of the interpreter, below anything that a library may have imported before.
        sys.addaudithook(lambda e, _: asked.append(e) if e.startswith("socket.") else None)
        save_task_adapter(model, tmp_path / "a")
        for source in (tmp_path / "a", str(tmp_path / "a" / "adapter.safetensors")):
            load_task_adapter(bare, source)
        with pytest.raises(AdapterError):
            load_task_adapter(bare, "./owner/name")
        assert not asked
        import socket

        socket.socket().close()
        assert asked

    assert finish(forked(work)) == 0
