"""Dump the answers of any network, from a script."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pydantic import ValidationError

from offline_bkd.cache import CropFlip, RandomResizedCrop
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.config import explain
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.dataset import Dataset
from offline_bkd.pipeline.data.images import ImageSource, open_images
from offline_bkd.pipeline.device import repeatable
from offline_bkd.pipeline.dump.parts import Blocks, own_part
from offline_bkd.pipeline.dump.writing import Prepared, Store, write_stores
from offline_bkd.pipeline.schema import CacheSection, Experiment
from offline_bkd.pipeline.teachers import Teachers


def dump(
    network: Callable[[torch.Tensor], torch.Tensor],
    data: Experiment | Dataset,
    views: CropFlip | RandomResizedCrop,
    out: str,
    *,
    temperature: float = 2.0,
    encoding: dict | None = None,
    teacher: str | None = None,
    batch_size: int = 512,
    device: str | torch.device | None = None,
    workers: int = 2,
    resume: bool = False,
    blocks: Blocks | None = None,
) -> None:
    """Writes the answers of any network to all `views` of a training set into the store `out`.

    network: an nn.Module, or any callable, from uint8 images [B, 3, S, S] to logits [B, C]; it normalises them itself.
    data: an experiment, whose training part is meant, or a part of a data set.  encoding: as in `cache.encoding`; None: the
    default.  teacher: says whose answers they are, beside the digest of a module's weights, or where there are none.
    blocks: only these (view, block), while other processes write others; whoever comes first creates the store (see
    `dump_logits`).  device: where the network runs meanwhile; None: where it is. Afterwards it is where it was, and in the
    mode that it was in.

    Raises UserError where the network cannot be told from another or does not answer logits, and for settings that make no
    sense, CacheError where the store cannot be written.
    """
    if not teacher and not (isinstance(network, torch.nn.Module) and network.state_dict()):
        raise UserError('a network without weights of its own has no digest; say whose answers they are with teacher="…"')
    training_set = datasets.load(data.data).training if isinstance(data, Experiment) else data
    if not (isinstance(training_set, Dataset) and isinstance(views, CropFlip | RandomResizedCrop)):
        found = f"{type(training_set).__name__} and {type(views).__name__}"
        raise UserError(f"dump takes the data and the views of an experiment, found {found}; see config.load_config")
    settings = {"temperature": temperature, "batch_size": batch_size} | ({"encoding": encoding} if encoding else {})
    try:
        section = CacheSection(**settings)
    except ValidationError as error:
        raise UserError("; ".join(f"{key}: {message}" for key, message in explain(error, CacheSection))) from None
    module = network if isinstance(network, torch.nn.Module) else _Called(network)
    digest = runs.digest(module.state_dict())  # with a name, of both: neither may change between two parts of a dump
    if teacher:
        digest = hashlib.sha256(f"{digest}\n{teacher}".encode()).hexdigest()
    store = Store(os.fspath(out), {"digest": digest, **({"name": teacher} if teacher else {})}, {}, [0])
    own = own_part(None, blocks)
    with _lent(module, device) as device:
        images = open_images(training_set, views, device, workers)
        _refuse_answers(module, images, len(training_set.classes))
        prepared = Prepared(training_set, images, Teachers([module], features=False), ["network"], [store], [])
        write_stores(prepared, views, section, resume or blocks is not None, own)


@contextmanager
def _lent(module: torch.nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The module in evaluation mode on `device`, or where it is, for as long as the context lasts; gives the device."""
    training = {part: part.training for part in module.modules()}
    home = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
    away = home if device is None else torch.device(device)
    try:
        module.eval().to(away)
        with repeatable():
            yield away
    finally:
        module.to(home)
        for part, mode in training.items():
            part.training = mode


def _refuse_answers(network: torch.nn.Module, images: ImageSource, classes: int) -> None:
    """Raises UserError where the answers to a few images are not logits of `classes`."""
    rows = np.arange(min(8, len(images.label)))
    (batch,) = images.batches(rows, np.zeros_like(rows), len(rows))
    with torch.no_grad():
        logits = network(batch.images)
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(rows), classes):
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"the network answers {len(rows)} images by {found}, not by logits [{len(rows)}, {classes}]; wrap it")
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise UserError("the network answers probabilities, not logits; leave out its softmax, or give their logarithms")


class _Called(torch.nn.Module):
    """A callable as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.function(images)
