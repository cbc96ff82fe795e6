"""Rows worked on a few at a time, so that they stay in the CPU's cache from step to step."""

_BYTES = 256 << 10  # of float32 rows, but no fewer rows than a matrix product is quick with


def pieces(rows: int, width: int) -> list[slice]:
    """Slices that cover `rows` rows of `width` numbers."""
    step = max(64, _BYTES // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
