"""A cache's probabilities where the training device can index them: one gather of (view, sample) pairs a batch.

Whole planes of views are held, never read in a step. An epoch that draws from all views finds them all loaded once;
one that draws a single view finds its plane loaded while the epoch before ran. Planes that the device has no room for
stay in the machine's memory, and those that are too large for that lie in a scratch file.
"""

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from cache import Cache
from cache.planes import Planes

ROOM = 0.5  # of the memory there is, for planes


class Targets:
    """The probabilities of one cache on one device. Shapes: V views, N samples, K views held, R codes, C classes."""

    def __init__(self, cache: Cache, device: torch.device):
        self.cache, self.device = cache, device
        self.decoder = cache.decoder and [torch.from_numpy(part).to(device) for part in cache.decoder]
        self.reader = ThreadPoolExecutor(1)
        self.held = np.empty(0, np.int64)
        self.coming: tuple[np.ndarray, Future] | None = None

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

    def gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Probabilities, float32 [B, C], of the samples at `rows` [B] under `views` [B], tempered by the cache's T."""
        index = self.slots[views].to(self.planes.device), rows.to(self.planes.device)
        stored = self.planes[index].to(self.device).float()
        if self.decoder is None:
            return stored
        mean, basis = self.decoder
        return torch.softmax(torch.addmm(mean, stored, basis), dim=1)

    def _read(self, views: np.ndarray) -> Planes:
        size = len(views) * len(self.cache) * self.cache.encoding.width(len(self.cache.classes))
        size *= np.dtype(self.cache.encoding.dtype).itemsize
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Planes(self.cache, views, scratch=tempfile.gettempdir() if size > ROOM * memory else None)

    def _place(self, codes: torch.Tensor) -> torch.Tensor:
        """`codes` on the device if it has room, else where they are."""
        if self.device.type == "cuda" and codes.nbytes > ROOM * torch.cuda.mem_get_info(self.device)[0]:
            return codes
        return codes.to(self.device)
