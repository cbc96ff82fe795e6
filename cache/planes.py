"""Planes held in memory for random access, so that no training step touches the store.

V views, N samples, R codes a row, C classes, D features of all teachers together, B (sample, view) pairs.
"""

import numpy as np

from . import features as feature_codes
from .format import CacheError, whole_numbers


class Planes:
    """The planes of `views` (default: all), held for random access: V·N·R codes in memory.

    With `features` they are those of the teachers' features, side by side in the order of `cache.features`, R = D.
    Raises what `stored_plane` raises, and CacheError where the store has no features.

    codes: [V, N, R], what is held, as stored.
    """

    def __init__(self, cache, views=None, features=False):
        if features and not cache.features:
            raise CacheError("the cache holds no features; dump them too (cache.features)")
        self._encoding, self._widths = cache.held, list(cache.features.values()) if features else None
        views = whole_numbers(range(cache.views.count) if views is None else views, "view", cache.views.count)
        width, dtype = row_format(cache, features)
        self.codes = np.empty((len(views), len(cache), width), dtype)
        self._place = np.full(cache.views.count, -1)
        self._place[views] = np.arange(len(views))
        for place, view in enumerate(views.tolist()):
            if features:
                parts = [cache.stored_feature_plane(name, view) for name in cache.features]
                np.concatenate(parts, axis=1, out=self.codes[place])
            else:
                cache.stored_plane(view, self.codes[place])

    def rows(self, samples, views) -> np.ndarray:
        """Of B pairs: probabilities, float32 [B, C], or features, each teacher's of length one, float32 [B, D].

        `samples` are positions. Raises KeyError for views that are not held, CacheError for what the store does not have.
        """
        views = whole_numbers(views, "view", len(self._place))
        place = self._place[views]
        if (place < 0).any():
            raise KeyError(f"view {views[place < 0][0]} is not held")
        codes = self.codes[place, whole_numbers(samples, "sample", self.codes.shape[1])]
        if self._widths is None:
            return self._encoding.decode(codes)
        parts = np.split(codes, np.cumsum(self._widths)[:-1], axis=1)
        return np.concatenate([feature_codes.decode(part) for part in parts], axis=1)


def row_format(cache, features: bool) -> tuple[int, np.dtype]:
    """(width R, dtype) of a sample's codes under one view: those of its probabilities or of its features."""
    if features:
        return sum(cache.features.values()), np.dtype("int8")
    return cache.held.width(len(cache.classes)), np.dtype(cache.held.dtype)
