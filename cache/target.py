"""The BKD target q = w p / Σ w p, by which encodings are judged: what it costs to store p in fewer bits.

B rows, C classes.
"""

import numpy as np

BETA = 0.9999  # of the effective number of samples, in the class weights w
SUM_TOLERANCE = 1e-3  # a float32 softmax sums to one within 1e-5; logits or weighted rows are nowhere near
_SAFE = 60  # logits whose exponential neither overflows nor vanishes, nor their sum


def class_weight(class_counts) -> np.ndarray:
    """w_c = (1 − β) / (1 − β^n_c), the inverse effective number of samples, float64 [C].

    A class without samples counts as if it had one.
    """
    return (1 - BETA) / (1 - BETA ** np.maximum(np.asarray(class_counts, np.float64), 1))


def total_variation(exact: np.ndarray, rebuilt: np.ndarray, weight=1.0) -> np.ndarray:
    """½ Σ |q − q̃| of q = w p / Σ w p for probabilities [B, C] and their rebuilt ones, float64 [B]."""
    q, rebuilt = exact * np.asarray(weight, np.float32), rebuilt * np.asarray(weight, np.float32)
    q /= q.sum(-1, keepdims=True)
    rebuilt /= rebuilt.sum(-1, keepdims=True)
    return 0.5 * np.abs(q - rebuilt).sum(-1, dtype=np.float64)


def no_distribution(probability: np.ndarray, tolerance: float = SUM_TOLERANCE) -> tuple[int, str] | None:
    """The first row of `probability` [B, C] that is no distribution, and what was found in it; None where all are."""
    # NaN fails every comparison, and an infinity fails the sum.
    sums = probability @ np.ones(probability.shape[1], np.float32)
    if np.abs(sums - 1).max() <= tolerance and probability.min() >= 0:
        return None
    row = int(np.flatnonzero(~((np.abs(sums - 1) <= tolerance) & (probability.min(1) >= 0)))[0])
    return row, f"from {probability[row].min()} to {probability[row].max()}, sum {sums[row]}"


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / Σ exp(x) over the last axis, float32 [..., C]. Overwrites `logits`."""
    if not (logits.max(initial=0) < _SAFE and logits.min(initial=0) > -_SAFE):
        logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= row_sums(logits)[..., None]
    return logits


def row_sums(values):
    """Σ over the last axis. As fast as a product with ones, whose bits depend on how many rows there are; these do not."""
    return np.einsum("...c->...", values)
