"""Rows worked on a few at a time, so that they stay in the CPU's cache from step to step."""

_BYTES = 256 << 10  # of float32 rows


def pieces(rows: int, width: int) -> list[slice]:
    """Slices that cover `rows` rows of `width` numbers."""
    step = max(1, _BYTES // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
