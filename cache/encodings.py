"""Encodings: probabilities to what is stored, and back. One class each, in the dictionary `ENCODINGS`.

B rows, C classes, R stored numbers a row.
"""

from dataclasses import dataclass

import numpy as np

from cache.format import array_document


@dataclass(frozen=True, kw_only=True)
class Probability:
    """The probabilities themselves, which any reader of Zarr understands. float32 is exact.

    float16 keeps 11 bits of a probability above 6e-5 and steps of 6e-8 below it.
    """

    dtype: str = "float16"

    name = array = "probability"
    decoder = None  # what is stored needs no decoding but a cast

    def __post_init__(self):
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"encoding.dtype must be float16 or float32, found {self.dtype!r}")

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def width(self, classes: int) -> int:
        """R, the stored numbers a row."""
        return classes

    def documents(self, views: int, samples: int, classes: int, block_rows: int) -> dict[str, dict]:
        """The metadata of this encoding's arrays, by name."""
        # No probability is NaN, so a chunk that is missing cannot be mistaken for data.
        shape, chunks = [views, samples, classes], [1, block_rows, classes]
        dimensions = ["view", "sample", "class"]
        return {"probability": array_document(shape, self.dtype, dimensions, chunks=chunks, fill_value="NaN")}

    def codebook(self) -> dict[str, np.ndarray]:
        """The arrays that are written once, by name."""
        return {}

    def encode(self, probability: np.ndarray) -> np.ndarray:
        """float32 [B, C] to what is stored, [B, R]."""
        return probability.astype(self.dtype)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """What is stored, [B, R], to float32 [B, C]."""
        return stored.astype(np.float32)

    def to_json(self) -> dict:
        return {"name": self.name, "dtype": self.dtype}


ENCODINGS = {"probability": Probability}


def from_json(values: dict) -> Probability:
    """The encoding that `values` ({"name": …, …}) asks for. Raises ValueError for one that is not known."""
    if not isinstance(values, dict) or values.get("name") not in ENCODINGS:
        raise ValueError(f"encoding.name must be one of {', '.join(ENCODINGS)}, found {values!r}")
    options = {key: value for key, value in values.items() if key != "name"}
    try:
        return ENCODINGS[values["name"]](**options)
    except TypeError as error:
        raise ValueError(f"encoding {values['name']} does not take {options}") from error
