"""Weights from a file: reading it without running anything in it, and what of it a network takes."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.schema import TorchvisionModel


def read_weights(section: TorchvisionModel, download: Callable[..., dict] | None) -> dict[str, torch.Tensor]:
    """The tensors that `section` names: `download`s, or those of a local .safetensors or .pth file."""
    try:
        if download:
            return download(progress=False)
        path = Path(section.weights).expanduser()
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what, found = f"{section.weights} of {section.architecture}", f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load weights {what} ({found}); give a .safetensors or .pth state dict")
