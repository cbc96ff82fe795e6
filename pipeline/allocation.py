"""Memory that is freed stays with the process: asking the kernel for it again can take as long as arithmetic."""

import ctypes

# glibc's names, from malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Lets large blocks come from the heap, which is not given back; True where the C library can do so (glibc).

    A batch's activations are freed and asked for again in every step. No result depends on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 << 20)])
