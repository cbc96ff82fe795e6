"""Rows worked on a few at a time, so that they stay in the CPU's cache from step to step, on every core."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import ThreadpoolController

_BLAS = threading.Lock()
_WORTHWHILE = 16  # pieces, below which beginning threads costs more than they bring


def pieces(rows: int, width: int, size: int = 256 << 10) -> list[slice]:
    """Slices that cover `rows` rows of `width` float32 numbers, of about `size` bytes.

    But of no fewer rows than a matrix product is quick with.
    """
    step = max(64, size // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def on_all_cores(work, items: list) -> None:
    """Calls work(item) for each of `items`, in threads where they are many."""
    if len(items) < _WORTHWHILE:
        for item in items:
            work(item)
        return
    # A matrix product's own threads would wait for each other. Their number is the process's: one caller at a time sets it.
    with _BLAS, one_blas_thread(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(work, items):
            pass


def one_blas_thread():
    """A context in which a matrix product of NumPy keeps to one core."""
    return _controller().limit(limits=1, user_api="blas")


_controller = functools.cache(ThreadpoolController)
