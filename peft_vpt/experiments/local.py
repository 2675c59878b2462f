"""A timm model with weights from a local file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import VPTError
from ..source import hub_errors


def build_from_file(
    name: str, weights: str | Path, size: int | tuple[int, int] | None = None, **options: Any
) -> nn.Module:
    """Build a timm model in eval mode, with the weights of a safetensors file.

    Args:
        name: timm's name, also `timm/...` or `hf-hub:...`.
        weights: The file.
        size: Edge of the images, or height and width. None: the model's own.
        options: Of `timm.create_model`.

    Raises:
        VPTError: There is no such file, or it does not fit.
    """
    import timm

    if not Path(weights).is_file():
        raise VPTError(
            f"--weights: {weights} is no file; give the safetensors file of a timm model's weights."
        )
    entry = name.removeprefix("hf-hub:").removeprefix("timm/")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}, **options}
    edges = (size, size) if isinstance(size, int) else size
    with hub_errors("--weights", f"{entry} from {weights}"):
        try:
            sized: dict[str, Any] = {} if edges is None else {"img_size": edges}
            model: nn.Module = timm.create_model(entry, **sized, **options)
        except TypeError:
            if edges is None:
                raise
            # Convolutional models take images of any size and no such argument.
            model = timm.create_model(entry, **options)
    return model.eval()
