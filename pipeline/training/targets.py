"""What a cache holds of its teachers, where the training device can index it: one gather of (sample, view) pairs a batch.

No step reads the store. Where an epoch draws from most views, all answers are held, if there is room; else those of the
pairs that an epoch draws, read while the epoch before ran. What the device has no room for stays in the machine's memory.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional

from offline_bkd.cache import Cache, CacheError, CropFlip
from offline_bkd.pipeline.device import memory_limit
from offline_bkd.pipeline.training import losses

ROOM = 0.5  # of the memory there is, for what is held


def room(device: torch.device) -> float:
    """Bytes that targets may take on `device`. What goes to a GPU is read into the machine's memory first."""
    return ROOM * (min(memory_limit(), torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else memory_limit())


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

    Shapes: V views, N samples, K pairs held, R codes, C classes, D features of all teachers together. A pair is the number
    v N + n, of the view v and the row n; None stands for all V N of them.
    """

    def __init__(self, cache: Cache, device: torch.device, features: bool = False):
        """Raises CacheError where the store has no features, and what `stored_plane` raises."""
        if features and not cache.features:
            raise CacheError("the cache holds no features; dump them too (cache.features)")
        self.cache, self.device, self.of_features = cache, device, features
        self.temperature, self.widths = cache.temperature, list(cache.features.values())
        self.decoder = cache.decoder and [torch.from_numpy(part).to(device) for part in cache.decoder]
        self.width, self.dtype = cache.row_format(features)
        self.all_fit = cache.views.count * len(cache) * self.width * self.dtype.itemsize <= room(device)
        self.reader = ThreadPoolExecutor(1)
        self.held: np.ndarray | None = np.empty(0, np.int64)
        self.coming: tuple[np.ndarray | None, Future[np.ndarray]] | None = None
        if isinstance(cache.views, CropFlip) and self.all_fit:  # any epoch draws from all views
            self._hold(None, self._read(None))

    def prepare(self, drawn: tuple[np.ndarray, np.ndarray], later: tuple[np.ndarray, np.ndarray]) -> None:
        """Holds what was `drawn`, rows [M] and views [M], and begins to read what will be drawn `later`."""
        if not self._holds(pairs := self._wanted(*drawn)):
            coming, self.coming = self.coming, None
            self._hold(pairs, coming[1].result() if coming and _same(coming[0], pairs) else self._read(pairs))
        if self.coming is None and not self._holds(following := self._wanted(*later)):
            self.coming = following, self.reader.submit(self._read, following)

    def probability(self, rows: torch.Tensor, views: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """Of the samples at `rows` [B] under `views` [B]: float32 [B, C], softened by `temperature` (None: the cache's T)."""
        ratio = self.temperature / (temperature or self.temperature)
        return soften(self._gather(rows, views), self.cache.held.name, self.decoder, ratio)

    def features(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        """Float32 [B, D]: each teacher's feature of length one, side by side, and the whole of length one again."""
        parts = self._gather(rows, views).split(self.widths, dim=1)
        return functional.normalize(torch.cat([functional.normalize(part) for part in parts], dim=1))

    def _gather(self, rows: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        pairs = views * len(self.cache) + rows
        place = pairs if self.held is None else torch.searchsorted(self.index, pairs)
        return self.codes[place.to(self.codes.device)].to(self.device).float()

    def _wanted(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray | None:
        """The pairs to hold where these are drawn, in order."""
        if self.all_fit and 2 * len(np.unique(views)) > self.cache.views.count:
            return None
        return np.unique(views * len(self.cache) + rows)

    def _holds(self, pairs: np.ndarray | None) -> bool:
        return self.held is None or (pairs is not None and bool(np.isin(pairs, self.held).all()))

    def _hold(self, pairs: np.ndarray | None, codes: np.ndarray) -> None:
        self.codes = torch.empty(0)  # so that its room is free
        self.held, self.codes = pairs, self._place(torch.from_numpy(codes))
        self.index = torch.from_numpy(np.empty(0, np.int64) if pairs is None else pairs).to(self.device)

    def _read(self, pairs: np.ndarray | None) -> np.ndarray:
        """What the store holds of `pairs` [K], in order: [K, R]."""
        if pairs is None:
            planes = np.empty((self.cache.views.count, len(self.cache), self.width), self.dtype)
            for view, plane in enumerate(planes):
                self._read_plane(view, plane)
            return planes.reshape(-1, self.width)
        views, rows = np.divmod(pairs, len(self.cache))
        codes = np.empty((len(pairs), self.width), self.dtype)
        for view in np.unique(views):
            part = slice(*np.searchsorted(views, [view, view + 1]))
            if part.stop - part.start == len(self.cache):  # all rows, in order: no second plane is needed
                self._read_plane(view, codes[part])
            else:
                codes[part] = self._read_plane(view)[rows[part]]
        return codes

    def _read_plane(self, view: int, out: np.ndarray | None = None) -> np.ndarray:
        """What the store holds of one view, [N, R], into `out` where given."""
        if not self.of_features:
            return self.cache.stored_plane(view, out)
        parts = [self.cache.stored_feature_plane(name, view) for name in self.cache.features]
        return np.concatenate(parts, axis=1, out=out)

    def _place(self, codes: torch.Tensor) -> torch.Tensor:
        """`codes` on the device if it has room, else where they are."""
        if self.device.type == "cuda" and codes.nbytes > ROOM * _free(self.device):
            return codes
        return codes.to(self.device)


def _same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    return first is second if first is None or second is None else np.array_equal(first, second)


def _free(device: torch.device) -> int:
    """Bytes of the GPU's memory that nothing is in, also those that torch keeps for itself."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
