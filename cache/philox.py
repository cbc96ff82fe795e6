"""Counter-based random integers: Philox4x32-10 (Salmon et al., SC 2011).

A draw is a pure function of a key (the seed) and a counter (what the draw is for), so it depends on no
worker, batch, order or restart. Everything is 32-bit integer arithmetic: the same bits on every machine.
"""

import numpy as np

# The fourth counter word is the number of the draw, the third says what the draw is for.
SUBSET, ORDER, VIEW, BOX, DROPOUT, CLASS, FIT = 1, 2, 3, 4, 5, 6, 7

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: tuple, key: tuple) -> np.ndarray:
    """Ten rounds of Philox4x32 over `counter`, four words that broadcast together, under `key`, two words.

    Words are integers in [0, 2^32). Returns uint32 [4, ...].
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def draw(seed: int, purpose: int, first, second=0, number=0) -> np.ndarray:
    """Four random words, uint32 [4, ...], for the arrays `first` and `second` (a sample id, an epoch, a view).

    `purpose` is one of the constants of this module and keeps the streams apart. `seed` is in [0, 2^64).
    """
    return philox4x32((first, second, purpose, number), (seed & 0xFFFFFFFF, seed >> 32))


def below(words: np.ndarray, bound) -> np.ndarray:
    """Random words, uint32 [...], to integers in [0, bound), int64, by multiply and shift."""
    return ((words.astype(np.uint64) * np.asarray(bound, np.uint64)) >> _SHIFT).astype(np.int64)


def permutation(seed: int, purpose: int, items, second=0) -> np.ndarray:
    """A random order of `items`, distinct integers [N]: positions, int64 [N], sorted by a 64-bit draw for each item."""
    high, low, _, _ = draw(seed, purpose, items, second).astype(np.uint64)
    return np.argsort((high << _SHIFT) | low, kind="stable")
