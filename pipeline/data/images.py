"""Images of numbered views, in batches, as uint8 tensors on the training device.

Two sources with one interface, `ImageSource`: `ResidentImages` holds a whole set on the device and crops by one gather;
`DecodedImages` decodes in worker processes.
Shapes: B samples a batch, S the side of a crop. Normalisation belongs to the model.
"""

import math
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from offline_bkd.cache.views import CropFlip, RandomResizedCrop
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.data.dataset import Dataset
from offline_bkd.pipeline.data.workers import in_workers
from offline_bkd.pipeline.device import memory_limit


class Batch(NamedTuple):
    rows: torch.Tensor  # int64 [B], positions in the data set, on the device
    views: torch.Tensor | None  # int64 [B]; None for the views of an evaluation
    label: torch.Tensor  # int64 [B]
    images: torch.Tensor  # uint8 [B, 3, S, S], channels last


class ImageSource(Protocol):
    """The images of one part of a data set, N samples."""

    decodes: bool  # whether images are decoded whenever they are asked for
    crop_size: tuple[int, int]  # height and width of what it gives
    image_size: np.ndarray  # int64 [N, 2], height and width of the whole images
    label: torch.Tensor  # int64 [N]
    device: torch.device

    def batches(self, rows: np.ndarray, views: np.ndarray | None, batch_size: int) -> Iterator[Batch]:
        """Batches of `rows` [M] under `views` [M], in order; whole images for None. The last batch may be smaller."""


def open_images(
    dataset: Dataset, views: CropFlip | RandomResizedCrop, device: torch.device, workers: int, most: int | None = None
) -> ImageSource:
    """The source that fits `views`: the whole image's own pixels stay on the device, resized crops are decoded as needed.

    most: of so many images at most, the first ones; None: of all.
    """
    dataset = dataset if most is None else dataset.take(np.arange(min(most, len(dataset))))
    if isinstance(views, CropFlip):
        return ResidentImages(dataset, views, device)
    return DecodedImages(dataset, views, device, workers)


class ResidentImages:
    """A data set of equally large images, decoded once and kept on the device as uint8, zero-padded for its crops."""

    decodes = False

    def __init__(self, dataset: Dataset, views: CropFlip, device: torch.device):
        self.views, self.device = views, device
        try:
            size = dataset.size(0)
        except UserError:
            size = 0, 0  # `for_each` names it, with all others that cannot be read
        padded = self._room(len(dataset), *size)

        def read(row: int) -> tuple[int, int]:
            pixels = np.asarray(dataset.decode(row))
            inner = padded[row, views.pad : -views.pad or None, views.pad : -views.pad or None]
            if inner.shape == pixels.shape:
                inner[:] = pixels
            return pixels.shape[:2]

        self.image_size = np.array(dataset.for_each(read), np.int64)
        sizes, count = np.unique(self.image_size, axis=0, return_counts=True)
        if len(sizes) > 1:
            odd = int((self.image_size != sizes[count.argmax()]).any(1).argmax())
            raise UserError(
                f"crop_flip needs images of one size, but {dataset.describe(odd)} is {self.image_size[odd].tolist()} and "
                f"most are {sizes[count.argmax()].tolist()} (height, width); use views: {{name: random_resized_crop}}"
            )
        self.crop_size = self.height, self.width = tuple(sizes[0].tolist())
        self.label = torch.from_numpy(dataset.label).to(device)
        self.padded = torch.from_numpy(padded).to(device)

    def _room(self, count: int, height: int, width: int) -> np.ndarray:
        """For `count` images with their padding. Raises UserError where it is more than the memory, here or of the GPU."""
        shape = count, height + 2 * self.views.pad, width + 2 * self.views.pad, 3
        gpu = {"the GPU's memory": torch.cuda.mem_get_info(self.device)[0]} if self.device.type == "cuda" else {}
        for where, room in {"memory": memory_limit(), **gpu}.items():
            if math.prod(shape) > room:
                raise UserError(
                    f"crop_flip keeps all images in {where}: {math.prod(shape) / 2**30:,.1f} GiB, and there are "
                    f"{room / 2**30:,.1f}; use views: {{name: random_resized_crop}}"
                )
        return np.zeros(shape, np.uint8)

    def batches(self, rows: np.ndarray, views: np.ndarray | None, batch_size: int) -> Iterator[Batch]:
        """Batches of `rows` [M] under `views` [M], or as they are (None). The last batch may be smaller."""
        rows = torch.as_tensor(rows, dtype=torch.int64).to(self.device)
        views = None if views is None else torch.as_tensor(views, dtype=torch.int64).to(self.device)
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            view = None if views is None else views[start : start + batch_size]
            yield Batch(chosen, view, self.label[chosen], self.crop(chosen, view))

    def crop(self, rows: torch.Tensor, views: torch.Tensor | None) -> torch.Tensor:
        """uint8 [B, 3, H, W] of `rows` [B] under `views` [B], by one gather."""
        if views is None:
            pad = self.views.pad
            whole = self.padded[rows, pad : pad + self.height, pad : pad + self.width]
            return whole.permute(0, 3, 1, 2)
        top, left, flip = self.views.offsets(views)
        across = torch.arange(self.width, device=self.device)
        across = torch.where(flip[:, None] > 0, across.flip(0), across)
        down = torch.arange(self.height, device=self.device)
        crops = self.padded[rows[:, None, None], (top[:, None] + down)[:, :, None], (left[:, None] + across)[:, None, :]]
        return crops.permute(0, 3, 1, 2)  # channels last in memory


class DecodedImages:
    """A data set of encoded images of any size, decoded in worker processes and cropped to one size.

    Consecutive equal rows are decoded once, so a teacher may see many views of a sample for one decode.
    """

    decodes = True

    def __init__(self, dataset: Dataset, views: RandomResizedCrop, device: torch.device, workers: int):
        self.dataset, self.views, self.device = dataset, views, device
        self.crop_size = views.size, views.size
        self.workers = min(workers, len(os.sched_getaffinity(0)))
        self.image_size = dataset.image_size  # also finds unreadable images before training begins
        self.label = torch.from_numpy(dataset.label)

    def batches(self, rows: np.ndarray, views: np.ndarray | None, batch_size: int) -> Iterator[Batch]:
        """Batches of `rows` [M] under `views` [M], or centred (None). The last batch may be smaller."""
        rows = np.asarray(rows)
        slices = [slice(start, start + batch_size) for start in range(0, len(rows), batch_size)]

        def crops(number: int) -> np.ndarray:
            chosen = slices[number]
            return self._crops(rows[chosen], self._boxes(rows[chosen], None if views is None else views[chosen]))

        workers = min(self.workers, len(slices))
        if workers:
            found = in_workers(crops, len(slices), workers, pinned=self.device.type == "cuda")
        else:
            found = (torch.from_numpy(crops(number)) for number in range(len(slices)))
        for chosen, pixels in zip(slices, found):
            row = torch.from_numpy(rows[chosen])
            view = None if views is None else self._to_device(torch.as_tensor(views[chosen]))
            images = pixels.view(-1, *self.crop_size, 3)
            yield Batch(
                self._to_device(row), view, self._to_device(self.label[row]), self._to_device(images).permute(0, 3, 1, 2)
            )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Without waiting for the device."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _boxes(self, rows: np.ndarray, views: np.ndarray | None) -> np.ndarray:
        """(top, left, height, width, flip) of each crop, int64 [M, 5]."""
        if views is not None:
            return np.stack(self.views.boxes(self.dataset.sample_id[rows], views, self.image_size[rows]), axis=1)
        # the centre, 7/8 of the shorter side: 224 of 256
        height, width = self.image_size[rows].T
        side = np.maximum(1, np.minimum(height, width) * 7 // 8)
        return np.stack([(height - side) // 2, (width - side) // 2, side, side, np.zeros(len(rows), np.int64)], axis=1)

    def _crops(self, rows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3], of `rows` [B] and `boxes` [B, 5]."""
        crops, last, image = np.empty((len(rows), *self.crop_size, 3), np.uint8), None, None
        for number, (row, (top, left, height, width, flip)) in enumerate(zip(rows, boxes)):
            if row != last:
                last, image = row, self.dataset.decode(row)
            crop = image.crop((left, top, left + width, top + height)).resize(self.crop_size, Image.Resampling.BILINEAR)
            crops[number] = np.asarray(crop)[:, :: -1 if flip else 1]
        return crops
