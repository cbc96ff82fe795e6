"""A store as tables: one row a (view, sample), for pandas, Arrow and Parquet, and its summary.

pandas and pyarrow are imported where they are used, so that opening a store costs neither.
"""

import difflib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .calibration import calibration_error
from .format import CacheError, reason, whole_numbers
from .shots import SHOTS, of_groups, shot
from .storage import new_file

_BATCH_CELLS = 1 << 22  # probabilities decoded at a time, and cells of a row group at most
_BATCHES = 1000  # of a row group at most


def to_pandas(cache, *, view=None, sample=None, label=None, probabilities=False):
    """One row a (view, sample), by view and then by position, as a pandas DataFrame.

    view: a number or several; all by default.  sample: ids; all by default.  label: class names or numbers.

    Columns: sample_id, label, class_name, view; top, left, height, width (pixels of the image, before padding) and
    flip of the crop; predicted, predicted_class, confidence (the largest probability), entropy (nats), all of the
    probabilities at the store's temperature; shot (many: more than 100 training samples, few: fewer than 20, medium),
    correct. With `probabilities` also p_<class name> for each class.

    Where experts share a row, what is said of it is of the expert of the sample's own class, among its classes.

    Raises CacheError for a view, id or class that the store does not have, or that is not dumped yet.
    """
    import pandas as pd

    batches = [batch.to_pandas() for batch in _batches(cache, view, sample, label, probabilities)]
    return pd.concat(batches, ignore_index=True)


def export_parquet(cache, path, *, view=None, sample=None, label=None, probabilities=False) -> int:
    """Write the rows of `to_pandas` to the Parquet file `path`, holding a few blocks at a time; returns their number.

    The file appears whole or not at all. Raises CacheError where `path` exists or cannot be written.
    """
    from pyarrow import parquet

    path = Path(path)
    if os.path.lexists(path):
        raise CacheError(f"{path} exists; choose another file, or delete it")
    if not path.parent.is_dir():
        raise CacheError(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another file")
    batches, rows = _batches(cache, view, sample, label, probabilities), 0
    first = next(batches)
    try:
        with new_file(path) as file, parquet.ParquetWriter(file, first.schema) as writer:
            for group in _row_groups(itertools.chain([first], batches)):
                writer.write_table(group)
                rows += len(group)
    except FileExistsError as error:
        raise CacheError(f"{path} exists, which it did not before; choose another file") from error
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {reason(error, path)}; make room, or name another file") from error
    return rows


def _row_groups(batches):
    """The rows of `batches` as tables, each of many: what a file says of each of its row groups is kept in memory."""
    import pyarrow as pa

    waiting, cells = [], 0
    for batch in batches:
        waiting.append(batch)
        cells += len(batch) * batch.num_columns
        if cells >= _BATCH_CELLS or len(waiting) == _BATCHES:
            yield pa.Table.from_batches(waiting)
            waiting, cells = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def _batches(cache, view, sample, label, probabilities):
    """The rows as Arrow record batches, at least one."""
    views, positions = _views(cache, view), _positions(cache, sample, label)
    if not views or not len(positions):
        width, dtype = cache.row_format(features=False)
        yield _batch(cache, 0, positions[:0], cache.held.decode(np.empty((0, width), dtype)), probabilities)
        return
    for number, chosen, probability in _decoded(cache, views, positions):
        yield _batch(cache, number, chosen, probability, probabilities)


def _decoded(cache, views, positions):
    """(view, positions [B], probabilities [B, C]) of `positions`, rising, under each of `views`.

    B rows are those of many blocks where these are small, so that what a piece costs is not paid for each, or some of one.
    """
    layout, (width, dtype) = cache.layout, cache.row_format(features=False)
    most = max(1, _BATCH_CELLS // layout.classes)
    span = layout.block_rows * max(1, most // layout.block_rows)  # rows of the blocks that are read together
    room = np.empty((min(span, layout.samples), width), dtype)
    starts, place = np.unique(positions // span * span, return_index=True)
    groups = list(zip(starts.tolist(), np.split(positions, place[1:]), strict=True))
    for view, (first, chosen) in itertools.product(views, groups):
        for block in np.unique(chosen // layout.block_rows).tolist():
            rows = layout.rows(block)
            cache.stored_block(view, block, room[rows.start - first : rows.stop - first])
        for start in range(0, len(chosen), most):
            some = chosen[start : start + most]
            yield view, some, cache.held.decode(room[some - first])


def _batch(cache, view, positions, probability, probabilities):
    import pyarrow as pa

    label, ids = cache.label[positions], cache.sample_id[positions]
    boxes = cache.views.boxes(ids, np.full(len(ids), view), cache.image_size[positions])
    answer = _answer(cache, probability, label)
    predicted = answer.argmax(1)
    names = pa.array(cache.classes)
    columns = {
        "sample_id": ids,
        "label": label,
        "class_name": names.take(pa.array(label)),
        "view": np.full(len(ids), view, np.int64),
        **{name: getattr(boxes, name) for name in ("top", "left", "height", "width")},
        "flip": boxes.flip.astype(bool),
        "predicted": predicted,
        "predicted_class": names.take(pa.array(predicted)),
        "confidence": answer.max(1),
        "entropy": entropy(answer),
        "shot": pa.array(SHOTS).take(pa.array(shot(cache.class_counts)[label])),
        "correct": predicted == label,
    }
    if probabilities:
        columns |= {f"p_{name}": np.ascontiguousarray(probability[:, c]) for c, name in enumerate(cache.classes)}
    arrays = [pa.array(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for v in columns.values()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _answer(cache, probability, label):
    """`probability` [B, C], or where experts share the rows that of each sample's own: the one of its class `label` [B]."""
    if "experts" not in cache.identity.teacher:
        return probability
    group = shot(cache.class_counts)
    own = np.where(group == group[label][:, None], probability, 0)
    return own / own.sum(1, keepdims=True)


def entropy(probability: np.ndarray) -> np.ndarray:
    """−Σ p log p of probability [B, C] in nats, float32 [B]."""
    return -(probability * np.log(np.where(probability > 0, probability, 1))).sum(1)


def _views(cache, view):
    count = cache.views.count
    return list(dict.fromkeys(whole_numbers(range(count) if view is None else view, "view", count).tolist()))


def _positions(cache, sample, label):
    chosen = np.ones(len(cache), bool)
    if sample is not None:
        ids = whole_numbers(sample, "sample")
        unknown = ids[~np.isin(ids, cache.sample_id)]
        if len(unknown):
            low, high = cache.sample_id.min(), cache.sample_id.max()
            raise CacheError(f"there is no sample {unknown[0]}: the store has ids from {low} to {high}")
        chosen &= np.isin(cache.sample_id, ids)
    if label is not None:
        labels = label if isinstance(label, Iterable) and not isinstance(label, str) else [label]
        chosen &= np.isin(cache.label, [_class(cache, name) for name in labels])
    return np.flatnonzero(chosen)


def _class(cache, name):
    if isinstance(name, str) and name in cache.classes:
        return cache.classes.index(name)
    if isinstance(name, (int, np.integer)) and not isinstance(name, bool) and 0 <= name < len(cache.classes):
        return int(name)
    near = difflib.get_close_matches(str(name), cache.classes, 1)
    if near:
        advice = f"did you mean {near[0]!r}?"
    elif isinstance(name, str):
        advice = f"names are {', '.join(map(repr, cache.classes[:5]))}{', …' if len(cache.classes) > 5 else ''}"
    else:
        advice = f"use 0 to {len(cache.classes) - 1} or a name"
    raise CacheError(f"there is no class {name!r}; {advice}")


def summary(cache, *, planes: int = 4) -> dict:
    """What a store is, as JSON values: identity, sizes, completeness, and how good the teacher is.

    The teacher's accuracy and confidence and its calibration (expected calibration error over 15 equal bins of
    confidence) are over at most `planes` whole views, evenly spaced, by shot group; sizes in bytes, on disk.
    """
    layout, survey = cache.layout, cache.survey()
    lost, reference = {*survey.lost}, cache.encoding.reference
    there = [pair for pair in survey.blocks if not {pair, (reference, pair[1])} & lost]  # or what it differs from is lost
    done, blocks = np.unique([view for view, _ in there], return_counts=True)
    whole = done[blocks == layout.blocks].astype(int).tolist()
    chosen = [whole[i] for i in np.unique(np.linspace(0, len(whole) - 1, min(planes, len(whole))).astype(int))]
    rows, blocks = sum(_length(layout.rows(block)) for _, block in survey.blocks), layout.views * layout.blocks
    temperatures = cache.temperatures
    return {
        "identity": cache.identity.to_json(),
        "encoding": cache.encoding.to_json(),
        "samples": layout.samples,
        "classes": layout.classes,
        "views": layout.views,
        "complete": len(survey.blocks) == blocks and not survey.lost,
        "blocks": {"done": len(survey.blocks), "all": blocks, "of_a_view": layout.blocks}
        | ({"lost": len(survey.lost)} if survey.lost else {})
        | ({"stored_exactly": survey.exact} if survey.exact else {}),
        "bytes": {"all": survey.nbytes, "a_view_of_a_sample": round(survey.nbytes / rows, 2) if rows else None},
        "error": survey.error,
        "temperatures": temperatures and [float(f"{temperature:.3g}") for temperature in temperatures],
        "features": {name: {"width": cache.features[name], "error": error} for name, error in survey.feature_error.items()},
        "class_counts": cache.class_counts.tolist(),
        "teacher": {"views": chosen, **_quality(cache, chosen)} if chosen else None,
        **({"added_by_others": cache.additions} if cache.additions else {}),
    }


def _length(rows):
    return rows.stop - rows.start


def _quality(cache, views):
    confidence, correct = [], []
    for _, positions, probability in _decoded(cache, views, np.arange(len(cache))):
        answer = _answer(cache, probability, cache.label[positions])
        confidence.append(answer.max(1))
        correct.append(answer.argmax(1) == cache.label[positions])
    confidence, correct = np.concatenate(confidence).astype(np.float64), np.concatenate(correct)
    return {
        name: {
            "samples": int(chosen.sum()) // len(views),
            "accuracy": float(correct[chosen].mean()),
            "confidence": float(confidence[chosen].mean()),
            "calibration_error": calibration_error(confidence[chosen], correct[chosen]),
        }
        for name, chosen in of_groups(np.tile(cache.label, len(views)), cache.class_counts).items()
        if chosen.any()
    }
