"""Kinds of head: each knows its tensors in a model and in a file, and how a model comes to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.anatomy import Encoder, is_kind
from ..backbones.heads import FormerHead, class_count
from ..backbones.identity import label_names
from ..prompts import Prompts
from ..protocols.modules import MlpHead
from ..undo import decoder_names, has_decoder
from .file import Adapter
from .layout import Shapes
from .schema import Fail

# In the order of the paths of `Encoder.head`; distilled DeiT has two.
_NAMES = ("head", "head_dist")
# What the decoder of a transformers model makes, by the end of the model's class name.
_TASKS = {
    "Segmentation": "image-segmentation",
    "DepthEstimation": "depth-estimation",
    "ObjectDetection": "object-detection",
}
_KEEP = "`strict='prompts'` loads the prompts alone"
About = Mapping[str, Any]


class Kind:
    """A linear classifier, and what other kinds take over from it.

    Methods take the model (a `Segmenter` is one, not its backbone), its anatomy, and `about`:
    `head` of the metadata, which `describe` writes.
    """

    # What a card calls it.
    words = "classification head"
    # Whether its output is one label of an image.
    classifies = True
    # Whether the model must be built with the file's number of classes.
    fixed = False
    # Whether a decoder around the encoder is the head, and trains whole.
    decoder = False
    # Whether it stands around a backbone, in a model of this library.
    wraps = False

    def task(self, about: About) -> str | None:
        """Return what the Hub calls the task, None where it is not known."""
        return "image-classification"

    def output(self, about: About) -> str | None:
        """Return what comes out: the "label" of an image, "classes" of pixels, None: another."""
        return "label"

    def names(self, model: nn.Module, encoder: Encoder) -> dict[str, str]:
        """Return where each tensor of the file lives: its name in the model's `state_dict`."""
        found: dict[str, str] = {}
        for name, path in zip(_NAMES, encoder.head_paths, strict=False):
            module = model.get_submodule(path)
            prefix = name if isinstance(module, nn.Linear) else f"{name}.module"
            found |= {f"{prefix}.{key}": f"{path}.{key}" for key in _floats(module)}
        return found

    def tensors(self, model: nn.Module, encoder: Encoder) -> dict[str, Tensor]:
        """Return what a file holds of the head of a model."""
        state = _floats(model) if (names := self.names(model, encoder)) else {}
        return {name: state[inside] for name, inside in names.items()}

    def shapes(self, about: About, model: nn.Module, encoder: Encoder) -> Shapes:
        """Return names and shapes of the tensors that a file must hold."""
        if encoder.head is None or not encoder.head.simple:
            return self._own_shapes(model, encoder)
        classes, width = about["classes"], about["in_features"]
        shapes: Shapes = {}
        for name in _NAMES[: len(encoder.head.paths)]:
            shapes[f"{name}.weight"] = (classes, width)
            if about.get("bias", True):
                shapes[f"{name}.bias"] = (classes,)
        return shapes

    def check(
        self, about: About, model: nn.Module, encoder: Encoder, pooling: str, fail: Fail
    ) -> None:
        """Refuse a model whose head is another, and cannot become this.

        Raises:
            AdapterMismatchError: It is of another kind or size.
        """
        reads = None if encoder.head is None else encoder.reads(pooling)
        if encoder.head is None or reads != about["reads"]:
            has = "has no classifier" if reads is None else f"has a head that reads {reads!r}"
            raise fail(f"its head reads {about['reads']!r}, this model {has}", _KEEP)
        width = encoder.head.width if pooling == "default" else encoder.blocks[-1].width
        if about["in_features"] != width:
            raise fail(
                f"its head takes {about['in_features']} features, this model gives {width}", _KEEP
            )
        self._check_class(about, model, encoder, fail)

    def _check_class(self, about: About, model: nn.Module, encoder: Encoder, fail: Fail) -> None:
        assert encoder.head is not None
        classes = class_count(model, encoder.head)
        if not encoder.head.simple and classes != about["classes"]:
            raise fail(
                f"its head has {about['classes']} classes, this model's, which is more than one "
                f"linear layer, {classes}",
                f"call the model's own `reset_classifier({about['classes']})` first, or {_KEEP}",
            )

    def build(self, about: About, model: nn.Module, encoder: Encoder) -> int | None:
        """Return the classes of the linear head that injection puts in; None: the model's stays."""
        return int(about["classes"]) if encoder.head is not None and encoder.head.simple else None

    def describe(self, model: nn.Module, prompts: Prompts) -> dict[str, Any] | None:
        """Return `head` of the metadata, without labels."""
        head = prompts.encoder.head
        assert head is not None
        module = model.get_submodule(head.paths[0])
        about = {
            "classes": class_count(model, head),
            "in_features": int(getattr(module, "in_features", head.width)),
            "reads": prompts.encoder.reads(prompts.spec.pooling),
        }
        if not isinstance(module, nn.Linear):
            return about | {"class": type(module).__name__}
        return about if module.bias is not None else about | {"bias": False}

    def labels(self, model: nn.Module, prompts: Prompts) -> list[str] | None:
        """Return the names of the classes that a model knows, or None."""
        return label_names(model, prompts.encoder) or prompts.info.get("labels")

    def _own_shapes(self, model: nn.Module, encoder: Encoder) -> Shapes:
        return {name: tuple(t.shape) for name, t in self.tensors(model, encoder).items()}


class Module(Kind):
    """Any other classifier: it loads into one of the same class."""

    fixed = True

    def shapes(self, about: About, model: nn.Module, encoder: Encoder) -> Shapes:
        """Return those of the model's own head."""
        return self._own_shapes(model, encoder)

    def _check_class(self, about: About, model: nn.Module, encoder: Encoder, fail: Fail) -> None:
        assert encoder.head is not None
        own = type(model.get_submodule(encoder.head.paths[0])).__name__
        if about["class"] != own:
            raise fail(
                f"its head is a {about['class']}, which only the same class can take, this "
                f"model's is a {own}",
                _KEEP,
            )
        super()._check_class(about, model, encoder, fail)

    def build(self, about: About, model: nn.Module, encoder: Encoder) -> int | None:
        """Fill the head that the model has."""
        return None


class Mlp(Kind):
    """The head of several layers that a protocol puts in."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def shapes(self, about: About, model: nn.Module, encoder: Encoder) -> Shapes:
        """Return those of the layers that the protocol names, which are not built."""
        with torch.device("meta"):
            module = MlpHead(about["in_features"], about["classes"], self.layers)
        return {f"head.module.{name}": tuple(t.shape) for name, t in _floats(module).items()}

    def _check_class(self, about: About, model: nn.Module, encoder: Encoder, fail: Fail) -> None:
        pass


class Nothing(Kind):
    """No head: the adapter was made on a model without a classifier."""

    words, classifies = "", False

    def task(self, about: About) -> str | None:
        """Return the task of a model that gives features."""
        return "image-feature-extraction"

    def output(self, about: About) -> str | None:
        """Return that no answer comes out."""
        return None

    def shapes(self, about: About, model: nn.Module, encoder: Encoder) -> Shapes:
        """Return nothing."""
        return {}

    def check(
        self, about: About, model: nn.Module, encoder: Encoder, pooling: str, fail: Fail
    ) -> None:
        """Take every model."""

    def build(self, about: About, model: nn.Module, encoder: Encoder) -> int | None:
        """Take out the classifier that the model has without any adapter."""
        if encoder.head is None or not encoder.head.simple:
            return None
        prompts = getattr(model, "prompts", None)
        former = prompts.undo["head"] if isinstance(prompts, Prompts) else None
        own = former.classes if isinstance(former, FormerHead) else class_count(model, encoder.head)
        return 0 if own else None

    def describe(self, model: nn.Module, prompts: Prompts) -> dict[str, Any] | None:
        """Return null."""
        return None


class Decoder(Module):
    """The decoder of a whole model, with its classifier; the encoder inside carries the prompts."""

    words, decoder, classifies = "decoder", True, False
    reads = "encoder"

    def task(self, about: About) -> str | None:
        """Return what such a decoder makes."""
        name = str(about.get("class"))
        return next((task for end, task in _TASKS.items() if name.endswith(end)), None)

    def output(self, about: About) -> str | None:
        """Return what is known of the transformers class."""
        semantic = str(about.get("class")).endswith("ForSemanticSegmentation")
        return "classes" if semantic else None

    def names(self, model: nn.Module, encoder: Encoder) -> dict[str, str]:
        """Return what is outside the encoder, by its names in the model."""
        apart = set(decoder_names(model, encoder))
        heads = tuple(f"{path}." for path in encoder.head_paths)
        inside = [n for n in _floats(model) if n in apart or (heads and n.startswith(heads))]
        return {f"head.module.{name}": name for name in inside}

    def check(
        self, about: About, model: nn.Module, encoder: Encoder, pooling: str, fail: Fail
    ) -> None:
        """Refuse models of another class or size."""
        if not decoder_names(model, encoder) or about.get("class") != type(model).__name__:
            raise fail(
                f"it holds the decoder of a {about.get('class')}, which only the same class can "
                f"take, this model is a {type(model).__name__}",
                _KEEP,
            )
        for name, own in self._sizes(model, encoder).items():
            if about[name] != own:
                raise fail(
                    f"its decoder has {name} {about[name]}, this model's has {own}",
                    f"build the model for that many; {_KEEP}",
                )

    def describe(self, model: nn.Module, prompts: Prompts) -> dict[str, Any] | None:
        """Return sizes, and the class of the whole model."""
        sizes = self._sizes(model, prompts.encoder)
        return {**sizes, "reads": self.reads, "class": type(model).__name__}

    def _sizes(self, model: nn.Module, encoder: Encoder) -> dict[str, int]:
        """Return the sizes of the first and the last weight."""
        state = model.state_dict()
        weights = [state[n] for n in decoder_names(model, encoder) if state[n].dim() > 1]
        first, last = (weights[0].shape[1], weights[-1].shape[0]) if weights else (1, 1)
        classes = getattr(getattr(model, "config", None), "num_labels", last)
        return {"classes": int(classes), "in_features": int(first)}


class SegmenterHead(Module):
    """The decoder of a `Segmenter`, which stands around a backbone and reads all its tokens."""

    words, classifies, fixed, wraps = "decoder", False, False, True
    reads = "tokens"

    def task(self, about: About) -> str | None:
        """Return the task of a segmenter."""
        return "image-segmentation"

    def output(self, about: About) -> str | None:
        """Return that pixels get classes."""
        return "classes"

    def names(self, model: Any, encoder: Encoder) -> dict[str, str]:
        """Return parameters and running statistics."""
        return {f"head.module.{name}": f"decoder.{name}" for name in _floats(model.decoder)}

    def describe(self, model: Any, prompts: Prompts) -> dict[str, Any] | None:
        """Return the decoder's class and sizes."""
        return {
            "class": type(model.decoder).__name__,
            "classes": model.classes,
            "in_features": model.decoder.norm.weight.numel(),
            "reads": self.reads,
        }

    def labels(self, model: Any, prompts: Prompts) -> list[str] | None:
        """Return the names that the segmenter knows."""
        names: list[str] | None = model.labels
        return names


LINEAR, MODULE, NOTHING = Kind(), Module(), Nothing()
DECODER, SEGMENTER = Decoder(), SegmenterHead()


def kind_of(adapter: Adapter) -> Kind:
    """Return the kind of head that a file holds."""
    about, protocol = adapter.metadata["head"], adapter.protocol
    if about is None:
        return NOTHING
    for kind in (DECODER, SEGMENTER):
        if about["reads"] == kind.reads:
            return kind
    if protocol is not None and protocol.head_layers:
        return Mlp(protocol.head_layers)
    return MODULE if "class" in about else LINEAR


def kind_in(model: nn.Module, prompts: Prompts) -> Kind:
    """Return the kind of head that a model has beside its prompts."""
    if is_segmenter(model):
        return SEGMENTER
    if has_decoder(prompts):
        return DECODER
    return LINEAR if LINEAR.names(model, prompts.encoder) else NOTHING


def is_segmenter(model: nn.Module) -> bool:
    """Tell whether a model is a `Segmenter`, whose backbone carries the prompts."""
    return is_kind(model, "Segmenter", "peft_vpt.segmentation")


def _floats(module: nn.Module) -> dict[str, Tensor]:
    """Return what is a floating tensor in a `state_dict`; quantized layers have more in theirs."""
    state = module.state_dict(keep_vars=True).items()
    return {k: t for k, t in state if isinstance(t, Tensor) and t.is_floating_point()}
