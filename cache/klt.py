"""Encoding `klt`: transform-coded log-probabilities, small, with a stated and checked error of the BKD target.

B rows, C classes, S stored columns, R codes a row.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numcodecs.zstd import Zstd

from .format import LARGEST, PLAIN, CacheError, array_document, group_document
from .pieces import on_all_cores, pieces
from .target import class_weight, no_distribution, row_sums, softmax, total_variation
from .tempering import accepted_factors

_FLOOR = 1e-12  # of a probability before its logarithm; no class weight brings back what is smaller
# Of Zstandard. Levels to 12 differ by a hundredth of the bytes; 19 takes five off, in ten times the time.
_ZSTD_LEVEL = 1


class Decoder(NamedTuple):
    """probability = softmax(mean + codes @ basis), on any device."""

    mean: np.ndarray  # float32 [C]
    basis: np.ndarray  # float32 [R, C], the quantiser's step included


@dataclass(frozen=True, kw_only=True, eq=False)
class Klt:
    """Log-probabilities, centred, rotated by the eigenvectors of their covariance (Karhunen–Loève) and rounded.

    A classifier's logits are an affine map of a feature, so few coefficients carry them, and one uniform step for all
    is optimal at high rate. `max_error` bounds what that costs: the mean total variation of the Balanced Knowledge
    Distillation target q = w p / Σ w p from the exact one, in every block. A block that would exceed it is rounded
    to half the step, or a quarter: the marker's `shift` is 2 for the whole step, 1, or 0. One that exceeds it even so, whose
    answers are unlike those that the codebook was fitted to, is stored as it is, float32, beside its codes.

    A sample's views resemble each other. Every other view is stored as its difference from `prediction` times the
    codes of the view `reference`, which is exact, and a third smaller. Coefficients whose differences may not fit into
    eight bits have a second column: code = (predicted + low + 255 · high) · 2^shift.
    """

    name: str = "klt"
    max_error: float = 0.02
    coefficients: int = 0  # R; 0 where no codebook is fitted yet
    high: int = 0  # the first so many coefficients have a second column
    reference: int = 0
    # From and to which factor of the temperature the rows of the fit were within max_error too; None: it was not tried.
    temperature_range: tuple[float, float] | None = None
    exact_blocks: bool = False  # whether blocks may be stored as they are; earlier, a dump stopped there
    decoder: Decoder | None = None
    prediction: np.ndarray | None = None  # float32 [R], in [0, 1]
    class_weight: np.ndarray | None = None  # w, float64 [C]

    plain = False
    array = "code"
    dtype, stored_dtype = "int16", "int8"

    def __post_init__(self):
        if type(self.max_error) not in (int, float) or not 0 < self.max_error < 1:
            raise ValueError(f"encoding.max_error is a mean total variation between 0 and 1, found {self.max_error!r}")

    def columns(self, classes: int) -> int:
        """S, the stored numbers a row."""
        return self.coefficients + self.high

    def width(self, classes: int) -> int:
        """R, the codes a row."""
        return self.coefficients

    def documents(self, views: int, samples: int, classes: int, block_rows: int) -> dict[str, dict]:
        """The metadata of this encoding's arrays, by name."""
        columns = self.coefficients + self.high
        # Column by column, equal things lie together.
        codecs = [
            {"name": "transpose", "configuration": {"order": [0, 2, 1]}},
            PLAIN[0],
            {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}},
            PLAIN[1],
        ]
        shape, chunks = [views, samples, columns], [1, block_rows, columns]
        exact, dimensions = [views, samples, classes], ["view", "sample", "class"]
        plain = {"probability": array_document(exact, "float32", dimensions, chunks=[1, block_rows, classes])}
        return {
            **(plain if self.exact_blocks else {}),
            "codebook": group_document({}),
            "codebook/mean": array_document([classes], "float32", ["class"]),
            "codebook/basis": array_document([self.coefficients, classes], "float32", ["coefficient", "class"]),
            "codebook/prediction": array_document([self.coefficients], "float32", ["coefficient"]),
            "code": array_document(shape, "int8", ["view", "sample", "column"], chunks=chunks, codecs=codecs),
        }

    def names(self) -> set[str]:
        """The names of this encoding's arrays and groups at the root of a store."""
        return {"code", "codebook", "probability"}

    def codebook(self) -> dict[str, np.ndarray]:
        """The arrays that are written once, by name."""
        assert self.decoder is not None and self.prediction is not None, "no codebook is fitted yet"
        values = {"mean": self.decoder.mean, "basis": self.decoder.basis, "prediction": self.prediction}
        return {f"codebook/{name}": value for name, value in values.items()}

    def with_codebook(self, read, class_counts) -> "Klt":
        """This encoding, ready to decode. `read` gives the codebook's arrays by name."""
        decoder = Decoder(read("codebook/mean"), read("codebook/basis"))
        weight = class_weight(class_counts)
        return replace(self, decoder=decoder, prediction=read("codebook/prediction"), class_weight=weight)

    def check(self, views: int, classes: int) -> None:
        """Raises ValueError where a store of this size cannot be of this encoding."""
        whole = all(type(value) is int for value in (self.coefficients, self.high, self.reference))
        if not whole or not (
            1 <= self.coefficients <= classes and 0 <= self.high <= self.coefficients and 0 <= self.reference < views
        ):
            raise ValueError(f"its codebook is not one for {classes} classes and {views} views: {self.to_json()}")
        span = self.temperature_range
        if span is not None and not (
            isinstance(span, (list, tuple))
            and len(span) == 2
            and all(type(factor) in (int, float) for factor in span)
            and 0 < span[0] <= 1 <= span[1] < LARGEST
        ):
            raise ValueError(f"temperature_range is two factors around 1, found {span!r}")
        if type(self.exact_blocks) is not bool:
            raise ValueError(f"exact_blocks is true or false, found {self.exact_blocks!r}")

    def decompress(self, data: np.ndarray, rows: int) -> np.ndarray:
        """A stored chunk without its checksum, uint8 [size], to columns, int8 [rows, S], in the order they have there.

        Raises ValueError, before more is allocated, where it would not decode to so many; RuntimeError where it does not
        decode.
        """
        shape = self.columns(0), rows
        found = _zstd_content(bytes(data[:18]))
        if found != shape[0] * rows:
            raise ValueError(f"it claims to hold {found} bytes of {shape[0] * rows}")
        out = np.empty(shape, np.int8)
        Zstd().decode(data, out)  # which by itself would allocate whatever this and later frames claim
        return out.T

    def encode(self, probability: np.ndarray, reference=None) -> tuple[dict[str, np.ndarray], dict]:
        """float32 [B, C] to {"code": int8 [B, S]} and {"shift": …, "error": {"mean": …, "worst": …}}.

        And {"probability": float32 [B, C]} where the error of the codes exceeds `max_error` even so; it is then zero.
        `reference`: codes [B, R] of the same samples in the view `self.reference`; None for that view itself.
        Raises CacheError where the store has no place for that.
        """
        columns = np.empty((len(probability), self.columns(0)), np.int8)
        error = np.empty(len(probability))
        for shift in range(_SHIFT, -1, -1):
            values: dict = {"shift": shift}
            for piece in pieces(*probability.shape):
                before = None if reference is None else reference[piece]
                columns[piece] = self._columns(probability[piece], shift, before)
                error[piece] = self._error(probability[piece], self.unpack(columns[piece], values, before))
            if error.mean() <= self.max_error:
                return {"code": columns}, values | _stated(error)
        if not self.exact_blocks:
            raise CacheError(
                f"the mean error is {error.mean():.3g}, above max_error {self.max_error}: the codebook is fitted to other "
                "answers than these, and the store was begun by a version that cannot store them; dump into another folder"
            )
        return {"code": columns, "probability": probability}, values | _stated(np.zeros(1))

    @cached_property
    def _projection(self):
        """What takes log p, not centred, to codes that are not rounded: float32 [C, R] and what to subtract, [R]."""
        inverse = self.decoder.basis.T / np.square(self.decoder.basis).sum(1)
        return inverse - inverse.mean(0), self.decoder.mean @ inverse

    def _columns(self, probability, shift, reference):
        project, offset = self._projection
        logs = np.maximum(probability, np.float32(_FLOOR))
        exact = np.log(logs, out=logs) @ project
        exact -= offset
        exact *= np.float32(2.0**-shift)
        most = np.where(np.arange(self.coefficients) < self.high, _MOST, 127).astype(np.float32)
        codes = np.clip(np.rint(exact, out=exact), -(_MOST >> shift), _MOST >> shift, out=exact)
        if reference is not None:
            codes -= self._predicted(reference, shift)
        rest = np.clip(codes, -most, most, out=codes).astype(np.int16)
        high = (rest[:, : self.high] + np.int16(127)) // np.int16(_RADIX)  # so that low is in [-127, 127], and high 0
        rest[:, : self.high] -= high * np.int16(_RADIX)  # wherever it can be
        return np.concatenate([rest, high], 1).astype(np.int8)

    def _error(self, probability, codes):
        """The total variation of q decoded from `codes` [B, R] from that of `probability` [B, C], float64 [B]."""
        weight = self.class_weight.astype(np.float32)
        q = probability * weight
        q *= (1 / (probability @ weight))[:, None]
        # w is folded into the mean row: the softmax is that of q itself.
        q -= _decoded(codes, self._weighted_matrix)
        return 0.5 * np.abs(q, out=q).sum(1, dtype=np.float64)

    def unpack(self, columns: np.ndarray, values: dict, reference=None, out=None) -> np.ndarray:
        """Columns, int8 [B, S], and their marker's values to codes, int16 [B, R]. Raises ValueError for others."""
        shift = values.get("shift")
        if type(shift) is not int or not 0 <= shift <= _SHIFT:
            raise ValueError(f"its marker says shift {shift!r}")
        out = np.empty((len(columns), self.coefficients), np.int16) if out is None else out
        for start in range(0, len(out), _UNPACKED):
            piece = slice(start, start + _UNPACKED)
            # In the order of `columns`, which is that of a chunk: column by column. Only the last step turns it.
            codes = columns[piece, : self.coefficients].astype(np.int16)
            codes[:, : self.high] += columns[piece, self.coefficients :].astype(np.int16) * np.int16(_RADIX)
            if reference is not None:
                codes += self._predicted(reference[piece], shift)
            codes <<= shift
            out[piece] = codes
        return out

    def _predicted(self, reference, shift):
        """The codes that those of the view `reference` foretell, int16 [B, R], in its order in memory."""
        # A product with a rounding by IEEE 754, so that reader and writer agree on every machine.
        predicted = reference.astype(np.float32)
        predicted *= self.prediction * np.float32(2.0**-shift)
        return np.rint(predicted, out=predicted).astype(np.int16)

    @cached_property
    def _matrix(self):
        return np.vstack([self.decoder.basis, self.decoder.mean])

    @cached_property
    def _weighted_matrix(self):
        return np.vstack([self.decoder.basis, self.decoder.mean + np.log(self.class_weight).astype(np.float32)])

    def decode(self, codes: np.ndarray, out=None) -> np.ndarray:
        """Codes [B, R] to float32 [B, C], into `out` where given."""
        return _decoded(codes, self._matrix, out)

    def to_json(self) -> dict:
        request: dict = {"name": self.name, "max_error": self.max_error}
        if not self.coefficients:
            return request
        fitted: dict = {"coefficients": self.coefficients, "high": self.high, "reference": self.reference}
        if self.temperature_range:
            fitted["temperature_range"] = list(self.temperature_range)
        if self.exact_blocks:
            fitted["exact_blocks"] = True
        return request | fitted

    def fitted(self, fit, views, class_counts) -> "Klt":
        """This encoding with a codebook for the teacher that `fit` asks.

        fit(numbers) gives the probabilities of some samples under these views, float32 [K, S, C].
        Half of the samples give the basis; the other half say how small a step keeps within `max_error`.
        Raises CacheError where none does, ValueError for a `fit` that gives something else.
        """
        if fit is None:
            raise ValueError("encoding klt is fitted to the teacher: give `fit`")
        reference, *others = fit_views(views)
        fit = np.asarray(fit([reference, *others]), np.float32)
        if fit.ndim != 3 or len(fit) != 1 + len(others) or not fit.shape[1] or fit.shape[2] != len(class_counts):
            expected = f"[{1 + len(others)}, samples, {len(class_counts)}]"
            raise ValueError(f"fit must give probabilities {expected}, found {list(fit.shape)}")
        for view, probability in zip((reference, *others), fit):
            if wrong := no_distribution(probability):
                raise ValueError(f"view {view}: an answer is not a distribution ({wrong[1]}); mend the teacher's output")
        weight, logs = class_weight(class_counts), centred_log(fit)
        order = np.random.default_rng(0).permutation(fit.shape[1])
        half, other = (order[: len(order) // 2], order[len(order) // 2 :]) if len(order) > 1 else (order, order)
        mean = logs[:, half].mean((0, 1))
        basis = _eigenvectors((logs[:, half] - mean).reshape(-1, fit.shape[2]))
        coefficients = (logs[:, other] - mean) @ basis.T
        step = _step(coefficients, fit[:, other], mean, basis, weight, _MARGIN * self.max_error)
        kept = _kept(coefficients, step)

        some = slice(max(1, _TEMPERED // (fit.shape[2] * len(fit))))
        tempered = np.log(np.maximum(fit[:, other][:, some], np.float32(2**-126)))
        rebuilt = _quantised(coefficients[:, some, :kept], step) @ basis[:kept] + mean

        def error(factor):
            exact, found = (softmax(values * np.float32(1 / factor)) for values in (tempered, rebuilt))
            return max(total_variation(p, q, weight).mean() for p, q in zip(exact, found, strict=True))

        low, high = accepted_factors(error, self.max_error, _FACTORS)
        codes = np.rint((logs - mean) @ basis[:kept].T / step)
        first, others = codes[0], codes[1:]
        energy = np.maximum(np.square(first).sum(0) * len(others), 1)
        prediction = np.clip((first * others).sum((0, 1)) / energy, 0, 1).astype(np.float32)
        # The range that was seen, four times: what exceeds it is clipped, and its error is seen when it is written.
        rest = np.concatenate([first[None], others - np.rint(first * prediction)])
        reach = 4 * np.abs(rest).max((0, 1))
        return replace(
            self,
            coefficients=kept,
            high=_last(reach > 127),
            reference=reference,
            exact_blocks=True,
            temperature_range=(math.ceil(1000 * low) / 1000, math.floor(1000 * high) / 1000),
            decoder=Decoder(mean, (basis[:kept] * (step / 2**_SHIFT)).astype(np.float32)),
            prediction=prediction,
            class_weight=weight,
        )


_FACTORS = 1 / 64, 64.0  # of the temperature, which are tried
_TEMPERED = 1 << 21  # numbers they are tried on
_SHIFT = 2  # codes count quarters of the step
_RADIX = 255
_DECODED = 1 << 20  # bytes of probabilities at a time: a matrix product is quicker with more rows
_UNPACKED = 1000  # rows at a time; columns that lie a power of two apart would evict each other from the CPU's cache
_MOST = 127 * _RADIX  # a code, and its difference from the predicted one
_MARGIN = 0.97  # of max_error, for the step to aim at: few blocks of other views and samples then need a finer one
_EXACT_CLASSES = 4096  # up to here every direction is in the basis; above, those that as many rows span


def _eigenvectors(rows):
    """Orthonormal directions of rows [M, C] by falling variance, float32 [≤ C, C]."""
    classes = rows.shape[1]
    if classes <= _EXACT_CLASSES:
        return np.linalg.eigh(rows.T.astype(np.float64) @ rows)[1].T[::-1].astype(np.float32)
    rows = rows[:: -(-len(rows) // _EXACT_CLASSES)].astype(np.float64)
    variance, left = np.linalg.eigh(rows @ rows.T)
    if variance[-1] <= 0:
        return np.eye(1, classes, dtype=np.float32)  # all rows are equal: any direction will do
    spanned = variance > 1e-10 * variance[-1]
    return ((left[:, spanned] / np.sqrt(variance[spanned])).T[::-1] @ rows).astype(np.float32)


def _quantised(coefficients, step):
    codes = np.clip(np.rint(coefficients / np.float32(step)), -(_MOST >> _SHIFT), _MOST >> _SHIFT)
    return codes * np.float32(step)


def _kept(coefficients, step):
    """How many coefficients are worth storing: below half a step of standard deviation nearly every code is zero."""
    spread = np.sqrt(np.square(coefficients, dtype=np.float64).mean((0, 1)))
    return max(1, _last(spread > step / 2))


def _last(chosen):
    """The number of items up to the last chosen one."""
    return int(np.flatnonzero(chosen)[-1]) + 1 if chosen.any() else 0


def _stated(error):
    """What a marker says of errors [B]."""
    return {"error": {"mean": round(float(error.mean()), 6), "worst": round(float(error.max()), 6)}}


def _step(coefficients, probability, mean, basis, weight, target):
    """The largest step that keeps every view's mean error within `target`. Raises CacheError where none does."""

    def error(step):
        kept = _kept(coefficients, step)
        decoded = _quantised(coefficients[..., :kept], step) @ basis[:kept] + mean
        return max(total_variation(p, softmax(x), weight).mean() for p, x in zip(probability, decoded, strict=True))

    high = 4 * max(float(np.abs(coefficients).max()), 1e-3)
    if error(high) <= target:
        return high  # one row would do for all
    low, least = high, max(1e-6 * high, 1e-9)  # below which no code holds the largest coefficient
    while error(low) > target:
        high, low = low, low / 2
        if low < least:
            raise CacheError(
                f"no codebook reaches max_error with {probability.shape[1]} samples to fit it to; "
                "give more, or a larger max_error, or dump as probability"
            )
    for _ in range(6):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if error(middle) <= target else (low, middle)
    return low


def _zstd_content(head: bytes) -> int | None:
    """The size of what a Zstandard frame decodes to, from its header (RFC 8878, 3.1.1.1); None if it says none."""
    if len(head) < 9 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flag, single, dictionary = head[4] >> 6, head[4] >> 5 & 1, head[4] & 3
    start = 5 + (1 - single) + (0, 1, 2, 4)[dictionary]
    size = (single, 2, 4, 8)[flag]
    return int.from_bytes(head[start : start + size], "little") + (256 if size == 2 else 0) if size else None


def centred_log(probability: np.ndarray) -> np.ndarray:
    """log p less its mean over the classes, float32 [..., C]."""
    logs = np.log(np.maximum(probability, np.float32(_FLOOR)))
    return logs - logs.mean(-1, keepdims=True)


def _decoded(codes, matrix, out=None):
    """softmax(codes @ basis + mean), float32 [B, C], of codes [B, R] and basis and mean below each other."""
    out = np.empty((len(codes), matrix.shape[1]), np.float32) if out is None else out

    def decode(piece):
        factor = np.ones((len(out[piece]), len(matrix)), np.float32)
        factor[:, :-1] = codes[piece]
        probability = np.matmul(factor, matrix, out=out[piece])
        with np.errstate(over="ignore"):
            np.exp(probability, out=probability)
        total = row_sums(probability)
        if 1e-20 < total.min() and total.max() < 1e30:
            probability *= (1 / total)[:, None]
        else:  # beyond the range of float32, where no logarithm of a probability is
            softmax(np.matmul(factor, matrix, out=probability))

    on_all_cores(decode, pieces(*out.shape, _DECODED))
    return out


def fit_views(views) -> list[int]:
    """The views that a codebook is fitted to: the reference, and three far from it.

    The reference is the plain crop at the centre where the specification has one, else view 0.
    """
    count = views.count
    reference = 0
    if views.name == "crop_flip":
        boxes = views.boxes(np.zeros(count, int), np.arange(count), np.ones((count, 2), int))
        reference = int(np.flatnonzero((boxes.top == 0) & (boxes.left == 0) & (boxes.flip == 0))[0])
    others = [view for view in np.linspace(0, count - 1, 4).astype(int).tolist() if view != reference]
    return [reference, *dict.fromkeys(others)][:4]
