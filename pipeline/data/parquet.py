"""Data sets as Parquet in the Hugging Face layout: an image struct of `bytes` or a `path`, an integer label column.

Shards are read some rows at a time, and what is more than some memory from a copy: how large a set is, and how its files
were written, does not say how much memory it takes.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from pyarrow import types

from offline_bkd.pipeline import UserError, config, schema
from offline_bkd.pipeline.data.dataset import Dataset, numbered_classes, part_names
from offline_bkd.pipeline.data.image_copy import CopiedImages, make_copy, open_copy
from offline_bkd.pipeline.data.lists import listed_part
from offline_bkd.pipeline.show.terminal import counted, printable

ROWS = 64  # that are unpacked at a time
IN_MEMORY = 2**30  # bytes of a part's images that are held in memory; of more a copy is read
UNPACKED, TIMES = 2**30, 100  # what unpacks to more bytes, and to more times its file's, is refused
SHARD = re.compile(r"(.*-)\d{5}-of-(\d{5})(.*)")


class EncodedImages(Sequence):
    """N images' bytes in Arrow's memory: no Python object for each, which worker processes would copy."""

    def __init__(self, column: pyarrow.ChunkedArray, rows: np.ndarray):
        self.column, self.rows = column, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        """The bytes of one image; of an array of indices, the images there."""
        if isinstance(index, np.ndarray):
            return EncodedImages(self.column, self.rows[index])
        return self.column[int(self.rows[index])].as_py()


class Shard(NamedTuple):
    path: Path
    names: list[str] | None  # of the classes, from its metadata
    rows: int
    unpacked: int  # bytes of images and labels


def load_parquet(section: schema.Parquet, root: Path, download: bool) -> tuple[Dataset, ...]:
    """The parts. Classes are named by the metadata of any, or numbered up to the largest label of all.

    A part of more than IN_MEMORY bytes is read from a copy (image_copy.py), which must be there if not `download`.
    """
    patterns = part_names(section)
    shards = [_shards(section, root, *named) for named in zip(patterns, ("data.train", "data.test", "data.validation"))]
    columns = [_read(own, section, root, download) for own in shards]
    pyarrow.default_memory_pool().release_unused()  # what reading took beside the images
    names = [_names(own) for own in shards]
    classes = next(filter(None, names), None) or numbered_classes(*(label for _, label in columns))
    return tuple(
        _part(root, pattern, own, images, label, named or classes)
        for pattern, own, named, (images, label) in zip(patterns, shards, names, columns)
    )


def _part(root: Path, pattern: str, shards: list[Shard], images: Sequence, label: np.ndarray, classes: list[str]) -> Dataset:
    if isinstance(images, list):
        part = listed_part(root, f"{pattern} row", images, label, classes)
    else:
        copied = isinstance(images, CopiedImages)
        part = Dataset(
            name=printable(shards[0].path.parent.name),
            classes=tuple(classes),
            sample_id=np.arange(len(label)),
            label=label,
            images=images,
            image_digest=images.records["sha256"] if copied else None,
        )
        if copied:
            vars(part)["image_size"] = images.records["size"].astype(np.int64)  # decoded when they were copied
    return part.take(np.arange(len(part)), _missing(shards))


def image_column(path: Path, preferred: str) -> str:
    """The column of the Parquet file at `path` that holds images: `preferred`, or the only one that can.

    Raises UserError where the file cannot be read, or has no such column or no rows.
    """
    with _opened(path) as file:
        fits = [field.name for field in file.schema_arrow if _is_bytes(_image_fields(field.type).get("bytes"))]
        if preferred not in fits and len(fits) != 1:
            found = f"several, {', '.join(fits)}" if fits else f"none among {', '.join(file.schema_arrow.names)}"
            raise UserError(
                f"{printable(str(path))}: images are in a column of bytes, or a struct with a field 'bytes'; "
                f"there are {found}; name it {preferred!r}"
            )
        if not file.metadata.num_rows:
            raise UserError(f"{printable(str(path))} holds no images; name others")
    return preferred if preferred in fits else fits[0]


def read_images(path: Path, column: str, rows: int) -> Iterator[EncodedImages]:
    """The images in a column of the Parquet file at `path`: of `rows` rows or, since ROWS are unpacked at a time, some more.

    Raises UserError where the file cannot be read.
    """
    unpacked, images = 0, pyarrow.chunked_array([], pyarrow.large_binary())
    with _opened(path) as file:
        for batch in file.iter_batches(ROWS, columns=[column], use_threads=False):
            unpacked += batch.nbytes
            _refuse_bomb(path, unpacked)
            data = _encoded(batch.column(column))["bytes"].cast(pyarrow.large_binary())
            images = pyarrow.chunked_array([*images.chunks, data])
            if len(images) >= rows:
                yield EncodedImages(images, np.arange(len(images)))
                images = pyarrow.chunked_array([], pyarrow.large_binary())
    if len(images):
        yield EncodedImages(images, np.arange(len(images)))


def _shards(section: schema.Parquet, root: Path, pattern: str, key: str) -> list[Shard]:
    """The files that `pattern` names below `root`, in their order, but for those without rows."""
    whole = root / pattern
    paths = [whole] if whole.exists() else sorted(map(Path, glob.glob(os.path.join(glob.escape(str(root)), pattern))))
    if not paths:
        raise UserError(f"no file matches {pattern!r} in {printable(str(root))}; check data.root and {key}")
    shards = []
    for path in paths:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise UserError(f"{printable(str(path))} is {kind}; {key} names Parquet files")
        with _opened(path) as file:
            if file.metadata.num_rows:
                _refuse_columns(file, section, path)
                unpacked = _unpacked(file, section)
                _refuse_bomb(path, unpacked)
                names = _class_names(file.schema_arrow, section.label, path)
                shards.append(Shard(path, names, file.metadata.num_rows, unpacked))
    if not shards:
        raise UserError(f"{printable(str(root / pattern))} holds no samples; name other files in {key}")
    return shards


def _refuse_columns(file: pyarrow.parquet.ParquetFile, section: schema.Parquet, path: Path) -> None:
    """Raises UserError where the columns are not there, of other types, or would fill the memory."""
    columns = file.schema_arrow
    for name in (section.image, section.label):
        if name not in columns.names:
            raise UserError(f"{path} has no column {name!r} but {', '.join(columns.names)}; set data.image, data.label")
    image, label = columns.field(section.image).type, columns.field(section.label).type
    fields = _image_fields(image)
    if not _is_bytes(fields.get("bytes")) and not _is_text(fields.get("path")):
        raise UserError(
            f"{path}: column {section.image!r} is {image}, not a struct with a binary field 'bytes' or a text field 'path'"
        )
    if not types.is_integer(label):
        raise UserError(f"{path}: column {section.label!r} is {label}; labels are whole numbers; number the classes from 0")


def _unpacked(file: pyarrow.parquet.ParquetFile, section: schema.Parquet) -> int:
    """Bytes that the columns hold by the file's own account; repeated values may make them more."""
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    read = (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in (section.image, section.label))
    return max(sum(chunk.total_uncompressed_size for chunk in read), 8 * file.metadata.num_rows)


def _image_fields(kind: pyarrow.DataType) -> dict[str, pyarrow.DataType]:
    """The types of an image column's fields; one without fields is the bytes themselves."""
    return {field.name: field.type for field in kind} if types.is_struct(kind) else {"bytes": kind}


def _encoded(image: pyarrow.Array) -> dict[str, pyarrow.Array]:
    """The fields of an image column."""
    return dict(zip(_image_fields(image.type), image.flatten() if types.is_struct(image.type) else [image]))


def _is_bytes(kind: pyarrow.DataType | None) -> bool:
    tests = types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view
    return kind is not None and any(test(kind) for test in tests)


def _is_text(kind: pyarrow.DataType | None) -> bool:
    return kind is not None and any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view))


def _refuse_bomb(path: Path, unpacked: int) -> None:
    if unpacked > UNPACKED and unpacked > TIMES * path.stat().st_size:
        raise UserError(
            f"{path} unpacks to more than {TIMES} times its size, {unpacked / 2**30:,.1f} GiB and perhaps more; "
            "write its images as they are, not packed"
        )


def _missing(shards: list[Shard]) -> tuple[str, ...]:
    """A note on each group of shards, numbered 00000-of-00005, of which some are not there."""
    found = Counter(
        (str(shard.path.parent / name[1]), int(name[2]), name[3])
        for shard in shards
        if (name := SHARD.fullmatch(shard.path.name))
    )
    return tuple(
        f"of the {total} shards {printable(start)}*-of-{total:05}{end} {count} are read; the others are empty or not there"
        for (start, total, end), count in found.items()
        if count < total
    )


def _names(shards: list[Shard]) -> list[str] | None:
    """The class names that the shards give, if they do."""
    named = [shard for shard in shards if shard.names is not None]
    for shard in named:
        if shard.names != named[0].names:
            raise UserError(f"{shard.path}: class names differ from those of {named[0].path}")
    return named[0].names if named else None


def _class_names(columns: pyarrow.Schema, label: str, path: Path) -> list[str] | None:
    """The names that the Hugging Face metadata of a Parquet schema give to the column `label`, if they do."""
    try:
        names = json.loads(columns.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (TypeError, KeyError, ValueError, RecursionError):
        return None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(
            f"{path}: the class names of {label!r} in the Hugging Face metadata are {repr(names)[:60]}, not a list of texts; "
            "mend the metadata or remove them"
        )
    return names


@contextmanager
def _opened(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """The Parquet file at `path`. What is wrong with it, while it is read too, is a UserError that names it."""
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
            yield file
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {printable(str(path))} as Parquet: {' '.join(str(error).split())}")


def _read(shards: list[Shard], section: schema.Parquet, root: Path, download: bool) -> tuple[Sequence, np.ndarray]:
    """Encoded images, or the paths of their files, and labels, int64 [N], of all shards."""
    chunks, paths, labels, size = [], [], [], sum(shard.unpacked for shard in shards)
    if size > IN_MEMORY:
        return _copied(shards, section, root, size, download)
    size = 0
    for data, files, label in _batches(shards, section):
        size += data.nbytes
        if size > IN_MEMORY:  # values that are stored once and come again
            return _copied(shards, section, root, size, download)
        chunks.append(data)
        paths += files
        labels += label
    column = pyarrow.chunked_array(chunks, pyarrow.large_binary())
    if column.null_count == len(column) and None not in paths:
        return paths, np.array(labels, np.int64)
    if column.null_count:
        _refuse_null(shards, column.is_null().index(True).as_py(), column.null_count)
    return EncodedImages(column, np.arange(len(column))), np.array(labels, np.int64)


def _copied(
    shards: list[Shard], section: schema.Parquet, root: Path, size: int, download: bool
) -> tuple[CopiedImages, np.ndarray]:
    """The same from a copy, named by the files that it is of; it is made if it is not there."""
    folder = config.expand(section.copies, root) if section.copies else shards[0].path.parent / "copies"
    status = [(shard.path, shard.path.stat()) for shard in shards]
    source = [section.image, section.label, *((path.name, found.st_size, found.st_mtime_ns) for path, found in status)]
    path = folder / f"{hashlib.sha256(json.dumps(source).encode()).hexdigest()[:20]}.images"
    if not path.exists():
        if not download:
            raise UserError(
                f"{size / 1e9:,.1f} GB of images in {printable(str(shards[0].path.parent))} are read from a copy in "
                f"{printable(str(folder))}, which is yet to be made, and a dry run writes nothing; leave out --dry-run"
            )
        make_copy(path, _samples(shards, section), sum(shard.rows for shard in shards), size)
    images = open_copy(path)
    return images, images.records["label"].astype(np.int64)


def _samples(shards: list[Shard], section: schema.Parquet) -> Iterator[list[tuple[bytes, int]]]:
    row = 0
    for data, _, label in _batches(shards, section):
        if data.null_count:
            _refuse_null(shards, row + data.is_null().to_pylist().index(True))
        yield list(zip(data.to_pylist(), label))
        row += len(data)


def _refuse_null(shards: list[Shard], row: int, count: int = 1):
    raise UserError(
        f"{printable(str(shards[0].path.parent))}: row {row} has no image bytes ({counted(count, 'such row')}); remove it"
    )


def _batches(shards: list[Shard], section: schema.Parquet) -> Iterator[tuple[pyarrow.Array, list[str | None], list[int]]]:
    """Image bytes, paths and labels, some rows at a time."""
    for shard in shards:
        unpacked = 0
        with _opened(shard.path) as file:
            for batch in file.iter_batches(ROWS, columns=[section.image, section.label], use_threads=False):
                unpacked += batch.nbytes
                _refuse_bomb(shard.path, unpacked)
                image, label = batch.column(section.image), batch.column(section.label)
                if label.null_count:
                    raise UserError(f"{shard.path}: column {section.label!r} must hold whole numbers without gaps")
                fields, empty = _encoded(image), pyarrow.nulls(len(batch))
                data = fields.get("bytes", empty).cast(pyarrow.large_binary())
                yield data, fields.get("path", empty).to_pylist(), label.cast(pyarrow.int64()).to_pylist()
