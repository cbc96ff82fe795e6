"""Which samples an epoch visits and in what order: pure functions of (seed, epoch)."""

import numpy as np

from cache import philox


def instance_balanced(seed: int, epoch: int, sample_id: np.ndarray) -> np.ndarray:
    """Every sample once, in a random order: rows, int64 [N]."""
    return philox.permutation(seed, philox.ORDER, sample_id, epoch)
