"""At which temperatures T' a store's answers may be used, where another than its own, T, is wanted.

softmax(z / T') is softmax(z / T) to the power T / T', and what was lost in storing grows or shrinks with that power.
"""

from collections.abc import Callable

import numpy as np

from .format import CacheError
from .target import class_weight

LIMIT = 0.01  # of the mean total variation of the BKD target, by what its numbers may have lost
LOWEST, HIGHEST = 0.01, 1000.0  # temperatures that are looked at
_BLOCKS, _CELLS = 4, 1 << 17  # that are looked at, and numbers of each


def temperatures(cache) -> tuple[float, float] | None:
    """The lowest and the highest T' at which the answers may be used; None where nothing is dumped yet.

    For `logit` and `probability` it follows from some of what is stored, whose every number stands for a range. A `klt`
    store says it: the step was tried on the rows that its codebook was fitted to. Of an average of teachers, or of experts
    that share the classes, none but T follows.
    """
    own = cache.temperature
    if _of_several(cache):
        return own, own
    if cache.encoding.plain:
        lost = {*cache.lost()}
        pairs = [pair for pair in cache.committed() if pair not in lost]
        if not pairs:
            return None
        rows = np.concatenate(
            [_some(cache, *pairs[i]) for i in np.unique(np.linspace(0, len(pairs) - 1, _BLOCKS).astype(int))]
        )
        limits, weight = cache.encoding.limits(rows), class_weight(cache.class_counts)
        low, high = accepted_factors(
            lambda factor: retempering_error(limits, 1 / factor, weight), LIMIT, (LOWEST / own, HIGHEST / own)
        )
    else:
        low, high = cache.encoding.temperature_range or (1.0, 1.0)
    return low * own, high * own


def refuse_temperature(cache, temperature: float) -> None:
    """Raises CacheError where answers at `temperature` do not follow from the store's closely enough."""
    own = cache.temperature
    if temperature == own:
        return
    if several := _of_several(cache):
        raise CacheError(
            f"{cache} holds {several} at temperature {own:g}, from which none at {temperature:g} follows; "
            "dump at that temperature, or leave out student.method.temperature"
        )
    low, high = temperatures(cache) or (own, own)
    if not low <= temperature <= high:
        raise CacheError(
            f"{cache} holds {cache.encoding.name} at temperature {own:g}, which serves temperatures {low:.3g} to {high:.3g}, "
            f"not {temperature:g}; dump at that temperature, or with cache.encoding={{name: logit}}, which serves more"
        )


def _of_several(cache) -> str | None:
    """What the answers are where they are not one network's softmax."""
    kinds = {"average_of": "an average", "experts": "experts' answers"}
    return next((words for key, words in kinds.items() if key in cache.identity.teacher), None)


def retempering_error(limits, ratio: float, weight: np.ndarray) -> float:
    """A bound of the mean total variation of q = w p / Σ w p when p is taken to the power `ratio`, T / T'.

    limits: the least log-probabilities [B, C] that were stored, those that are read, and the greatest.  weight: w [C].
    """
    logs = ratio * limits[1] + np.log(weight)
    top = np.log(weight) - logs.max(1, keepdims=True)
    low, read, high = (np.exp(ratio * part + top) for part in limits)
    # What one class gains or loses moves its own share, and by its part of the sum the others': each counts half.
    moved = np.maximum(read - low, high - read).sum(1) / read.sum(1)
    return float(np.minimum(moved, 1).mean())


def accepted_factors(error: Callable[[float], float], limit: float, farthest: tuple[float, float]) -> tuple[float, float]:
    """From and to which factor of the temperature `error(factor)` is within `limit`; no further than `farthest`."""
    return _last_within(error, limit, 0.5, farthest[0]), _last_within(error, limit, 2.0, farthest[1])


def _last_within(error, limit, step, farthest):
    within = 1.0
    while within != farthest:
        beyond = max(within * step, farthest) if step < 1 else min(within * step, farthest)
        if error(beyond) > limit:
            break
        within = beyond
    else:
        return farthest
    for _ in range(5):
        middle = (within * beyond) ** 0.5
        within, beyond = (middle, beyond) if error(middle) <= limit else (within, middle)
    return within


def _some(cache, view, block):
    stored = cache.stored_block(view, block)
    count = max(1, min(len(stored), _CELLS // stored.shape[1]))
    return stored[np.linspace(0, len(stored) - 1, count).astype(int)]
