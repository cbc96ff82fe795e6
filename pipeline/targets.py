"""A cache's probabilities where the training device can index them: one gather of (view, sample) pairs a batch.

Whole planes of views are held, never read in a step. An epoch that draws from all views finds them all loaded once;
one that draws a single view finds its plane loaded while the epoch before ran.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from cache import Cache


class Targets:
    """The probabilities of one cache on one device. Shapes: V views, N samples, K views held, C classes."""

    def __init__(self, cache: Cache, device: torch.device, views: Callable[[int], np.ndarray]):
        """`views(epoch)`: the views that an epoch draws, int64, distinct and sorted."""
        self.cache, self.device, self.views = cache, device, views
        self.decoder = cache.decoder and [torch.from_numpy(part).to(device) for part in cache.decoder]
        self.reader = ThreadPoolExecutor(1)
        self.held = np.empty(0, np.int64)
        self.next: Future | None = None

    def prepare(self, epoch: int) -> None:
        """Holds the views of `epoch`, and begins to read those of the next one if they are others."""
        needed = self.views(epoch)
        if not np.isin(needed, self.held).all():
            read = self.next.result() if self.next else None
            if read is None or not np.array_equal(read[0], needed):
                read = self._read(needed)
            self.held, planes = read
            self.planes = planes.to(self.device)
            slots = np.full(self.cache.views.count, -1)
            slots[self.held] = np.arange(len(self.held))
            self.slots = torch.from_numpy(slots).to(self.device)
        coming = self.views(epoch + 1)
        self.next = None if np.isin(coming, self.held).all() else self.reader.submit(self._read, coming)

    def gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Probabilities, float32 [B, C], of the samples at `rows` [B] under `views` [B], tempered by the cache's T."""
        stored = self.planes[self.slots[views], rows].float()
        if self.decoder is None:
            return stored
        mean, basis = self.decoder
        return torch.softmax(torch.addmm(mean, stored, basis), dim=1)

    def _read(self, views: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        first = self.cache.stored_plane(int(views[0]))
        planes = np.empty((len(views), *first.shape), first.dtype)
        planes[0] = first
        for index, view in enumerate(views[1:], 1):
            self.cache.stored_plane(int(view), out=planes[index])
        return views, torch.from_numpy(planes)
