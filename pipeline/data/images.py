"""Images of numbered views, in batches, as uint8 tensors on the training device.

Two sources with one interface: `batches(rows, views, batch_size)` yields `Batch`es in the order of `rows`, of images of
`crop_size` (height, width).
`ResidentImages` holds a whole set on the device and crops by one gather; `DecodedImages` decodes in worker processes.
Shapes: B samples a batch, S the side of a crop. Normalisation belongs to the model.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from offline_bkd.cache.views import CropFlip, RandomResizedCrop
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.data.datasets import Dataset


class Batch(NamedTuple):
    rows: torch.Tensor  # int64 [B], positions in the data set, on the device
    views: torch.Tensor | None  # int64 [B]; None for the views of an evaluation
    label: torch.Tensor  # int64 [B]
    images: torch.Tensor  # uint8 [B, 3, S, S], channels last


def open_images(dataset: Dataset, views: CropFlip | RandomResizedCrop, device: torch.device, workers: int):
    """The source that fits `views`: the whole image's own pixels stay on the device, resized crops are decoded as needed."""
    if isinstance(views, CropFlip):
        return ResidentImages(dataset, views, device)
    return DecodedImages(dataset, views, device, workers)


class ResidentImages:
    """A data set of equally large images, decoded once and kept on the device as uint8, zero-padded for its crops."""

    decodes = False

    def __init__(self, dataset: Dataset, views: CropFlip, device: torch.device):
        pixels = dataset.for_each(lambda row: np.asarray(dataset.decode(row)))
        self.image_size = np.array([image.shape[:2] for image in pixels], np.int64)
        sizes, count = np.unique(self.image_size, axis=0, return_counts=True)
        if len(sizes) > 1:
            odd = int((self.image_size != sizes[count.argmax()]).any(1).argmax())
            raise UserError(
                f"crop_flip needs images of one size, but {dataset.describe(odd)} is {self.image_size[odd].tolist()} and "
                f"most are {sizes[count.argmax()].tolist()} (height, width); use views: {{name: random_resized_crop}}"
            )
        self.crop_size = self.height, self.width = tuple(sizes[0].tolist())
        self.views, self.device = views, device
        self.label = torch.from_numpy(dataset.label).to(device)
        pad = views.pad
        padded = np.zeros((len(dataset), self.height + 2 * pad, self.width + 2 * pad, 3), np.uint8)
        np.stack(pixels, out=padded[:, pad : pad + self.height, pad : pad + self.width])
        self.padded = torch.from_numpy(padded).to(device)

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
        loader = torch.utils.data.DataLoader(
            _Crops(self, rows, views),
            sampler=slices,
            batch_size=None,
            num_workers=min(self.workers, len(slices)),
            pin_memory=self.device.type == "cuda",
        )
        for chosen, images in zip(slices, loader):
            if isinstance(images, UserError):
                raise images
            chosen = torch.from_numpy(rows[chosen]), None if views is None else torch.as_tensor(views[chosen])
            label = self.label[chosen[0]].to(self.device, non_blocking=True)
            row, view = (None if index is None else index.to(self.device, non_blocking=True) for index in chosen)
            images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            yield Batch(row, view, label, images)


class _Crops(torch.utils.data.Dataset):
    """A batch of crops for a slice of (row, view) pairs; runs in the worker processes."""

    def __init__(self, source: DecodedImages, rows: np.ndarray, views: np.ndarray | None):
        self.dataset, self.size, self.rows, self.numbers = source.dataset, source.views.size, rows, views
        if views is not None:
            boxes = source.views.boxes(source.dataset.sample_id[rows], views, source.image_size[rows])
        else:  # the centre, 7/8 of the shorter side: 224 of 256
            height, width = source.image_size[rows].T
            side = np.maximum(1, np.minimum(height, width) * 7 // 8)
            boxes = (height - side) // 2, (width - side) // 2, side, side, np.zeros(len(rows), np.int64)
        self.boxes = np.stack(boxes, axis=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice) -> torch.Tensor | UserError:
        crops, last, image = [], None, None
        for row, (top, left, height, width, flip) in zip(self.rows[chosen], self.boxes[chosen]):
            if row != last:
                try:
                    last, image = row, self.dataset.decode(row)
                except UserError as error:  # raised, it would come out of the worker wrapped in its traceback
                    return error
            crop = image.crop((left, top, left + width, top + height))
            crop = crop.resize((self.size, self.size), Image.Resampling.BILINEAR)
            crops.append(np.asarray(crop)[:, :: -1 if flip else 1])
        return torch.from_numpy(np.stack(crops))
