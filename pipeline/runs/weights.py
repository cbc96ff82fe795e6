"""A network's tensors: their digest, and safetensors files of them whose header carries a checksum."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from offline_bkd.cache.storage import open_regular
from offline_bkd.pipeline.runs.checksums import CHANGED, HASH, parse_json


def digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of a model's tensors."""
    total = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous()
        total.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        total.update(np.ascontiguousarray(array.view(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def to_safetensors(tensors: dict[str, torch.Tensor], metadata: dict) -> bytes:
    """A safetensors file's bytes; `metadata` (JSON values) and a checksum are in its header, each as JSON."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = {name: json.dumps(value) for name, value in metadata.items()}
    return save(tensors, metadata=header | {"checksum": _checksum(tensors, header)})


def from_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors, on the CPU, and the metadata of a file of `to_safetensors`.

    Raises OSError or ValueError where it cannot be read, or was changed after it was written.
    """
    open_regular(path).close()  # safetensors would wait for a pipe's other end
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    checksum = header.pop("checksum", None)  # files of earlier versions have none
    if checksum is None and any(HASH in value for value in header.values()):
        raise ValueError(CHANGED)
    if checksum is not None and checksum != _checksum(tensors, header):
        raise ValueError(CHANGED)
    return tensors, {name: parse_json(value) for name, value in header.items()}


def _checksum(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> str:
    text = digest(tensors) + json.dumps(header, sort_keys=True)
    return json.dumps(HASH + hashlib.sha256(text.encode()).hexdigest())
