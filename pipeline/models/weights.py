"""Weights from a file: reading it without running anything in it, and finding a network's among what it holds."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.schema import LibraryModel


class _Placeholder:
    """Stands for whatever a checkpoint holds beside tensors and plain values, such as a training script's arguments."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file or of what torch.save wrote, by their names; nested ones as outer.inner.

    Nothing in the file runs: objects of other kinds than tensors and plain values are replaced by inert placeholders.
    Raises UserError for a file that cannot be read so.
    """
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "it is no regular file" if path.exists() else "there is no such file"
        raise UserError(f"cannot load weights {path} ({found}); give a .safetensors or .pth state dict")
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_placeholders(path)):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load weights {path} ({found}); give a .safetensors or .pth state dict")
    return dict(_flattened(checkpoint))


def _is_safetensors(path: Path) -> bool:
    """Whether a file, of any name, begins as safetensors do: the length of a header, which is JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def given_weights(
    section: LibraryModel, network: nn.Module, last: str, download: Callable[..., dict] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that a section's `weights` name: `download`s, or those of a file that are `network`'s, by their names.

    `last`: the name of the last layer, which need not be there. Where a file has none of that network, all of its tensors.
    """
    if download:
        try:
            return download(progress=False)
        except Exception as error:
            found = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"cannot load weights {section.weights} of {section.architecture} ({found}); give a .safetensors or .pth file"
            )
    tensors = read_tensors(Path(section.weights).expanduser())
    parts = find_network(tensors, [name for name in required_names(network) if name.rpartition(".")[0] != last])
    if len(parts) > 1:
        raise UserError(
            f"weights {section.weights} hold the network {len(parts)} times: under {', '.join(map(repr, parts))}; "
            "save the one you mean to a file of its own"
        )
    return next(iter(parts.values()), tensors)


def required_names(network: nn.Module) -> list[str]:
    """Of all tensors of a network, those that its answers depend on: batch normalisation's counters it can do without."""
    return [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]


def find_network(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, dict[str, torch.Tensor]]:
    """The parts of a checkpoint in which all of a network's `names` stand, by their prefix, such as "" or "state_dict.model.".

    A part holds all that its prefix begins, by the names that remain.
    """
    longest = max(names, key=len)
    prefixes = [key.removesuffix(longest) for key in tensors if key == longest or key.endswith(f".{longest}")]
    return {prefix: part_under(tensors, prefix) for prefix in prefixes if all(f"{prefix}{name}" in tensors for name in names)}


def nearest_part(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> tuple[str, dict[str, torch.Tensor]]:
    """The prefix and the tensors of the part that has the most of `names`: what to compare a missing network with."""
    prefixes = {key.removesuffix(name) for key in tensors for name in names if key == name or key.endswith(f".{name}")}
    parts = {prefix: part_under(tensors, prefix) for prefix in sorted({"", *prefixes})}
    return max(parts.items(), key=lambda part: len(part[1].keys() & set(names)))


def part_under(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by what remains of them."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _placeholders(path: Path) -> list[tuple[type, str]]:
    """A placeholder for every name that the file would import and that torch does not know to be harmless."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # of a format that torch reads without them, or refuses
        names = []
    return [(type(name, (_Placeholder,), {}), name) for name in names]


def _flattened(checkpoint, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(checkpoint, torch.Tensor):
        yield prefix.removesuffix("."), checkpoint
    elif isinstance(checkpoint, Mapping):
        for key, value in checkpoint.items():
            yield from _flattened(value, f"{prefix}{key}.")
