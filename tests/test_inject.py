"""The verbs: counts, what trains, what stays, undo, training mode, shapes of hidden states."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from zoo import CLASSES, NAMES, build, image, logits

from peft_vpt import (
    count_parameters,
    disable_prompts,
    inject_prompts,
    is_prompted,
    remove_prompts,
    trainable_parameters,
)

SHALLOW_AND_DEEP: list[dict[str, Any]] = [{}, {"deep": False}, {"deep": False, "layers": (0, 2)}]


def base(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_base_patch16_224", **{"num_classes": 0, "device": "meta"} | options
    )


@pytest.mark.parametrize(
    ("classes", "length", "trainable", "total"),
    [(6, 100, 926_214, 86_724_870), (397, 5, 351_373, 86_150_029)],
)
def test_published_parameter_counts(classes: int, length: int, trainable: int, total: int) -> None:
    model = inject_prompts(base(num_classes=1), length, num_classes=classes)
    assert count_parameters(model) == (trainable, total)


@pytest.mark.parametrize(("deep", "count"), [(False, 38_400), (True, 460_800)])
def test_prompt_parameters_of_vit_base(*, deep: bool, count: int) -> None:
    model = inject_prompts(base(), 50, deep=deep)
    assert sum(p.numel() for p in model.prompts.parameters()) == count
    assert count_parameters(model).trainable == count


def test_xavier_bound() -> None:
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_base_patch16_224", depth=1, num_classes=0)
    model = inject_prompts(vit, 200, generator=torch.Generator().manual_seed(0))
    values = model.prompts.stored(0)
    bound = math.sqrt(6 / (3 * 16 * 16 + 768))
    assert bound == 0.0625
    # 153,600 uniform draws: the largest is within 1e-4 of the bound, the spread within 1 %.
    assert 0.999 * bound < float(values.detach().abs().max()) <= bound
    assert float(values.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_xavier_bound_of_several_widths_is_that_of_the_first() -> None:
    from test_fingerprint import swin

    prompts = inject_prompts(swin(), 200, generator=torch.Generator().manual_seed(0)).prompts
    assert [prompts.stored(i).shape[1] for i in prompts.entries] == [16, 32, 64, 64]
    bound = math.sqrt(6 / (3 * 4 * 4 + 16))
    for i in prompts.entries:
        # 3,200 uniform draws or more.
        assert 0.99 * bound < float(prompts.stored(i).detach().abs().max()) <= bound


def test_dropout_stands_behind_the_projection_alone() -> None:
    model = inject_prompts(build("timm/cls"), 6, project=5, dropout=0.5)
    tokens = model.eval().prompts(0, 1)
    drawn = model.train().prompts(0, 8)
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], (2 * tokens).expand_as(drawn)[kept])
    # 1,536 draws: a deviation of 0.013.
    assert 0.4 < float(kept.double().mean()) < 0.6


@pytest.mark.parametrize("init", ["normal", "zeros"])
def test_other_initialisations(init: str) -> None:
    model = inject_prompts(build("timm/cls"), 200, init=init)
    values = torch.cat([model.prompts.stored(i) for i in range(3)])
    expected = {"normal": 0.02, "zeros": 0.0}[init]
    assert float(values.detach().std()) == pytest.approx(expected, rel=0.05)


def test_init_from_values_and_its_spec() -> None:
    values = torch.randn(3, 4, 32)
    stacked = inject_prompts(build("timm/cls"), 4, init=values)
    listed = inject_prompts(build("timm/cls"), 4, init=list(values))
    for i in range(3):
        assert torch.equal(stacked.prompts.stored(i), values[i].double())
        assert torch.equal(listed.prompts.stored(i), values[i].double())
    assert stacked.prompts.spec.init == "tensor"


def test_a_generator_seeds_prompts_head_and_projection_and_spares_the_global_state() -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        options = {"project": 4, "num_classes": 3}
        generator = torch.Generator().manual_seed(seed)
        model = inject_prompts(build("timm/cls"), 2, generator=generator, **options)
        return {n: p.detach() for n, p in trainable_parameters(model).items()}

    first, again, other = values(1), values(1), values(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["prompts.0"], other["prompts.0"])
    model = build("timm/cls")
    state = torch.random.get_rng_state()
    inject_prompts(model, 2, num_classes=3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("options", SHALLOW_AND_DEEP)
@pytest.mark.parametrize("name", NAMES)
def test_only_prompts_and_head_train(name: str, options: dict[str, Any]) -> None:
    model = build(name)
    keys = list(model.state_dict())
    inject_prompts(model, 2, **options)
    head_paths = model.prompts.encoder.head.paths if model.prompts.encoder.head else ()
    names = list(trainable_parameters(model))
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.startswith(("prompts.", *(f"{p}." for p in head_paths))) for n in names)
    assert [k for k in model.state_dict() if not k.startswith("prompts.")] == keys
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()
    logits(model(image())).square().sum().backward()
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != (n in names), n


@pytest.mark.parametrize("pooling", ["default", "global"])
@pytest.mark.parametrize("options", SHALLOW_AND_DEEP)
@pytest.mark.parametrize("name", NAMES)
def test_removal_leaves_no_trace(name: str, options: dict[str, Any], pooling: str) -> None:
    model = build(name)
    if pooling == "global" and ("distilled" in name or "model" in name):
        pytest.skip("refused: no single classifier")
    next(model.parameters()).requires_grad_(False)
    torch.manual_seed(1)
    expected, before = logits(model(image())), snapshot(model)
    inject_prompts(model, 2, pooling=pooling, num_classes=None if "model" in name else 7, **options)
    torch.manual_seed(1)
    assert logits(model(image())).shape != expected.shape or "model" in name
    assert remove_prompts(model) is model
    assert not is_prompted(model)
    assert snapshot(model) == before
    torch.manual_seed(1)
    assert torch.equal(logits(model(image())), expected)


def snapshot(model: nn.Module) -> dict[str, Any]:
    parts: dict[str, Any] = {"keys": list(model.state_dict()), "class": type(model)}
    for name, module in model.named_modules():
        hooks = (dict(module._forward_hooks), dict(module._forward_pre_hooks))
        own = {k for k in vars(module) if not k.startswith("_output_capturing")}
        config = id(vars(module).get("config"))
        parts[name] = (id(module), hooks, own, module.training, config, vars(module).get("forward"))
        parts[f"{name}:count"] = (
            getattr(module, "num_classes", 0),
            getattr(module, "num_labels", 0),
        )
        parts[f"{name}:ignore"] = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    parts |= {f"grad:{n}": p.requires_grad for n, p in model.named_parameters()}
    return parts


def test_a_forward_of_somebody_else_survives_injection_and_removal() -> None:
    model = build("timm/cls")
    attention, calls = model.blocks[1].attn, []
    bound = type(attention).forward.__get__(attention)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return bound(*args, **kwargs)

    attention.forward = wrapper
    plain = copy.deepcopy(build("timm/cls"))
    inject_prompts(model, 2, generator=torch.Generator().manual_seed(0))
    inject_prompts(plain, 2, generator=torch.Generator().manual_seed(0))
    calls.clear()
    assert torch.equal(model(image()), plain(image()))
    assert calls == [1]
    remove_prompts(model)
    assert attention.forward is wrapper


def test_removal_refuses_while_somebody_wraps_our_forward() -> None:
    model = inject_prompts(build("timm/cls"), 2)
    attention = model.blocks[1].attn
    ours = attention.forward
    attention.forward = lambda *a, **k: ours(*a, **k)
    before = logits(model(image()))
    with pytest.raises(ValueError, match=r"another library has wrapped Attention\.forward"):
        remove_prompts(model)
    assert torch.equal(logits(model(image())), before)
    attention.forward = ours
    remove_prompts(model)


@pytest.mark.parametrize("name", NAMES)
def test_disabled_prompts_give_the_bare_backbone_with_the_task_head(name: str) -> None:
    model = build(name)
    torch.manual_seed(1)
    bare = logits(model(image()))
    inject_prompts(model, 2)
    torch.manual_seed(1)
    prompted = logits(model(image()))
    with disable_prompts(model):
        torch.manual_seed(1)
        assert torch.equal(logits(model(image())), bare)
    torch.manual_seed(1)
    assert torch.equal(logits(model(image())), prompted)
    assert not torch.equal(prompted, bare)


def test_disabling_belongs_to_a_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = inject_prompts(build("timm/cls"), 2)
    prompted = model(image())
    with disable_prompts(model), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(model, image()).result()
        here = model(image())
    assert torch.equal(elsewhere, prompted)
    assert not torch.equal(here, prompted)


@pytest.mark.parametrize("name", NAMES)
def test_training_mode_leaves_the_frozen_backbone_in_eval(name: str) -> None:
    model = inject_prompts(build(name).train(), 2)
    head = model.prompts.encoder.head
    allowed = {id(m) for m in model.prompts.modules()} | {id(model)}
    for path in head.paths if head else ():
        allowed |= {id(m) for m in model.get_submodule(path).modules()}
    for mode in (True, False, True):
        assert model.train(mode) is model
        for module in model.modules():
            assert module.training == (mode and id(module) in allowed)


@pytest.mark.parametrize("classes", [None, 0, 7])
def test_heads(classes: int | None) -> None:
    model = build("timm/cls")
    former = model.head
    inject_prompts(model, 2, num_classes=classes, generator=torch.Generator().manual_seed(0))
    assert model(image()).shape[1] == {None: CLASSES, 0: 32, 7: 7}[classes]
    assert (model.head is former) == (classes is None)
    if classes:
        assert model.num_classes == classes
        assert not model.head.bias.detach().any()
        assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("name", ["timm/cls", "transformers/vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prompts_and_head_follow_the_dtype(name: str, dtype: torch.dtype) -> None:
    model = inject_prompts(build(name, dtype), 2, num_classes=3)
    assert {p.dtype for p in trainable_parameters(model).values()} == {dtype}
    assert logits(model(image(dtype=dtype))).dtype == dtype
    model.to(torch.float64)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float64}
    assert logits(model(image())).dtype == torch.float64


@pytest.mark.parametrize("options", SHALLOW_AND_DEEP)
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("timm/")])
def test_timm_features_have_the_bare_shapes(name: str, options: dict[str, Any]) -> None:
    bare = build(name)
    model = inject_prompts(copy.deepcopy(bare), 3, **options)

    def shapes(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
        if isinstance(value, dict):
            return {k: shapes(v) for k, v in value.items()}
        return [shapes(v) for v in value]

    pixels = image()
    assert shapes(model.forward_features(pixels)) == shapes(bare.forward_features(pixels))
    assert shapes(model.get_intermediate_layers(pixels, 2)) == shapes(
        bare.get_intermediate_layers(pixels, 2)
    )
    for format_ in ("NCHW", "NLC"):
        for extra in (
            {},
            {"norm": True, "indices": [0, 1]},
            {"intermediates_only": True, "return_prefix_tokens": True},
            {"stop_early": True, "indices": [1]},
            {"output_dict": True, "return_prefix_tokens": True},
        ):
            calls = {"output_fmt": format_} | extra
            ours, theirs = (m.forward_intermediates(pixels, **calls) for m in (model, bare))
            assert shapes(ours) == shapes(theirs)


def test_carried_intermediates_are_the_tokens_of_the_oracle() -> None:
    import reference

    bare = build("timm/registers")
    model = inject_prompts(copy.deepcopy(bare), 3, deep=False, dropout=0)
    stem, blocks, prefix, _, _ = reference.anatomy(bare)
    tokens, values = stem(image()), {0: model.prompts.stored(0).detach()}
    got = model.forward_intermediates(image(), indices=[0, 1, 2], output_fmt="NLC")[1]
    for i, seen in enumerate(got):
        state, inside = reference.run_blocks(blocks[: i + 1], tokens, prefix, values, [(0, i)])
        torch.testing.assert_close(seen, reference.drop(state, prefix, inside)[:, prefix:])


@pytest.mark.parametrize("options", SHALLOW_AND_DEEP)
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("transformers/")])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_transformers_hidden_states_have_the_bare_shapes(
    name: str, options: dict[str, Any], *, as_tuple: bool
) -> None:
    bare = build(name)
    model = inject_prompts(copy.deepcopy(bare), 3, **options)

    def shapes(module: nn.Module) -> list[Any]:
        out = module(image(), output_hidden_states=True, return_dict=not as_tuple)
        values = out if as_tuple else out.to_tuple()
        return [[tuple(x.shape) for x in (v if isinstance(v, tuple) else (v,))] for v in values]

    assert shapes(model) == shapes(bare)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("transformers/")])
@pytest.mark.parametrize("options", [{}, {"deep": False}])
def test_attention_maps_hold_prompts_last(name: str, options: dict[str, Any]) -> None:
    bare = build(name)
    bare.set_attn_implementation("eager")
    model = inject_prompts(copy.deepcopy(bare), 3, dropout=0, **options)
    tokens = bare(image(), output_attentions=True).attentions[0].shape[-1]
    maps = model(image(), output_attentions=True).attentions
    assert [tuple(m.shape) for m in maps] == [(2, 2, tokens, tokens + 3)] * 3
    # Rows of a softmax in float32 sum to one up to its rounding.
    torch.testing.assert_close(
        maps[0].sum(-1).double(), torch.ones(2, 2, tokens).double(), rtol=0, atol=1e-5
    )


def test_submodule_of_a_larger_model_alone_is_frozen_and_counted() -> None:
    outer = nn.Module()
    outer.vit = build("timm/cls")
    outer.extra = nn.Linear(3, 3)
    inject_prompts(outer.vit, 2)
    assert outer.extra.weight.requires_grad
    assert count_parameters(outer.vit).total < count_parameters(outer).total
    outer.train()
    assert outer.extra.training
    assert not outer.vit.blocks.training


def test_encoder_inside_a_larger_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = build("timm/cls")

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.backbone(pixels)

    outer = Outer().eval()
    bare = outer(image())
    inject_prompts(outer, 2, num_classes=4)
    assert outer(image()).shape == (2, 4)
    assert all(n.startswith(("prompts.", "backbone.head.")) for n in trainable_parameters(outer))
    remove_prompts(outer)
    assert torch.equal(outer(image()), bare)


def test_two_models_of_one_config_stay_independent() -> None:
    transformers = pytest.importorskip("transformers")
    first = build("transformers/vit")
    second = transformers.ViTForImageClassification(first.config).double().eval()
    config = first.config
    inject_prompts(first, 2, num_classes=9)
    assert second.config is config
    assert second.config.num_labels == CLASSES
    assert first.config.num_labels == 9
    assert first.config.id2label[8] == "LABEL_8"
    assert logits(second(image())).shape == (2, CLASSES)
    inject_prompts(second, 3, num_classes=2)
    assert (first.config.num_labels, second.config.num_labels) == (9, 2)


def test_cache_is_used_in_inference_and_dropped_when_anything_changes() -> None:
    model = inject_prompts(build("timm/cls"), 2)
    form = model.prompts.forms[0]
    with torch.no_grad():
        before = model(image())
        pair = form._cache[1]
        model(image(4))
        assert form._cache[1] is pair
        changed = model.prompts.stored(0)
        changed.neg_()
        assert not torch.equal(model(image()), before)
        changed.neg_()
        assert torch.equal(model(image()), before)
        model.blocks[0].attn.qkv.weight.mul_(1.5)
        assert not torch.equal(model(image()), before)
    model.train()
    assert form._cache is None
    model.eval()
    model(image())
    assert form._cache is None, "gradients are on"
    with torch.no_grad():
        model(image())
        assert form._cache is not None
        model.float()
        assert form._cache is None
        model(image(dtype=torch.float32))
    assert copy.deepcopy(model).prompts.forms[0]._cache is None
    assert not any("cache" in key for key in model.state_dict())
    with torch.inference_mode():
        first = model(image(dtype=torch.float32))
    with torch.no_grad():
        assert torch.equal(model(image(dtype=torch.float32)), first)
        model.prompts.stored(0).data.neg_()
        model.prompts.clear_cache()
        assert not torch.equal(model(image(dtype=torch.float32)), first)


def test_no_gradient_work_in_front_of_the_first_prompted_block() -> None:
    model = inject_prompts(build("timm/cls"), 2, layers=(2,))
    states = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: states.append(out.requires_grad))
    model(image())
    assert states == [False, False, True]


def test_keys_are_projected_once_per_batch_and_per_sample_under_dropout() -> None:
    model = inject_prompts(build("timm/cls"), 2)
    form = model.prompts.forms[0]
    hidden = torch.randn(6, 17, 32).double()
    assert form.keys_values(hidden, 6)[0].shape == (1, 2, 2, 16)
    model.train()
    assert form.keys_values(hidden, 6)[0].shape == (6, 2, 2, 16)


def test_the_fused_activation_is_not_kept_beside_the_concatenation() -> None:
    model = inject_prompts(build("timm/cls"), 2, dropout=0)
    fused: list[torch.Tensor] = []  # kept alive, or a later tensor could get the same storage
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, a, out: fused.append(out))
    kept = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(image())
    assert fused
    assert not kept & {tensor.untyped_storage().data_ptr() for tensor in fused}
    out.sum().backward()


@pytest.mark.parametrize("style", ["hooked", "wrapped", "parametrized"])
def test_projections_that_are_not_plain_linear_layers_are_called(style: str) -> None:
    model = build("timm/cls")
    twin = copy.deepcopy(model)
    attention = model.blocks[0].attn
    if style == "wrapped":

        class Wrapped(nn.Module):
            def __init__(self, inner: nn.Linear) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 1.5 * self.inner(x)

        attention.qkv = Wrapped(attention.qkv)
    elif style == "hooked":
        attention.qkv.register_forward_hook(lambda m, a, out: 1.5 * out)
    else:
        nn.utils.parametrize.register_parametrization(attention.qkv, "weight", Scale())
        nn.utils.parametrize.register_parametrization(attention.qkv, "bias", Scale())
    with torch.no_grad():
        twin.blocks[0].attn.qkv.weight.mul_(1.5)
        twin.blocks[0].attn.qkv.bias.mul_(1.5)
    for one in (model, twin):
        inject_prompts(one, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(image()), twin(image()), rtol=1e-9, atol=1e-12)


class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * x


def test_repr_tells_entries_forms_counts_and_reasons() -> None:
    text = repr(inject_prompts(build("timm/cls"), 4, deep=False, layers=(0, 2)).prompts)
    assert "length=4, entries=[0, 2], parameters=256" in text
    assert "block 0, form=token (prompts are carried through several blocks)" in text
    assert "block 2, form=kv" in text


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("options", [{}, {"deep": False}])
def test_timm_attention_masks(*, is_causal: bool, boolean: bool, options: dict[str, Any]) -> None:
    model = build("timm/cls")
    kv = inject_prompts(copy.deepcopy(model), 3, layers=(0, 1, 2), dropout=0, **options)
    token = copy.deepcopy(kv)
    remove_prompts(token)
    values = torch.stack([kv.prompts.stored(i).detach() for i in range(3)])
    inject_prompts(token, 3, layers=(0, 1, 2), dropout=0, init=values, form="token", **options)
    mask = None
    if not is_causal:
        mask = torch.rand(17, 17) > 0.3
        mask |= torch.eye(17, dtype=torch.bool)
        mask = mask if boolean else torch.zeros(17, 17).double().masked_fill(~mask, -1e4)
    ours = kv(image(), attn_mask=mask, is_causal=is_causal)
    theirs = token(image(), attn_mask=mask, is_causal=is_causal)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.equal(ours, kv(image()))


def test_a_meta_model_is_checked_at_its_first_forward() -> None:
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer
    from zoo import BASE

    model = inject_prompts(VisionTransformer(**BASE, device="meta"), 2)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    model.eval()(image(dtype=torch.float32))
    assert all(form._watch is None for form in model.prompts.forms)


def test_the_cache_sees_fused_optimizers_which_do_not_count_versions() -> None:
    model = inject_prompts(build("timm/cls", torch.float32), 2)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.5, fused=True)
    pixels = image(dtype=torch.float32)
    with torch.no_grad():
        model(pixels)
    model(pixels).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        cached = model(pixels)
        model.prompts.clear_cache()
        assert torch.equal(cached, model(pixels))


def test_threads_with_and_without_autocast_share_a_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = inject_prompts(build("timm/cls", torch.float32), 2)
    pixels = image(dtype=torch.float32)

    @torch.no_grad()
    def run(half: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return [model(pixels) for _ in range(50)]

    expected = {half: run(half)[0] for half in (False, True)}
    with ThreadPoolExecutor(4) as pool:
        for half, outs in zip([False, True] * 2, pool.map(run, [False, True] * 2), strict=True):
            assert all(torch.equal(out, expected[half]) for out in outs)


@pytest.mark.parametrize("options", [{"deep": False}, {"form": "token"}])
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("kind", ["Beit", "Dinov2", "Dinov2WithRegisters"])
def test_backbones_keep_their_feature_maps(
    kind: str, options: dict[str, Any], *, as_tuple: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    from zoo import VIT

    values = VIT | {"out_features": ["stage1", "stage3"], "reshape_hidden_states": True}
    bare = getattr(transformers, f"{kind}Backbone")(
        getattr(transformers, f"{kind}Config")(**values, attn_implementation="eager")
    ).eval()
    model = inject_prompts(copy.deepcopy(bare), 3, **options)

    def shapes(module: nn.Module) -> Any:
        out = module(
            image(dtype=torch.float32),
            output_hidden_states=True,
            output_attentions=True,
            return_dict=not as_tuple,
        )
        groups = out if as_tuple else out.to_tuple()
        return [[tuple(x.shape) for x in group] for group in groups]

    maps, states, attentions = shapes(model)
    assert [maps, states] == shapes(bare)[:2]
    tokens = states[0][1]
    assert attentions == [(2, 2, tokens, tokens + 3)] * 3


@pytest.mark.parametrize("as_tuple", [False, True])
def test_attention_maps_of_the_token_form(*, as_tuple: bool) -> None:
    bare = build("transformers/vit-model")
    bare.set_attn_implementation("eager")
    for options in ({"form": "token"}, {"deep": False}):
        model = inject_prompts(copy.deepcopy(bare), 3, **options)
        out = model(image(), output_attentions=True, return_dict=not as_tuple)
        maps = out[-1] if as_tuple else out.attentions
        assert [tuple(m.shape) for m in maps] == [(2, 2, 17, 20)] * 3


def test_selected_hidden_states() -> None:
    model = inject_prompts(build("transformers/vit"), 3, deep=False)
    states = model(image(), output_hidden_states=[1]).hidden_states
    assert [s is None or tuple(s.shape) for s in states] == [True, (2, 17, 32), True, True]


def test_pooling_keeps_nothing_beyond_the_forward_and_refuses_a_lone_head() -> None:
    import gc
    import weakref

    model = inject_prompts(build("timm/cls"), 3, pooling="image", num_classes=4)
    kept: list[Any] = []
    model.norm.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
    model(image())
    features = model.forward_features(image())
    with pytest.raises(ValueError, match="outside the model's own forward"):
        model.forward_head(features)
    del features
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_pooling_survives_a_new_classifier() -> None:
    import reference

    bare = build("timm/cls")
    model = inject_prompts(copy.deepcopy(bare), 3, pooling="image", dropout=0)
    model.reset_classifier(7)
    model.head.double()
    bare.head = model.head
    prompts = {i: model.prompts.stored(i) for i in range(3)}
    expected = reference.predict(
        bare, image(), prompts, [(i, i) for i in range(3)], pooling="image"
    )
    torch.testing.assert_close(model(image()), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pooling", ["prompt", "global"])
def test_normed_intermediates_under_prompt_pooling(pooling: str) -> None:
    bare = build("timm/cls")
    model = inject_prompts(copy.deepcopy(bare), 3, pooling=pooling)
    for options in ({"n": [0], "norm": True}, {"n": [2], "norm": True}, {"n": 3}):
        ours = model.get_intermediate_layers(image(), **options)
        theirs = bare.get_intermediate_layers(image(), **options)
        assert [x.shape for x in ours] == [x.shape for x in theirs]


def test_removal_restores_training_flags_and_a_head_trained_in_place() -> None:
    model = build("timm/cls").train()
    model.blocks[0].eval()
    flags = {n: m.training for n, m in model.named_modules()}
    expected = build("timm/cls")(image())
    inject_prompts(model, 2)
    model(image()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    remove_prompts(model)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert torch.equal(model.eval()(image()), expected)
    assert all(p.grad is None for p in model.parameters())


def test_the_former_head_follows_the_dtype() -> None:
    model = inject_prompts(build("timm/cls", torch.float32), 2, num_classes=4)
    model.double()
    assert remove_prompts(model)(image()).shape == (2, CLASSES)


def test_a_wrapped_forward_is_called_for_projections_written_as_matmuls() -> None:
    class MatmulLora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.down = nn.Parameter(torch.randn(32, 2).double())
            self.up = nn.Parameter(torch.randn(2, 96).double())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + x @ self.down @ self.up

    model = build("timm/cls")
    model.blocks[0].attn.qkv = MatmulLora(model.blocks[0].attn.qkv)
    out = {}
    for form in ("kv", "token"):
        generator = torch.Generator().manual_seed(0)
        out[form] = inject_prompts(model, 2, form=form, generator=generator, dropout=0)(image())
        remove_prompts(model)
    torch.testing.assert_close(out["kv"], out["token"], rtol=1e-9, atol=1e-12)
