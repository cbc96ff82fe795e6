"""A network's tensors: their digest."""

import hashlib

import numpy as np
import torch


def digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of a model's tensors."""
    total = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous()
        total.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        total.update(np.ascontiguousarray(array.view(-1).view(torch.uint8).numpy()))
    return total.hexdigest()
