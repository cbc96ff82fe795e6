"""Views: a number names one crop of a sample, and this file says which.

A specification (`CropFlip`, `RandomResizedCrop`) is stored in every cache, and `boxes` is a pure function of it:
the student, the teacher's dump and the data frame all ask it, so they cannot disagree. Nothing here touches pixels.

Shapes: N samples, any number B of (sample, view) pairs.
"""

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np

from . import philox


class Boxes(NamedTuple):
    """Crops of B samples in pixels of the original image, int64 [B] each. `top` and `left` may lie in the padding."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray  # 1 where the crop is mirrored left to right


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """Every crop of the image's own size from the image zero-padded by `pad` pixels, plain and mirrored.

    The view space is finite: (2 pad + 1)^2 crops, twice that with `flip`; 162 for pad 4.
    view = (row offset * (2 pad + 1) + column offset) * (1 + flip) + mirrored.
    """

    __pydantic_config__ = {"extra": "forbid"}  # read where a configuration is checked; needs no import here

    name: Literal["crop_flip"] = "crop_flip"
    pad: int = 4  # pixels, from 0 to 64
    flip: bool = True  # mirroring: crop_flip has every crop mirrored too, of random_resized_crop half of the crops are

    def __post_init__(self):
        if not 0 <= self.pad <= 64:
            raise ValueError(f"pad is in pixels, from 0 to 64; found {self.pad}")

    @property
    def count(self) -> int:
        return (2 * self.pad + 1) ** 2 * (1 + self.flip)

    def offsets(self, view):
        """(row offset, column offset, mirrored) of `view`: integer arrays or tensors of any shape, offsets in [0, 2 pad]."""
        side, sides = 2 * self.pad + 1, 1 + int(self.flip)
        return view // (side * sides), view // sides % side, view % sides

    def boxes(self, sample_id, view, image_size) -> Boxes:
        """Crops of `view` [B] in images of `image_size` (height, width) [B, 2]. They do not depend on the sample."""
        row, column, mirrored = self.offsets(np.asarray(view, np.int64))
        height, width = np.asarray(image_size, np.int64).T
        return Boxes(*np.broadcast_arrays(row - self.pad, column - self.pad, height, width, mirrored))

    def draw(self, seed: int, epoch: int, sample_id, occurrence=0) -> np.ndarray:
        """The views that an epoch of training uses, int64 [N]: uniform and independent.

        `occurrence`: how often the epoch has had the sample before.
        """
        return philox.below(philox.draw(seed, philox.VIEW, sample_id, epoch, occurrence)[0], self.count)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """`count` seeded crops a sample: area `scale` of the image, aspect ratio log-uniform in `ratio`, resized to `size`.

    The sampling follows torchvision's RandomResizedCrop: ten tries, then the largest central crop.
    Only IEEE-exact operations follow the integer draws, so the box is the same on every machine.
    """

    __pydantic_config__ = {"extra": "forbid"}

    name: Literal["random_resized_crop"] = "random_resized_crop"
    size: int  # pixels of the side that a crop is resized to
    count: int  # views a sample
    scale: tuple[float, float] = (0.08, 1.0)  # range of a crop's share of the image's area
    ratio: tuple[float, float] = (0.75, 4 / 3)  # range of its width over its height
    flip: bool = True  # half of the crops mirrored
    seed: int = 0  # of the crops

    def __post_init__(self):
        if self.size < 1 or self.count < 1:
            raise ValueError(f"size (pixels) and count (views a sample) are at least 1; found {self.size}, {self.count}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is a range of area fractions in (0, 1]; found {list(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is a range of positive width to height ratios; found {list(self.ratio)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is in [0, 2^64); found {self.seed}")

    def boxes(self, sample_id, view, image_size) -> Boxes:
        """Crops of `view` [B] of `sample_id` [B] in images of `image_size` (height, width) [B, 2]."""
        tries = np.arange(_TRIES, dtype=np.int64)[:, None]
        words = philox.draw(self.seed, philox.BOX, np.asarray(sample_id), np.asarray(view), tries)
        full_height, full_width = np.asarray(image_size, np.int64).T
        area = full_height * full_width * (self.scale[0] + (self.scale[1] - self.scale[0]) * (words[0] / 2.0**32))
        table = np.geomspace(*self.ratio, _RATIOS)
        ratio = (np.round(table * 2**20) / 2**20)[philox.below(words[1], _RATIOS)]
        width, height = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * ratio, area / ratio))
        fits = (width > 0) & (height > 0) & (width <= full_width) & (height <= full_height)
        chosen = fits.argmax(0), np.arange(fits.shape[1])
        width, height = width[chosen], height[chosen]
        # no try fitted: the largest central crop whose aspect ratio is allowed
        low, high = self.ratio
        central_width = np.minimum(full_width, np.rint(full_height * high).astype(np.int64))
        central_height = np.minimum(full_height, np.rint(full_width / low).astype(np.int64))
        found = fits.any(0)
        width, height = np.where(found, width, central_width), np.where(found, height, central_height)
        top = philox.below(words[2][chosen], full_height - height + 1)
        left = philox.below(words[3][chosen], full_width - width + 1)
        top = np.where(found, top, (full_height - height) // 2)
        left = np.where(found, left, (full_width - width) // 2)
        coin = philox.draw(self.seed, philox.BOX, np.asarray(sample_id), np.asarray(view), _TRIES)[0]
        return Boxes(top, left, height, width, (coin & 1).astype(np.int64) * self.flip)

    def draw(self, seed: int, epoch: int, sample_id, occurrence=0) -> np.ndarray:
        """The views that an epoch of training uses, int64 [N]: one for all samples, each once before any comes again.

        A view is another crop in every sample, so an epoch is as varied as independent draws, and reads one plane.
        A sample that the epoch has had before, `occurrence` times, takes the view of that many epochs later.
        """
        turn = epoch + np.broadcast_to(np.asarray(occurrence, np.int64), np.shape(sample_id))
        views = np.empty(turn.shape, np.int64)
        for cycle in np.unique(turn // self.count):
            order = philox.permutation(seed, philox.VIEW, np.arange(self.count), cycle)
            now = turn // self.count == cycle
            views[now] = order[turn[now] % self.count]
        return views


_TRIES = 10
_RATIOS = 1024  # levels of the aspect ratio; a table rounded to 2^-20 keeps the platform's exp() out of the result

SPECIFICATIONS = {"crop_flip": CropFlip, "random_resized_crop": RandomResizedCrop}


def to_json(views: CropFlip | RandomResizedCrop) -> dict:
    """The specification as plain JSON values; equal specifications give equal values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(views).items()}


def from_json(values: dict) -> CropFlip | RandomResizedCrop:
    """The specification that `to_json` wrote. Raises ValueError for one this version does not know."""
    try:
        fields: dict = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return SPECIFICATIONS[fields["name"]](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"unknown view specification {values!r}") from error
