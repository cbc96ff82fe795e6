"""Rows worked on a few at a time, so that they stay in the CPU's cache from step to step."""


def pieces(rows: int, width: int, size: int = 256 << 10) -> list[slice]:
    """Slices that cover `rows` rows of `width` float32 numbers, of about `size` bytes.

    But of no fewer rows than a matrix product is quick with.
    """
    step = max(64, size // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
