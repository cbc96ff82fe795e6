"""What a cache holds of its teachers, where the training device can index it: one gather of (sample, view) pairs a batch.

Whole planes of views are held, never read in a step. An epoch that draws from all views finds them all loaded once;
one that draws a single view finds its plane loaded while the epoch before ran. Planes that the device has no room for
stay in the machine's memory, and those that are too large for that lie in a scratch file.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional

from offline_bkd.cache import Cache, CropFlip
from offline_bkd.cache.planes import Planes, row_format
from offline_bkd.pipeline.data.images import memory
from offline_bkd.pipeline.training import losses

ROOM = 0.5  # of the memory there is, for planes


def soften(stored: torch.Tensor, encoding: str, decoder: Sequence[torch.Tensor] | None, ratio: float = 1) -> torch.Tensor:
    """Probabilities, float32 [B, C], at the temperature T / `ratio`, of what a cache of temperature T holds: float32 [B, R].

    `decoder`: mean [C] and basis [R, C] of transform-coded rows.
    """
    if encoding == "probability":
        return stored if ratio == 1 else losses.retempered(stored, ratio)
    if decoder is not None:
        mean, basis = decoder
        stored = torch.addmm(mean, stored, basis)
    return torch.softmax(stored if ratio == 1 else ratio * stored, dim=1)


class Targets:
    """The probabilities, or with `features` the features, of one cache on one device.

    Shapes: V views, N samples, K views held, R codes, C classes, D features of all teachers together.
    """

    def __init__(self, cache: Cache, device: torch.device, features: bool = False):
        self.cache, self.device, self.of_features = cache, device, features
        self.temperature, self.widths = cache.temperature, list(cache.features.values())
        self.decoder = cache.decoder and [torch.from_numpy(part).to(device) for part in cache.decoder]
        self.reader = ThreadPoolExecutor(1)
        self.held = np.empty(0, np.int64)
        self.coming: tuple[np.ndarray, Future] | None = None
        if isinstance(cache.views, CropFlip):  # any epoch draws from all of them
            everything = np.arange(cache.views.count)
            self.prepare(everything, everything)

    def prepare(self, views: np.ndarray, later: np.ndarray) -> None:
        """Holds the planes of `views`, and begins to read those of `later`, which will be asked for next."""
        views, later = np.unique(views), np.unique(later)
        if not np.isin(views, self.held).all():
            if self.coming and np.array_equal(self.coming[0], views):
                planes = self.coming[1].result()
            else:
                planes = self._read(views)
            self.held, self.planes = views, self._place(torch.from_numpy(planes.codes))
            slots = np.full(self.cache.views.count, -1)
            slots[views] = np.arange(len(views))
            self.slots = torch.from_numpy(slots).to(self.device)
            self.coming = None
        if self.coming is None and not np.isin(later, self.held).all():
            self.coming = later, self.reader.submit(self._read, later)

    def probability(self, rows: torch.Tensor, views: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """Of the samples at `rows` [B] under `views` [B]: float32 [B, C], softened by `temperature` (None: the cache's T)."""
        ratio = self.temperature / (temperature or self.temperature)
        return soften(self._gather(rows, views), self.cache.held.name, self.decoder, ratio)

    def features(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Float32 [B, D]: each teacher's feature of length one, side by side, and the whole of length one again."""
        parts = self._gather(rows, views).split(self.widths, dim=1)
        return functional.normalize(torch.cat([functional.normalize(part) for part in parts], dim=1))

    def _gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        index = self.slots[views].to(self.planes.device), rows.to(self.planes.device)
        return self.planes[index].to(self.device).float()

    def _read(self, views: np.ndarray) -> Planes:
        width, dtype = row_format(self.cache, self.of_features)
        size = len(views) * len(self.cache) * width * dtype.itemsize
        together = 1 if isinstance(self.cache.views, CropFlip) else 2  # an epoch's, and the next one's meanwhile
        scratch = tempfile.gettempdir() if together * size > ROOM * memory() else None
        return Planes(self.cache, views, scratch=scratch, features=self.of_features)

    def _place(self, codes: torch.Tensor) -> torch.Tensor:
        """`codes` on the device if it has room, else where they are."""
        if self.device.type == "cuda" and codes.nbytes > ROOM * torch.cuda.mem_get_info(self.device)[0]:
            return codes
        return codes.to(self.device)
