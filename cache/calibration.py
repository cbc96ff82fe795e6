"""How well confidence tells accuracy: the expected calibration error of Guo et al. (2017)."""

import numpy as np

BINS = 15  # of confidence, of equal width


def confidence_bin(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, float [M]: (0, 1/15], (1/15, 2/15], …; int64 [M]."""
    return np.clip(np.ceil(confidence.astype(float) * BINS).astype(int) - 1, 0, BINS - 1)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error (eq. 3): Σ share · |accuracy − confidence| over the bins.

    `confidence` float [M], `correct` bool [M]; M > 0.
    """
    gap = np.bincount(confidence_bin(confidence), correct - confidence.astype(float), minlength=BINS)
    return float(np.abs(gap).sum() / len(confidence))
