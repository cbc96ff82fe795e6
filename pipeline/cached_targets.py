"""A cache beside a data set of one's own, for any training loop: the crop of an epoch and the teacher's answer to it.

Shapes: N samples, C classes, S the side of a crop.
"""

import math
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from offline_bkd.cache import Cache, CacheError, CropFlip, RandomResizedCrop, open_cache
from offline_bkd.cache.format import whole_numbers
from offline_bkd.pipeline.data import decoding
from offline_bkd.pipeline.show.terminal import counted
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.targets import soften


class CachedSample(NamedTuple):
    image: Any  # the crop, uint8 [3, S, S], or what `transform` makes of it
    label: int
    sample_id: int  # as the cache names the sample
    view: int  # the number of the crop
    target: torch.Tensor  # float32 [C], the teacher's softened probabilities for this very crop


class ViewCrop:
    """The crop of a numbered view, for people who keep their own data set class."""

    def __init__(self, views: CropFlip | RandomResizedCrop):
        self.views = views

    def __call__(self, image: Image.Image | np.ndarray, sample_id: int, view: int) -> torch.Tensor:
        """Of a whole image, PIL or uint8 [H, W, 3], upright: uint8 [3, S, S], the pixels that the teacher answered to.

        Raises ValueError for anything else, and for a view that there is not.
        """
        image = whole_image(image)
        boxes = self.views.boxes(
            np.array([sample_id]), whole_numbers(view, "view", self.views.count), np.array([image.size[::-1]])
        )
        top, left, height, width, flip = (int(values[0]) for values in boxes)
        crop = image.crop((left, top, left + width, top + height))  # black beyond the border
        if isinstance(self.views, RandomResizedCrop):
            crop = crop.resize((self.views.size, self.views.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop)[:, :: -1 if flip else 1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def whole_image(image: Image.Image | np.ndarray) -> Image.Image:
    """In RGB, as a teacher saw it. Raises ValueError for what is neither a PIL image nor uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return decoding.rgb(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return Image.fromarray(image)
    found = " ".join(str(getattr(image, name)) for name in ("dtype", "shape") if hasattr(image, name))
    raise ValueError(f"an image is PIL's or uint8 [H, W, 3], whole and not a tensor; found a {type(image).__name__} {found}")


def _make_room(file: BinaryIO, size: int) -> None:
    """Takes `size` bytes of the disk for the new `file`, which is to be mapped. Raises CacheError where they are not there.

    A mapped file that finds no room when it is written to ends the process without a word.
    """
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise CacheError(
            f"{math.ceil(size / 1e6):,} MB of planes find no place: {error.strerror}; name another scratch folder"
        ) from error


def _natural(value: int, what: str) -> int:
    if isinstance(value, int | np.integer) and 0 <= value < 2**63:
        return int(value)
    raise ValueError(f"{what} is a whole number from 0 to 2^63 - 1; found {value!r}")


class CachedTargets(torch.utils.data.Dataset):
    """A data set of (whole image, label) pairs with a cache's targets beside: item i is a CachedSample.

    Every sample's view follows from `seed`, the epoch and its id alone, so that workers, shuffling and restarts change
    nothing; call `set_epoch` before each epoch. A cache whose views are crops of the image's own size is held whole in a
    scratch file; of another the plane of the epoch.
    """

    def __init__(
        self,
        cache: Cache | str | Path,
        dataset: Sequence,
        *,
        seed: int = 0,
        temperature: float | None = None,
        sample_id: Sequence[int] | None = None,
        transform: Callable[[torch.Tensor], Any] | None = None,
        scratch: str | Path | None = None,
    ):
        """`dataset[i]` is (PIL image or uint8 [H, W, 3], label), neither cropped nor augmented.

        temperature: of the targets; None: the cache's.  sample_id: the cache's sample of each item; None: all of them, in
        the cache's order.  transform: of the crop.  scratch: a folder on a fast disk.

        Raises CacheError for a cache that is not complete, does not serve the temperature, or has other samples; items raise
        it where label or size are not the sample's.
        """
        self.cache = cache if isinstance(cache, Cache) else open_cache(str(cache))
        self.cache.refuse_incomplete()
        if "experts" in self.cache.identity.teacher:
            raise CacheError(
                f"{self.cache} holds experts' answers, each for its own classes alone, which no BKD learns from; "
                "dump a whole teacher's"
            )
        temperature = self.cache.temperature if temperature is None else temperature
        self.cache.refuse_temperature(temperature)
        self.dataset, self.transform, self.crop = dataset, transform, ViewCrop(self.cache.views)
        self.seed, self.ratio = _natural(seed, "seed"), self.cache.temperature / temperature
        self.sample_id = whole_numbers(self.cache.sample_id if sample_id is None else sample_id, "sample")
        if len(self.sample_id) != len(dataset):
            what = f"{self.cache} has" if sample_id is None else "sample_id names"
            raise CacheError(
                f"{what} {counted(len(self.sample_id), 'sample')} and the data set has {len(dataset):,}; "
                "give the cache's sample of each item as sample_id"
            )
        order = np.argsort(self.cache.sample_id)
        place = np.searchsorted(self.cache.sample_id, self.sample_id, sorter=order).clip(max=len(order) - 1)
        self.rows = order[place]
        if unknown := self.sample_id[self.cache.sample_id[self.rows] != self.sample_id].tolist():
            raise CacheError(f"{self.cache} has no sample {unknown[0]}; give the cache's sample of each item as sample_id")
        self.decoder = self.cache.decoder and [torch.from_numpy(part) for part in self.cache.decoder]
        # Files, which workers that were started before an epoch began see too: its number, and its planes.
        folder = tempfile.mkdtemp(prefix="cached-targets-", dir=scratch)
        weakref.finalize(self, _remove, folder, os.getpid())
        width, dtype = self.cache.row_format(features=False)
        self.whole = isinstance(self.cache.views, CropFlip)
        planes = self.cache.views.count if self.whole else 1
        self._files = Path(folder, "epoch"), Path(folder, "planes")
        self._shape, self._dtype = (planes, len(self.cache), width), np.dtype(dtype)
        for path, size in zip(self._files, (16, math.prod(self._shape) * self._dtype.itemsize)):
            with open(path, "xb") as file:
                _make_room(file, size)
        self._open()
        self._epoch[:] = -1
        if self.whole:
            for view in range(planes):
                self.cache.stored_plane(view, self._planes[view])
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch, from 0, the next items are of."""
        epoch = _natural(epoch, "epoch")
        if not self.whole:
            (view,) = set(self.cache.views.draw(self.seed, epoch, self.cache.sample_id).tolist())
            if self._epoch[1] != view:
                self._epoch[:] = -1  # until the plane is whole, no item has a target
                self.cache.stored_plane(view, self._planes[0])
                self._epoch[1] = view
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> CachedSample:
        if self._epoch[0] < 0:
            raise CacheError(f"no view of {self.cache} is loaded, since set_epoch failed; call it again")
        image, label = self.dataset[item]
        row, sample_id = int(self.rows[item]), int(self.sample_id[item])
        if int(label) != self.cache.label[row]:
            raise CacheError(
                f"item {item} has the label {int(label)}, but sample {sample_id} of {self.cache} has {self.cache.label[row]}; "
                "give the cache's sample of each item as sample_id"
            )
        whole = whole_image(image)
        if whole.size[::-1] != (size := tuple(self.cache.image_size[row].tolist())):
            found, wanted = (" x ".join(map(str, side)) for side in (whole.size[::-1], size))
            raise CacheError(
                f"item {item} is {found} pixels, but sample {sample_id} of {self.cache} {wanted}; give whole images, upright, "
                "as they were when it was dumped"
            )
        view = int(self.cache.views.draw(self.seed, int(self._epoch[0]), np.array([sample_id]))[0])
        stored = torch.from_numpy(self._planes[view if self.whole else 0, row].astype(np.float32))
        target = soften(stored[None], self.cache.held.name, self.decoder, self.ratio)[0]
        crop = self.crop(whole, sample_id, view)
        return CachedSample(self.transform(crop) if self.transform else crop, int(label), sample_id, view, target)

    def _open(self) -> None:
        self._epoch = np.memmap(self._files[0], np.int64, "r+", shape=(2,))  # its number, and the view that is held
        self._planes = np.memmap(self._files[1], self._dtype, "r+", shape=self._shape)

    def __getstate__(self) -> dict:
        """For workers that are started anew rather than forked."""
        state = {name: value for name, value in vars(self).items() if name not in ("_epoch", "_planes")}
        return state | {"cache": str(self.cache)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, cache=open_cache(state["cache"]))
        self._open()


def _remove(folder: str, process: int) -> None:
    """Removes the files; only in the process that made them, which a worker's copy outlives not."""
    if os.getpid() == process:
        for file in Path(folder).iterdir():
            file.unlink()
        os.rmdir(folder)


def bkd_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    label: torch.Tensor,
    class_counts: Sequence[int] | torch.Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 0.9999,
) -> torch.Tensor:
    """Balanced Knowledge Distillation (BKD, eq. 8), a mean over the batch: CE(z, y) + alpha T^2 KL(q || softmax(z / T)).

    logits [B, C].  target [B, C]: the teacher's probabilities softened by `temperature`, unweighted, as a cache holds them.
    label int64 [B].  class_counts [C]: training samples of each class, which weigh the target; beta 0 makes it KD.

    Raises ValueError for other shapes and for numbers outside their ranges.
    """
    counts = torch.as_tensor(class_counts)
    shapes = {"logits": logits, "target": target, "label": label, "class_counts": counts}
    if logits.ndim != 2 or any(
        values.shape != shape
        for values, shape in ((target, logits.shape), (label, logits.shape[:1]), (counts, logits.shape[1:]))
    ):
        found = ", ".join(f"{name} {list(values.shape)}" for name, values in shapes.items())
        raise ValueError(f"bkd_loss takes logits [B, C], target [B, C], label [B] and class_counts [C]; found {found}")
    if not (temperature > 0 and 0 <= beta < 1 and alpha >= 0):
        raise ValueError(f"temperature > 0, 0 <= beta < 1 and alpha >= 0; found {temperature}, {beta} and {alpha}")
    if counts.device.type == "cpu" and not counts.min() >= 1:  # elsewhere looking would wait for the device
        raise ValueError(f"class_counts are at least 1, found {counts.min()}; leave out classes without training samples")
    if target.device.type == "cpu" and not ((target.detach().sum(1) - 1).abs() < 0.01).all():
        raise ValueError("the target is probabilities, which sum to 1 in each row; give those of a cache, not logits")
    weights = losses.effective_number_weights(counts, beta).to(target, non_blocking=True)  # which no step waits for
    kd = losses.distillation(logits, losses.balanced_probability(target, weights), temperature)
    return (losses.cross_entropy(logits, label) + alpha * kd).mean()
