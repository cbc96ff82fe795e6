"""Small image files for tests."""

import io

import numpy as np
from PIL import Image


def png(first: int, size=(6, 5), format="PNG", mode="RGB") -> bytes:
    pixels = np.full((size[1], size[0], 3), 9, np.uint8)
    pixels[0, 0] = first
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format)
    return stream.getvalue()
