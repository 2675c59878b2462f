"""Life with torch: copies, pickles, checkpointing, autocast, compile, export, functional, DDP."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from zoo import build, image, logits

from peft_vpt import (
    count_parameters,
    disable_prompts,
    inject_prompts,
    is_prompted,
    remove_prompts,
    trainable_parameters,
)

MODELS = ["timm/cls", "timm/map", "timm/parallel-things", "transformers/vit", "transformers/clip"]
OPTIONS: list[dict[str, Any]] = [{}, {"deep": False}, {"pooling": "image"}, {"pooling": "global"}]
SOME = [
    pytest.param(name, options, id=f"{name}-{options}")
    for name in MODELS
    for options in OPTIONS
    if not (name == "timm/parallel-things" and "pooling" in options)
]


def prompted(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return inject_prompts(build(name, dtype), 3, generator=generator, **({"dropout": 0} | options))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded]
)
@pytest.mark.parametrize(("name", "options"), SOME)
def test_copies_are_equal_and_independent(name: str, options: dict[str, Any], twin_of: Any) -> None:
    model = prompted(name, options)
    expected = logits(model(image()))
    twin = twin_of(model)
    assert torch.equal(logits(twin(image())), expected)
    logits(twin(image())).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for n, p in twin.named_parameters() if n.startswith("prompts."))
    with torch.no_grad():
        for parameter in twin.prompts.parameters():
            parameter.neg_()
    assert not torch.equal(logits(twin(image())), expected)
    assert torch.equal(logits(model(image())), expected)
    bare = build(name)
    assert torch.equal(logits(remove_prompts(twin)(image())), logits(bare(image())))
    for key in ("_keys_to_ignore_on_save", "forward", "prompts"):
        assert (key in vars(twin)) == (key in vars(bare))
    assert is_prompted(model)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    out = logits(model(image()))
    (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    return {n: p.grad.clone() for n, p in trainable_parameters(model).items()}


@contextmanager
def counted_forwards(module: nn.Module) -> Iterator[list[int]]:
    """Count how often a submodule inside a block really runs."""
    calls: list[int] = []
    # In front of it: a recomputation stops as soon as all that backward needs is there.
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"layers": (1,)}, {"deep": False, "layers": (1, 2)}], ids=str
)
@pytest.mark.parametrize(
    "name", ["timm/cls", "timm/map", "transformers/vit", "transformers/dinov2"]
)
def test_gradient_checkpointing_recomputes_and_reaches_every_prompt(
    name: str, options: dict[str, Any], dropout: float, *, reentrant: bool
) -> None:
    if "dinov2" in name and "pooling" in options:
        options = options | {"num_classes": 4}
    model = prompted(name, options | {"dropout": dropout}).train()
    expected = gradients(model)
    if name.startswith("timm/"):
        from timm.layers import config

        model.set_grad_checkpointing()
        config.set_reentrant_ckpt(reentrant)
        block = model.blocks[2]
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # In front of training, and in the midst of it.
        if dropout:
            model.train()
        inner = getattr(model, "vit", None) or model.dinov2
        block = (inner.layers if hasattr(inner, "layers") else inner.encoder.layer)[2]
    try:
        with counted_forwards(block.mlp) as calls:
            got = gradients(model)
    finally:
        if name.startswith("timm/"):
            config.set_reentrant_ckpt(False)
    assert len(calls) == 2, "the block was not recomputed"
    for n, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(got[n], grad, rtol=1e-9, atol=1e-12, msg=n)


@pytest.mark.parametrize(("name", "options"), SOME)
def test_bfloat16_and_autocast(name: str, options: dict[str, Any]) -> None:
    reference = logits(prompted(name, options)(image())).float()
    half = prompted(name, options, torch.bfloat16)
    out = logits(half(image(dtype=torch.bfloat16)))
    # bf16 keeps 8 bits: three blocks and a head leave a few per cent of the largest logit.
    scale = float(reference.detach().abs().max())
    torch.testing.assert_close(out.float(), reference, rtol=0, atol=0.15 * scale)
    single = prompted(name, options, torch.float32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            out = logits(single(image(dtype=torch.float32)))
        torch.testing.assert_close(out.float(), reference, rtol=0, atol=0.15 * scale)
    out.float().sum()
    with torch.no_grad():  # a cache filled under autocast must not serve a call without it
        plain = logits(single(image(dtype=torch.float32)))
    torch.testing.assert_close(plain, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/cls", {}),
        ("timm/map", {"deep": False}),
        ("timm/cls", {"pooling": "global"}),
        ("timm/parallel-things", {}),
        ("transformers/vit", {}),
        ("transformers/vit", {"pooling": "image"}),
        ("transformers/clip", {"deep": False}),
    ],
)
def test_compile_fullgraph(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = prompted(name, options, torch.float32)
    expected, grads = logits(model(image(dtype=torch.float32))), None
    expected.sum().backward()
    grads = {n: p.grad.clone() for n, p in trainable_parameters(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = logits(compiled(image(dtype=torch.float32)))
    # float32, the same kernels in another order at most.
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    for n, p in trainable_parameters(model).items():
        torch.testing.assert_close(p.grad, grads[n], rtol=1e-3, atol=1e-4, msg=n)
    assert is_prompted(compiled)
    assert count_parameters(compiled) == count_parameters(model)
    with torch.no_grad():
        model.prompts.stored(0).neg_()
        changed = logits(compiled(image(dtype=torch.float32)))
        torch.testing.assert_close(changed, logits(model(image(dtype=torch.float32))))
        assert not torch.allclose(changed, expected)


@pytest.mark.parametrize("options", [{}, {"sharing": "intra"}, {"project": 4}, {"form": "token"}])
def test_flop_counter_on_a_first_forward_without_gradients(options: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = prompted("timm/cls", options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image())
    assert counter.get_total_flops() > 0


def test_compile_with_dropout_in_training_and_eager_attention() -> None:
    torch._dynamo.reset()
    model = prompted("transformers/vit", {"dropout": 0.3}, torch.float32).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits(compiled(image(dtype=torch.float32))).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.prompts.parameters())
    eager = build("transformers/vit", torch.float32)
    eager.set_attn_implementation("eager")
    inject_prompts(eager, 3)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    pixels = image(dtype=torch.float32)
    torch.testing.assert_close(logits(compiled(pixels)), logits(eager(pixels)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("timm/cls", {}), ("timm/cls", {"deep": False}), ("timm/map", {}), ("transformers/vit", {})],
)
def test_export(name: str, options: dict[str, Any], *, strict: bool) -> None:
    model = prompted(name, options, torch.float32)
    pixels = image(dtype=torch.float32)
    with torch.no_grad():
        model(pixels)  # a filled cache must not end up as constants
    program = torch.export.export(model, (pixels,), strict=strict)
    out = logits(program.module()(image(seed=3, dtype=torch.float32)))
    torch.testing.assert_close(out, logits(model(image(seed=3, dtype=torch.float32))))
    assert any(name.startswith("prompts.") for name in program.state_dict)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "options"), SOME)
def test_functional_call_and_per_sample_gradients(name: str, options: dict[str, Any]) -> None:
    from torch.func import functional_call, grad, vmap

    model = prompted(name, options)
    with torch.no_grad():
        bare = logits(model(image()))
        changed = {
            n: p.detach() * -1 for n, p in model.named_parameters() if n.startswith("prompts.")
        }
        other = logits(functional_call(model, changed, (image(),)))
        assert not torch.equal(other, bare)
        assert torch.equal(logits(model(image())), bare)
    if name != "timm/cls":
        return
    values = {n: p.detach() for n, p in trainable_parameters(model).items()}

    def loss(parameters: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (pixels[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(values, image())
    model.zero_grad()
    model(image()).square().sum().backward()
    for n, p in trainable_parameters(model).items():
        torch.testing.assert_close(each[n].sum(0), p.grad, rtol=1e-9, atol=1e-10)


def _ddp_worker(rank: int, port: int, queue: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = prompted("timm/cls", {}).train()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(trainable_parameters(wrapped).values(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        wrapped(image(4, seed=step)[rank::2]).square().mean().backward()
        optimizer.step()
    assert is_prompted(wrapped)
    queue.put((rank, {n: p.detach().numpy() for n, p in trainable_parameters(wrapped).items()}))
    dist.barrier()
    dist.destroy_process_group()


def test_two_gloo_processes_equal_one() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_ddp_worker, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    model = prompted("timm/cls", {}).train()
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(image(4, seed=step)).square().mean().backward()
        optimizer.step()
    for n, p in trainable_parameters(model).items():
        for rank in range(2):
            torch.testing.assert_close(
                torch.tensor(results[rank][n]), p.detach(), rtol=1e-9, atol=1e-12
            )


def test_a_data_parallel_replica_raises() -> None:
    model = prompted("timm/cls", {})
    replica = model._replicate_for_data_parallel()
    replica._parameters = model._parameters
    with pytest.raises(ValueError, match="DistributedDataParallel with torchrun"):
        replica(image())
    assert torch.isfinite(model(image())).all()


def test_accelerate_prepares_trains_and_unwraps(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = prompted("timm/cls", {}, torch.float32).train()
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    accelerator.backward(wrapped(image(dtype=torch.float32)).square().mean())
    optimizer.step()
    trains = set(trainable_parameters(model))
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trains
    assert accelerator.unwrap_model(wrapped) is model


@pytest.mark.parametrize("first", ["inject", "offload"])
def test_offloaded_by_accelerate(first: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = prompted("timm/cls", {}, torch.float32)(image(dtype=torch.float32))
    model = build("timm/cls", torch.float32)
    steps = {
        "inject": lambda: inject_prompts(
            model, 3, generator=torch.Generator().manual_seed(0), dropout=0
        ),
        "offload": lambda: accelerate.cpu_offload(model, execution_device="cpu"),
    }
    for step in sorted(steps, key=lambda step: step != first):
        steps[step]()
    with torch.no_grad():
        torch.testing.assert_close(model(image(dtype=torch.float32)), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda() -> None:
    model = prompted("timm/cls", {}, torch.float32)
    expected = model(image(dtype=torch.float32))
    model.cuda()
    out = model(image(dtype=torch.float32).cuda())
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_disabling_under_checkpointing_with_gradients_is_refused() -> None:
    model = prompted("timm/cls", {})
    model.set_grad_checkpointing()
    with disable_prompts(model):
        with pytest.raises(ValueError, match=r"disable_prompts: .* under torch\.no_grad"):
            model(image())
        with torch.no_grad():
            assert torch.isfinite(model(image())).all()
