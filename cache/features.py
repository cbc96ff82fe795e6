"""Features of a teacher: their directions, int8, with a stated and checked error.

A row of codes is the vector over its largest component, times 127, rounded. Reading it normalises it again, so that
its scale needs no storing.

B rows, D features.
"""

import re

import numpy as np

from .format import CacheError
from .pieces import pieces

MAX_ERROR = 0.01  # the mean cosine distance of a block's vectors from the exact ones; 1e-5 to 1e-4 is usual
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MOST = {"names": 64, "width": 10**5}


def check(features: dict[str, int]) -> None:
    """Raises ValueError unless `features` are names that may be folders, and numbers D."""
    if not isinstance(features, dict) or len(features) > _MOST["names"]:
        raise ValueError(f"features must be at most {_MOST['names']} names and their widths, found {features!r}")
    for name, width in features.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"a name of features is up to 64 letters, digits, _ and -, found {name!r}")
        if type(width) is not int or not 1 <= width <= _MOST["width"]:
            raise ValueError(f"features {name} must be 1 to {_MOST['width']} wide, found {width!r}")


def encode(vectors: np.ndarray) -> tuple[np.ndarray, dict]:
    """float32 [B, D] to codes, int8 [B, D], and {"mean": …, "worst": …}, their cosine distance from the vectors.

    Raises CacheError where the mean exceeds MAX_ERROR. The vectors must be finite, and none zero.
    """
    codes, error = np.empty(vectors.shape, np.int8), np.empty(len(vectors))
    for piece in pieces(*vectors.shape):
        exact = vectors[piece] / _peak(vectors[piece])[:, None]
        codes[piece] = np.rint(exact * np.float32(127))
        exact = _normalised(exact)
        exact -= decode(codes[piece])
        error[piece] = 0.5 * np.square(exact, out=exact).sum(1, dtype=np.float64)
    if error.mean() > MAX_ERROR:
        raise CacheError(
            f"the mean cosine distance is {error.mean():.3g}, above {MAX_ERROR}: few components outweigh all others by "
            "a hundred times; standardise the features"
        )
    return codes, {"mean": round(float(error.mean()), 8), "worst": round(float(error.max()), 8)}


def unusable(vectors: np.ndarray) -> np.ndarray:
    """The rows [B, D] that have no direction: zero, or not finite. Positions, int64."""
    peak = _peak(vectors)
    return np.flatnonzero(~((peak > 0) & (peak < np.inf)))  # NaN fails every comparison


def decode(codes: np.ndarray) -> np.ndarray:
    """Codes, int8 [B, D], to vectors of length one, float32 [B, D]."""
    out = np.empty(codes.shape, np.float32)
    for piece in pieces(*codes.shape):
        out[piece] = codes[piece]
        _normalised(out[piece])
    return out


def _peak(vectors):
    return np.maximum(vectors.max(1), -vectors.min(1))


def _normalised(vectors):
    """Overwrites `vectors`."""
    vectors *= (1 / np.sqrt(np.einsum("bd,bd->b", vectors, vectors)))[:, None]
    return vectors
