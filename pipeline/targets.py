"""A cache's probabilities where the training device can index them: one gather of (view, sample) pairs a batch.

A view space that fits into memory is loaded whole; otherwise, one view's plane at a time while the next is read.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from cache import Cache


class Targets:
    """The probabilities of one cache on one device."""

    def __init__(self, cache: Cache, device: torch.device):
        self.cache, self.device = cache, device
        first = torch.from_numpy(cache.stored_plane(0))
        self.planes = torch.empty((cache.views.count, *first.shape), dtype=first.dtype, device=device)
        with ThreadPoolExecutor(2) as readers:
            for view, plane in enumerate(readers.map(cache.stored_plane, range(cache.views.count))):
                self.planes[view] = torch.from_numpy(plane)

    def gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Probabilities, float32 [B, C], of the samples at `rows` [B] under `views` [B], tempered by the cache's T."""
        return self.planes[views, rows].float()
