"""Which samples an epoch visits and in what order: pure functions of (seed, epoch). N samples, C classes."""

import numpy as np

from offline_bkd.cache import philox


def instance_balanced(seed: int, epoch: int, sample_id: np.ndarray) -> np.ndarray:
    """Every sample once, in a random order: rows, int64 [N]."""
    return philox.permutation(seed, philox.ORDER, sample_id, epoch)


def class_sampled(seed: int, epoch: int, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """N independent draws: a class in proportion to `weight` [C], then any of its samples: rows, int64 [N].

    Equal weights are class-balanced sampling. Every class of positive weight must have a sample.
    """
    high, low, within, _ = philox.draw(seed, philox.CLASS, np.arange(len(label)), epoch)
    share = np.cumsum(weight / np.sum(weight))
    point = (high * 2.0**32 + low) / 2.0**64 * share[-1]
    chosen = np.minimum(np.searchsorted(share, point, side="right"), np.flatnonzero(weight)[-1])
    counts = np.bincount(label, minlength=len(share))
    starts = np.cumsum(counts) - counts
    return np.argsort(label, kind="stable")[starts[chosen] + philox.below(within, counts[chosen])]


def reverse_weight(class_counts: np.ndarray) -> np.ndarray:
    """The class weight that makes the rare as frequent as the common: n_max / n_c, float64 [C] (BBN, section 4.2)."""
    return class_counts.max() / class_counts


def occurrence(rows: np.ndarray) -> np.ndarray:
    """How often each of `rows` [M] has come before in them: int64 [M]."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    first = np.searchsorted(ordered, ordered)  # where the run of equal rows begins
    found = np.empty(len(rows), np.int64)
    found[order] = np.arange(len(rows)) - first
    return found
