"""Planes held in memory for random access, so that no training step touches the store.

V views, N samples, R codes a row, C classes, B (sample, view) pairs.
"""

import tempfile

import numpy as np


class Planes:
    """The planes of `views` (default: all), held for random access: V·N·R codes in memory.

    With `scratch`, a folder on a fast disk, they lie there in a nameless file instead, and memory holds what the
    operating system can spare. Raises what `stored_plane` raises.

    codes: [V, N, R], what is held, as stored.
    """

    def __init__(self, cache, views=None, scratch=None):
        self._encoding = cache.encoding
        views = np.arange(cache.views.count) if views is None else np.asarray(views, np.int64)
        shape = len(views), len(cache), cache.encoding.width(len(cache.classes))
        if scratch is None:
            self.codes = np.empty(shape, cache.encoding.dtype)
        else:
            with tempfile.TemporaryFile(dir=scratch) as file:
                self.codes = np.memmap(file, cache.encoding.dtype, "w+", shape=shape)
        self._place = np.full(cache.views.count, -1)
        self._place[views] = np.arange(len(views))
        for place, view in enumerate(views):
            cache.stored_plane(int(view), self.codes[place])

    def rows(self, samples, views) -> np.ndarray:
        """Probabilities of B pairs, float32 [B, C]. `samples` are positions. Raises KeyError for other views."""
        place = self._place[np.asarray(views)]
        if (place < 0).any():
            raise KeyError(f"view {np.asarray(views)[place < 0][0]} is not held")
        return self._encoding.decode(self.codes[place, np.asarray(samples)])
