"""A copy of a set's encoded images in one file, of which any image can be read alone.

Parquet gives rows by the group only, so a set that is larger than memory is copied once. Images are read by position, not
through a memory map: where memory is short, a map's page faults take thirty times as long. The file holds the images one
after another, then a record for each sample (`RECORD`), then what there is (`END`); it has its name once it is whole.
"""

import fcntl
import glob
import hashlib
import io
import os
import shutil
import struct
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np

from offline_bkd.cache.storage import new_file, open_regular
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.data import decoding
from offline_bkd.pipeline.data.dataset import refuse
from offline_bkd.pipeline.show.progress import Progress
from offline_bkd.pipeline.show.terminal import printable

RECORD = np.dtype(
    [
        ("end", "<i8"),  # of the image's bytes in the file
        ("label", "<i8"),
        ("size", "<i4", 2),  # height and width, decoded
        ("crc32c", "<u4"),  # of the image's bytes
        ("sha256", "u1", 32),
    ]
)
END = struct.Struct("<8sQI")  # a mark, the number of samples, the records' CRC-32C
MARK = b"images 1"


class CopiedImages(Sequence):
    """N encoded images in a copy."""

    def __init__(self, path: Path, file: BinaryIO, records: np.ndarray, rows: np.ndarray):
        self.path, self.file, self.records, self.rows = path, file, records, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        """The bytes of one image; of an array of indices, the images there. Raises UserError where a byte has changed."""
        if isinstance(index, np.ndarray):
            return CopiedImages(self.path, self.file, self.records, self.rows[index])
        row = self.rows[index]
        start, end = self.records["end"][row - 1] if row else 0, self.records["end"][row]
        data = os.pread(self.file.fileno(), end - start, start)
        if google_crc32c.value(data) != self.records["crc32c"][row]:
            raise UserError(f"{printable(str(self.path))} is damaged (sample {row}); remove it, and it is made again")
        return data


def open_copy(path: Path) -> CopiedImages:
    """The images of the copy at `path`. Raises UserError where it is not whole."""
    try:
        file = open_regular(path)
        length = file.seek(0, os.SEEK_END)
        mark, count, checksum = END.unpack(os.pread(file.fileno(), END.size, max(0, length - END.size)))
        start = length - END.size - count * RECORD.itemsize
        data = os.pread(file.fileno(), count * RECORD.itemsize, start) if start >= 0 else b""
    except (OSError, struct.error):
        data, mark, checksum = b"", None, 0
    if mark != MARK or google_crc32c.value(data) != checksum:
        raise UserError(f"{printable(str(path))} is damaged; remove it, and it is made again")
    records = np.frombuffer(data, RECORD)
    return CopiedImages(path, file, records, np.arange(len(records)))


def make_copy(path: Path, samples: Iterable[list[tuple[bytes, int]]], count: int, size: int) -> None:
    """Writes the copy at `path`, if it is not there, of `count` samples (bytes, label), about `size` bytes, given in pieces.

    Processes that want the same copy wait for the one that makes it. Raises UserError for images that do not decode, and
    where there is no room.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            for partial in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
                partial.unlink()  # its writer is gone
            if (free := shutil.disk_usage(path.parent).free) < size:
                raise OSError(f"{free / 1e9:,.1f} GB are free there")
            with new_file(path) as file:
                _write(file, samples, count, path)
    except OSError as error:
        raise UserError(
            f"cannot copy {size / 1e9:,.1f} GB of images, which are not held in memory, to {printable(str(path.parent))}: "
            f"{error.strerror or error}; make room, or give -o data.copies=FOLDER"
        )


def _write(file: BinaryIO, samples: Iterable[list[tuple[bytes, int]]], count: int, path: Path) -> None:
    records, broken, end, start = np.zeros(count, RECORD), [], 0, time.perf_counter()
    row = 0
    with (
        Progress(f"copying images to {printable(str(path))}", count, 0, "images", plain=True) as progress,
        ThreadPoolExecutor() as threads,
    ):
        for piece in samples:
            for (data, label), size in zip(piece, threads.map(_size, [data for data, _ in piece])):
                if isinstance(size, str):
                    broken.append(f"sample {row} cannot be read as an image: {size}")
                    size = 0, 0
                end += file.write(data)
                records[row] = end, label, size, google_crc32c.value(data), np.frombuffer(hashlib.sha256(data).digest(), "u1")
                row += 1
            progress.advance(row / (time.perf_counter() - start), "images/s", len(piece))
    refuse(broken)
    file.write(records.tobytes())
    file.write(END.pack(MARK, count, google_crc32c.value(records.tobytes())))


def _size(data: bytes) -> tuple[int, int] | str:
    """(height, width) of an image, or why there is none."""
    try:
        return decoding.image_size(io.BytesIO(data))
    except ValueError as error:
        return str(error)
