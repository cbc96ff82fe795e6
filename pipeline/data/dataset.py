"""A part of a data set: labels, class names and images that are decoded when asked for.

Left out: where parts come from (datasets.py), crops and tensors (images.py). Shapes: N samples, C classes.
"""

import hashlib
import io
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from offline_bkd.cache.storage import open_regular
from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.data import decoding
from offline_bkd.pipeline.show.progress import Progress
from offline_bkd.pipeline.show.terminal import printable

MOST_CLASSES = 100_000
KNOWN = "image_size", "file_status", "image_key"  # columns that are read when first asked for
ROWS_A_TASK = 64  # of threads: a task for each row would cost more than reading it


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One part of a data set."""

    name: str
    classes: tuple[str, ...]
    sample_id: np.ndarray  # int64 [N]: the sample's position in its source, whatever has been left out since
    label: np.ndarray  # int64 [N]
    images: Sequence  # N of uint8 arrays [H, W, 3], or encoded bytes; a list holds paths of image files, as text
    image_digest: np.ndarray | None = None  # uint8 [N, 32]: the sha256 of each image's bytes, where they have been read before
    root: Path | None = None  # the folder that paths begin with, left out of fingerprints
    listed: str | None = None  # where paths are listed, up to a sample's number there, from 1: "train.txt line"
    notes: tuple[str, ...] = ()  # what is allowed, but perhaps not meant: a line each
    part: str = ""  # "training", "test" or "validation", where it is one of those

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Samples of each class, int64 [C]."""
        return np.bincount(self.label, minlength=len(self.classes))

    @cached_property
    def image_size(self) -> np.ndarray:
        """(height, width) of every image as decoded, int64 [N, 2]. Raises UserError naming the images that do not decode."""
        return np.array(self.for_each(self.size), np.int64).reshape(-1, 2)

    @cached_property
    def file_status(self) -> np.ndarray:
        """(bytes, key) of every image's file, int64 [N, 2]; paths that lead to one file have equal keys.

        Raises UserError naming the files that are missing, and what is no regular file.
        """
        return np.array(self.for_each(self._file_status, "restore them or correct data.root"), np.int64).reshape(-1, 2)

    @cached_property
    def image_key(self) -> np.ndarray:
        """int64 [N], equal for samples of one file, or of equal bytes."""
        if self.image_digest is not None:
            return np.ascontiguousarray(self.image_digest[:, :8]).view("<i8")[:, 0]
        if isinstance(self.images, list):
            return self.file_status[:, 1]
        digests = (hashlib.sha256(bytes(image)).digest()[:8] for image in self.images)
        return np.frombuffer(b"".join(digests), "<i8")

    def for_each(self, read: Callable[[int], object], remedy: str = "replace or remove them") -> list:
        """`read(row)` of every row, in threads. Raises one UserError for all that `read` raised, with a `remedy`."""

        def attempt(row: int):
            try:
                return read(row)
            except UserError as error:
                return error

        def some(start: int) -> list:
            return [attempt(row) for row in range(start, min(start + ROWS_A_TASK, len(self)))]

        results, start = [], time.perf_counter()
        what = f"reading {self.part} images" if self.part else "reading images"
        # Decoding and waiting for a disk release the interpreter's lock.
        with Progress(what, len(self), 0, plain=True) as progress, ThreadPoolExecutor() as threads:
            for part in threads.map(some, range(0, len(self), ROWS_A_TASK)):
                results += part
                progress.advance(len(results) / (time.perf_counter() - start), "images/s", len(part))
        refuse([str(error) for error in results if isinstance(error, UserError)], remedy)
        return results

    def decode(self, row: int) -> Image.Image:
        """Image `row`, in RGB, upright. Raises UserError naming it if it cannot be read."""
        image = self.images[row]
        return Image.fromarray(image) if isinstance(image, np.ndarray) else self._read(row, image, decoding.decode)

    def size(self, row: int) -> tuple[int, int]:
        """(height, width) of image `row`, upright. Raises UserError naming it if it cannot be read to its end."""
        image = self.images[row]
        return image.shape[:2] if isinstance(image, np.ndarray) else self._read(row, image, decoding.image_size)

    def describe(self, row: int) -> str:
        """What a person calls the sample, in printable characters: its file, or its position in the source."""
        if not isinstance(self.images, list):
            return f"{self.name} sample {self.sample_id[row]}"
        return printable(self.images[row]) + (f" ({self.listed} {self.sample_id[row] + 1})" if self.listed else "")

    def take(self, rows: np.ndarray, notes: Sequence[str] = ()) -> "Dataset":
        """The samples at `rows`, in that order, with further `notes`."""
        images = [self.images[row] for row in rows] if isinstance(self.images, list) else self.images[rows]
        notes = (*self.notes, *notes)
        digest = None if self.image_digest is None else self.image_digest[rows]
        columns = {"sample_id": self.sample_id[rows], "label": self.label[rows], "images": images, "image_digest": digest}
        part = replace(self, **columns, notes=notes)
        vars(part).update({known: vars(self)[known][rows] for known in KNOWN if known in vars(self)})  # not read again
        return part

    def named(self, part: str) -> "Dataset":
        """The same samples, as the `part` that they are."""
        same = replace(self, part=part)
        vars(same).update({known: vars(self)[known] for known in KNOWN if known in vars(self)})
        return same

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the data set is, by part: sha256 of sample ids, labels and images.

        Of images: all their bytes, or their digests where these are known; of files, their paths and sizes.
        """
        images, top = hashlib.sha256(), os.path.join(self.root or "", "")
        content: Iterable = self.images
        if self.image_digest is not None:
            content = [self.image_digest.tobytes()]
        elif isinstance(self.images, list):
            sizes = self.file_status[:, 0].tolist()
            content = (os.fsencode(f"{path.removeprefix(top)} {size}\n") for path, size in zip(self.images, sizes))
        for part in content:
            images.update(part)
        return {
            "size": f"{len(self):,} samples of {len(self.classes):,} classes",
            "samples": hashlib.sha256(self.sample_id.astype("<i8").tobytes()).hexdigest(),
            "labels": hashlib.sha256(self.label.astype("<i8").tobytes()).hexdigest(),
            "images": images.hexdigest(),
        }

    def _read(self, row: int, image: bytes | str, read: Callable):
        """What `read` makes of the encoded `image`, which is that of `row`."""
        try:
            with open_regular(image) if isinstance(image, str) else io.BytesIO(image) as file:
                return read(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.describe(row)} cannot be read as an image: {reason}")

    def _file_status(self, row: int) -> tuple[int, int]:
        try:
            status = os.stat(self.images[row])
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"{self.describe(row)} cannot be read: {getattr(error, 'strerror', error)}")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.describe(row)} cannot be read: it is no regular file")
        return status.st_size, hash((status.st_dev, status.st_ino) if status.st_ino else self.images[row])


def refuse(problems: Sequence[str], remedy: str = "replace or remove them") -> None:
    """Raises one UserError of all `problems`, if there are any, with a `remedy`."""
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError("; ".join(problems[:3]) + f"{more}: {remedy}")


def part_names(section: schema.Data) -> list[str]:
    """What the configuration calls the training, the test and, where it has files of its own, the validation part."""
    return [section.train, section.test, *([section.validation] if isinstance(section.validation, str) else [])]


def numbered_classes(*labels: Sequence[int]) -> list[str]:
    """The names "0", "1", … of classes up to the largest of the labels [N] of all parts."""
    return [str(c) for c in range(min(max(np.max(label, initial=-1) for label in labels), MOST_CLASSES) + 1)]
