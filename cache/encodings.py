"""Encodings: probabilities to what is stored, and back. `Dense` is `logit` and `probability`, `Klt` is `klt`.

    encode     float32 [B, C] probabilities to columns [B, S] by array, which chunks hold, and values that their marker holds
    unpack     (Klt) columns [B, S] and the marker's values to codes [B, R], which a plane in memory holds
    decode     codes [B, R] to float32 [B, C] probabilities, into `out` where given
    flaw       (Dense) the first of codes [B, R] that stand for no probabilities, and what they are
    limits     (Dense) codes [B, R] to three arrays [B, C]: the least log-probabilities that they may stand for, those they are
               taken for, and the greatest

B rows, C classes, S stored columns, R codes a row.
"""

from dataclasses import dataclass

import numpy as np

from .format import array_document
from .klt import Klt
from .pieces import on_all_cores, pieces
from .target import SUM_TOLERANCE, no_distribution, softmax

_MINUS_INFINITY = 0xFC00  # the bits of float16's
_TINY = 2.0**-126  # below it float32 has fewer bits, or on some devices none; a softmax in float32 knows no less


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A number for each class, of one of two kinds. A chunk is the numbers and their checksum.

    logit: the logits over T less the largest of their row, float16, so that p = softmax(logit). A float keeps the ratio
    of small numbers as well as that of large ones, and the class that counts most is exact: at every temperature, and for
    any class weights w, the total variation of the target is at most 2^-11 (log C + log max w / min w), and usually a
    tenth of that. A probability that float32 has as zero is -inf.

    probability: the probabilities themselves. float32 is exact. float16 keeps 11 bits of a probability above 6e-5, and
    steps of 6e-8 below it, which is too coarse for temperatures far above the store's.
    """

    name: str
    dtype: str = "float16"

    plain = True
    reference = None  # no view is stored as a difference from another
    decoder = None  # codes need no matrix to be decoded
    max_error = None
    exact_blocks = False

    def __post_init__(self):
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"encoding.dtype must be float16 or float32, found {self.dtype!r}")

    @property
    def array(self) -> str:
        return self.name

    @property
    def stored_dtype(self) -> str:
        return self.dtype

    def columns(self, classes: int) -> int:
        """S, the stored numbers a row."""
        return classes

    width = columns  # R

    def documents(self, views: int, samples: int, classes: int, block_rows: int) -> dict[str, dict]:
        """The metadata of this encoding's arrays, by name."""
        shape, chunks = [views, samples, classes], [1, block_rows, classes]
        return {self.array: array_document(shape, self.dtype, ["view", "sample", "class"], chunks=chunks)}

    def codebook(self) -> dict[str, np.ndarray]:
        """The arrays that are written once, by name."""
        return {}

    def names(self) -> set[str]:
        """The names of this encoding's arrays and groups at the root of a store."""
        return {self.array}

    def fitted(self, fit, views, class_counts) -> "Dense":
        """This encoding, ready to encode."""
        return self

    def with_codebook(self, read, class_counts) -> "Dense":
        """This encoding, ready to decode. `read` gives the codebook's arrays by name."""
        return self

    def check(self, views: int, classes: int) -> None:
        """Raises ValueError where a store of this size cannot be of this encoding."""

    def encode(self, probability: np.ndarray, reference=None) -> tuple[dict[str, np.ndarray], dict]:
        return {self.name: _to_logits(probability) if self.name == "logit" else probability.astype(self.dtype)}, {}

    def decode(self, codes: np.ndarray, out=None) -> np.ndarray:
        if self.name == "logit":
            return _from_logits(codes, out)
        out = np.empty(codes.shape, np.float32) if out is None else out
        out[...] = codes
        return out

    def flaw(self, codes: np.ndarray) -> tuple[int, str] | None:
        """The first row of `codes` [B, C] that stands for no distribution, and what it holds; None where all do."""
        if self.name == "probability":  # whose rounding moves a sum
            return no_distribution(codes.astype(np.float32, copy=False), 2 * SUM_TOLERANCE)
        # As integers they compare many times as fast: of a row the largest is zero, and no number is a negative NaN.
        signed, unsigned = codes.view(np.int16), codes.view(np.uint16)
        if (signed.max(1) == 0).all() and unsigned.max() <= _MINUS_INFINITY:
            return None
        row = int(np.flatnonzero((signed.max(1) != 0) | (unsigned.max(1) > _MINUS_INFINITY))[0])
        return row, f"logits from {codes[row].min()} to {codes[row].max()}, of which the largest is zero"

    def limits(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values, there = codes.astype(np.float32), np.isfinite(codes)
        if self.name == "logit":
            logs = values - np.log(np.exp(values).sum(1, keepdims=True))
            half = np.where(there, -values * np.float32(2**-11), 0)
            return logs - half, logs, np.where(there, logs + half, np.float32(np.log(_TINY)))
        relative, absolute = {"float16": (2.0**-11, 2.0**-25), "float32": (2.0**-24, _TINY)}[self.dtype]
        half = np.maximum(values * np.float32(relative), np.float32(absolute))
        with np.errstate(divide="ignore"):
            return np.log(np.maximum(values - half, 0)), np.log(values), np.log(values + half)

    def to_json(self) -> dict:
        return {"name": self.name} if self.name == "logit" else {"name": self.name, "dtype": self.dtype}


ENCODINGS = {  # the class of each, and what is stored of it beside its name
    "logit": (Dense, ()),
    "probability": (Dense, ("dtype",)),
    "klt": (Klt, ("max_error", "coefficients", "high", "reference", "temperature_range", "exact_blocks")),
}


def from_json(values: dict) -> Dense | Klt:
    """The encoding that `values` ({"name": …, …}) describes. Raises ValueError for one that is not known."""
    name = values.get("name") if isinstance(values, dict) else None
    if not isinstance(name, str) or name not in ENCODINGS:
        raise ValueError(f"encoding.name must be one of {', '.join(ENCODINGS)}, found {values!r}")
    encoding, known = ENCODINGS[name]
    for key in values:
        if key != "name" and key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes nothing more"
            raise ValueError(f"encoding {name} does not take {key}; {takes}")
    return encoding(**values)


def _to_logits(probability: np.ndarray) -> np.ndarray:
    """log p less the largest of its row, float16 [B, C]. -inf for p below 2^-126, where float32 has few bits or none."""
    logits = np.empty(probability.shape, np.float16)

    def convert(piece):
        logs = np.where(probability[piece] < np.float32(_TINY), np.float32(0), probability[piece])
        with np.errstate(divide="ignore"):
            np.log(logs, out=logs)
        logits[piece] = logs - logs.max(1, keepdims=True)

    on_all_cores(convert, pieces(*probability.shape))
    return logits


def _from_logits(logits: np.ndarray, out=None) -> np.ndarray:
    """softmax of float16 [B, C], the largest of each row zero: float32 [B, C], into `out` where given."""
    out = np.empty(logits.shape, np.float32) if out is None else out

    def convert(piece):
        out[piece] = logits[piece]
        softmax(out[piece])

    on_all_cores(convert, pieces(*logits.shape))
    return out
