"""A network's answers about images of any kind of source: a table of a row an image.

Shapes: M images, C classes.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import torch

from offline_bkd.cache.storage import new_file
from offline_bkd.cache.views import CropFlip
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data.dataset import Dataset
from offline_bkd.pipeline.data.folders import image_files
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.data.parquet import image_column, read_images
from offline_bkd.pipeline.evaluate import infer, load_model
from offline_bkd.pipeline.show.terminal import counted, printable

BEST = 5  # classes that are named
PIECE = 2000  # images that are looked at together
TABLES = {".csv": pyarrow.csv.CSVWriter, ".parquet": pyarrow.parquet.ParquetWriter}


class TableWriter(Protocol):
    def write(self, table: pyarrow.Table) -> None: ...


def predict(
    folder: str,
    sources: Sequence[str],
    out: str | None,
    checkpoint: str,
    device: torch.device,
    probabilities: bool = False,
) -> list[str]:
    """Writes what the run's network says of every image of `sources`: files, folders, or Parquet files with an image column.

    Columns: file; class and confidence, the largest probability; class_2, confidence_2, … of the next best; and with
    `probabilities` p_<class> of each. `out`: a .csv or .parquet file that must not exist; None: CSV to the standard output.

    Returns a line for every image that was left out because it cannot be read or is not of the network's size. Raises
    UserError, with nothing at `out`, for an `out` that cannot be written, for sources without images and where none is left.
    """
    if out is not None:
        _refuse_out(out)
    run, answered = runs.open_run(folder), 0
    experiment, summary = run.config(), run.summary()
    classes, size = summary["classes"], tuple(summary.get("image_size", ()))
    column, skipped = getattr(experiment.data, "image", "image"), []
    opened = [_open(source, column, tuple(classes)) for source in sources]  # all, before the first is read
    model = load_model(run, checkpoint, experiment, len(classes)).to(device)
    precision = experiment.network(run.stage).training.precision
    schema = _schema(classes, probabilities)
    with _writer(out, schema) as writer, redirect_stdout(sys.stderr):  # progress is no part of the table
        for piece in chain.from_iterable(opened):
            sizes, reasons = _look(piece, size if isinstance(experiment.views, CropFlip) else None)
            for reason in filter(None, reasons):
                print(f"skipped: {reason}", file=sys.stderr, flush=True)
                skipped.append(reason)
            rows = np.array([row for row, reason in enumerate(reasons) if reason is None], np.int64)
            if not len(rows):
                continue
            readable = piece.take(rows)
            vars(readable)["image_size"] = np.array(sizes, np.int64)[rows]  # which is known, and would be read again
            images = open_images(readable, experiment.views, device, experiment.data.workers)
            logits = infer(model, images, np.arange(len(rows)), precision=precision)
            names = [readable.describe(row) for row in range(len(rows))]
            writer.write(_table(names, torch.softmax(logits, 1).cpu(), classes, schema, probabilities))
            answered += len(rows)
        if not answered:
            raise UserError(f"no image is left to answer about, of {counted(len(skipped), 'image')}; name others")
    if out:
        print(f"{out}: {counted(answered, 'image')}", flush=True)
    return skipped


def _open(source: str, column: str, classes: tuple[str, ...]) -> Iterator[Dataset]:
    """The images of one source, some at a time, none of which is read yet. Raises UserError for a source without images."""
    path, files = Path(source), [source]
    if not path.exists():
        raise UserError(f"there is no {printable(source)}; name image files, folders of them, or Parquet files")
    if path.suffix == ".parquet":
        return _pieces(printable(source), classes, read_images(path, image_column(path, column), PIECE))
    if path.is_dir():
        files, notes = image_files(path)
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
        if not files:
            raise UserError(f"{printable(source)} holds no images; name others")
    some = (files[start : start + PIECE] for start in range(0, len(files), PIECE))
    return _pieces(printable(source), classes, some)


def _pieces(name: str, classes: tuple[str, ...], parts: Iterable[Sequence[str | bytes]]) -> Iterator[Dataset]:
    first = 0
    for images in parts:
        yield Dataset(
            name=name,
            classes=classes,
            sample_id=np.arange(first, first + len(images)),
            label=np.zeros(len(images), np.int64),  # which is not known, and not looked at
            images=images,
        )
        first += len(images)


def _look(images: Dataset, wanted: tuple[int, int] | None) -> tuple[list[tuple[int, int]], list[str | None]]:
    """(height, width) of every image, and why it is left out: it cannot be read, or is not of the size `wanted`."""

    def look(row: int) -> tuple[tuple[int, int], str | None]:
        try:
            size = images.size(row)
        except UserError as error:
            return (0, 0), str(error)
        if wanted and size != wanted:
            found, right = (" x ".join(map(str, side)) for side in (size, wanted))
            return size, f"{images.describe(row)} is {found} pixels, the network takes {right}"
        return size, None

    with ThreadPoolExecutor() as threads:
        sizes, reasons = zip(*threads.map(look, range(len(images))))
    return list(sizes), list(reasons)


def _schema(classes: Sequence[str], probabilities: bool) -> pyarrow.Schema:
    fields = [("file", pyarrow.string())]
    for place in range(1, min(BEST, len(classes)) + 1):
        ending = f"_{place}" if place > 1 else ""
        fields += [(f"class{ending}", pyarrow.string()), (f"confidence{ending}", pyarrow.float32())]
    return pyarrow.schema(fields + [(f"p_{name}", pyarrow.float32()) for name in classes if probabilities])


def _table(
    names: list[str], probability: torch.Tensor, classes: Sequence[str], schema: pyarrow.Schema, probabilities: bool
) -> pyarrow.Table:
    """The rows of images with these `names` and `probability`, float32 [M, C]."""
    best = probability.topk(min(BEST, len(classes)))
    columns = [pyarrow.array(names)]
    for confidence, index in zip(best.values.T, best.indices.T):
        columns += [pyarrow.array([classes[c] for c in index]), pyarrow.array(confidence.numpy())]
    if probabilities:
        columns += map(pyarrow.array, probability.T.numpy())
    return pyarrow.table(columns, schema=schema)


def _refuse_out(out: str) -> None:
    """Raises UserError where no table can be written to `out`."""
    path = Path(out)
    if path.suffix not in TABLES:
        raise UserError(f"--out {out} is neither a .csv nor a .parquet file; name one")
    if os.path.lexists(path):
        raise UserError(f"--out {out} exists; choose another file, or delete it")
    if not path.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {path.parent}; make it, or name another file")


@contextmanager
def _writer(out: str | None, schema: pyarrow.Schema) -> Iterator[TableWriter]:
    """Writes tables to `out`, which appears whole or not at all, or to the standard output."""
    if out is None:
        with pyarrow.csv.CSVWriter(sys.stdout.buffer, schema, write_options=_plain()) as writer:
            yield writer
        return
    path = Path(out)
    options = {"write_options": _plain()} if path.suffix == ".csv" else {}
    try:
        with new_file(path) as file, TABLES[path.suffix](file, schema, **options) as writer:
            yield writer
    except FileExistsError:
        raise UserError(f"--out {out} exists, which it did not before; choose another file")


def _plain() -> pyarrow.csv.WriteOptions:
    """Text is in quotes, numbers are not."""
    return pyarrow.csv.WriteOptions(quoting_style="needed")
