"""What a store says of itself: nothing of it is believed before it equals what the format says.

V views, N samples, C classes.
"""

import math
from dataclasses import dataclass, replace

import google_crc32c  # Zarr's own
import numpy as np

from . import encodings, features
from .format import (
    _MOST,
    FORMAT,
    PLAIN,
    STORE_MARKER,
    CacheError,
    CorruptCacheError,
    Identity,
    Layout,
    chunk_checksum,
    digest,
    from_bytes,
    read_marker,
    to_bytes,
)

DOCUMENT_BYTES = 64 << 20  # more than any real metadata document
MARKER_BYTES = 1 << 20  # more than any real marker
_RESTORE = "restore it from a copy, or dump it again"
FOREIGN = "dump one with the command dump-logits"


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """All of a store but the arrays of views. `nbytes`: of its files.

    additions: what other programs have added to the documents or changed in their bytes, one line a document; it changes no
    answer.
    """

    identity: Identity
    encoding: object
    features: dict[str, int]
    layout: Layout
    digest: str
    sample_id: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N]
    image_size: np.ndarray  # int64 [N, 2]
    class_counts: np.ndarray  # int64 [C]
    additions: list[str]
    nbytes: int


def load_metadata(storage) -> Metadata:
    """Raises CacheError where there is no store of this format, CorruptCacheError where one is damaged."""
    attributes = _attributes(storage)
    identity = _identity(storage, attributes["identity"])
    data = read_document(storage, STORE_MARKER)
    files = read_marker(data, lambda: f"{storage}/{STORE_MARKER}", _RESTORE)["files"]
    encoding = _encoding(storage, attributes["encoding"], identity)
    widths = _features(storage, attributes.get("features", {}))
    layout = Layout(identity=identity, samples=_samples(storage), encoding=encoding, features=widths)
    documents = layout.documents()
    additions = [line for key in documents for line in _check_document(storage, key, documents[key], files.get(key))]

    def read(name):
        values = _read_whole(storage, name, documents[f"{name}/zarr.json"], files)
        if not np.isfinite(values).all():
            raise CacheError(f"{storage} is not usable: {name} holds numbers that are not finite; {FOREIGN}")
        return values

    columns = {name: read(name) for name in ("sample_id", "label", "image_size")}
    label, classes = columns["label"], layout.classes
    if wrong := wrong_columns(**columns, classes=classes):
        raise CacheError(f"{storage} is not usable: {wrong}; dump it again")
    counts = np.bincount(label, minlength=classes)
    encoding = encoding.with_codebook(read, counts)
    return Metadata(
        identity=identity,
        encoding=encoding,
        features=widths,
        layout=replace(layout, encoding=encoding),
        digest=digest(data),
        **columns,
        class_counts=counts,
        additions=additions,
        nbytes=sum(entry["size"] for entry in files.values()) + len(data),
    )


def read_document(storage, key):
    """A metadata document. Raises CacheError where it is not there."""
    size = storage.size(key)
    if size is None:
        raise CacheError(f"{storage} is not a whole store: it has no {key}; dump it again, or resume its dump")
    if size > DOCUMENT_BYTES:
        raise CacheError(f"{storage} is not a store: {key} has {size} bytes; {FOREIGN}")
    return storage.read(key)


def _attributes(storage):
    if storage.size("zarr.json") is None:
        names = storage.names()
        if stores := [name for name in names if name.endswith(".zarr")]:
            raise CacheError(f"{storage} is not a store, but a folder that holds {', '.join(stores[:5])}; name one of them")
        found = "it has no zarr.json" if names else "it is empty, or not there"
        raise CacheError(f"{storage} is not a store: {found}; {FOREIGN}")
    attributes = from_bytes(read_document(storage, "zarr.json"), f"{storage}/zarr.json").get("attributes")
    if not isinstance(attributes, dict) or "cache_format" not in attributes:
        if storage.size(STORE_MARKER) is not None:
            raise CorruptCacheError(
                f"{storage}/zarr.json has lost the store's attributes to another program; restore that file from a copy"
            )
        raise CacheError(f"{storage} is not a store: its zarr.json has no cache_format; {FOREIGN}")
    if attributes["cache_format"] != FORMAT:
        raise CacheError(
            f"{storage} has format {attributes['cache_format']!r}, this version reads {FORMAT}; use the version "
            "that wrote it, or dump it again"
        )
    if not {"identity", "encoding"} <= attributes.keys():
        raise CacheError(f"{storage} is not a store: its attributes are {sorted(attributes)}; {FOREIGN}")
    return attributes


def wrong_columns(sample_id: np.ndarray, label: np.ndarray, image_size: np.ndarray, classes: int) -> str | None:
    """What is wrong with the columns of N >= 1 samples: int64 [N], int64 [N], int64 [N, 2]. None where nothing is."""
    if not (np.diff(sample_id) > 0).all() and len(np.unique(sample_id)) != len(sample_id):
        return f"sample_id must be distinct, found {len(sample_id)} of which some are equal"
    if sample_id.min() < 0 or sample_id.max() >= 2**32:  # a word of the generator that crops follow from
        return f"sample_id must be in [0, 2^32), found {sample_id.min()} to {sample_id.max()}"
    if label.min() < 0 or label.max() >= classes:
        return f"label must be in [0, {classes}), found {label.min()} to {label.max()}"
    if image_size.min() < 0:
        return f"image_size must not be negative, found {image_size.min()}"
    return None


def _samples(storage):
    """N, from the size of the file that must hold eight bytes for each: no claim is believed that is not there."""
    size = storage.size("sample_id/c.0") or 0
    samples, rest = divmod(size - 4, 8)
    if rest or not 1 <= samples <= _MOST["samples"]:
        raise CorruptCacheError(f"{storage}: sample_id is damaged: it has {size} bytes; {_RESTORE}")
    return samples


def _identity(storage, values):
    try:
        return Identity.from_json(values)
    except CacheError as error:
        raise CacheError(f"{storage} is not usable: {error}; {_RESTORE}") from error


def _encoding(storage, values, identity):
    try:
        encoding = encodings.from_json(values)
        encoding.check(identity.views.count, len(identity.classes))
        return encoding
    except ValueError as error:
        raise CacheError(f"{storage} has an encoding that this version does not read: {error}") from error


def _features(storage, values):
    try:
        features.check(values)
        return values
    except ValueError as error:
        raise CacheError(f"{storage} has features that this version does not read: {error}") from error


def _check_document(storage, key, expected, recorded) -> list[str]:
    """Raises CacheError unless the document `key` is what the format says; returns a line where others changed it."""
    data, where = read_document(storage, key), f"{storage}/{key}"
    document = from_bytes(data, where)
    if document == expected and recorded == {"size": len(data), "checksum": digest(data)}:
        return []
    own, added = _own_part(document, expected)
    if own != expected:
        raise CacheError(f"{where} is not what format {FORMAT} says; {FOREIGN}")
    written = to_bytes(expected)  # a program that adds something writes the rest of the file anew as well
    if recorded != {"size": len(written), "checksum": digest(written)}:
        raise CorruptCacheError(f"{where} is damaged: its checksum does not match; {_RESTORE}")
    return [f"{key}: {', '.join(added) or 'other bytes, the same values'}"]


def _own_part(document, expected):
    """What of `document` the format speaks of, in its words, and the names of the rest."""
    added = [name for name in ("consolidated_metadata",) if name in document]
    own = {name: value for name, value in document.items() if name not in added}
    attributes = own.get("attributes")
    if isinstance(attributes, dict):
        added += [f"attributes.{name}" for name in attributes if name not in expected["attributes"]]
        own["attributes"] = {name: value for name, value in attributes.items() if name in expected["attributes"]}
    if own.get("data_type") == "int8" and isinstance(own.get("codecs"), list):  # whose bytes have no order
        own["codecs"] = [PLAIN[0] if codec == {"name": "bytes"} else codec for codec in own["codecs"]]
    return own, added


def _read_whole(storage, name, document, files):
    """An array that was written when the store was made: one chunk, of plain numbers and their crc32c."""
    shape, dtype = document["shape"], np.dtype(document["data_type"])
    key = f"{name}/c{'.0' * len(shape)}"
    size, where = math.prod(shape) * dtype.itemsize + 4, f"{storage}: {key}"
    data = storage.read(key, size + 1)
    if data is not None and len(data) != size:
        raise CorruptCacheError(f"{where} is damaged: it has {storage.size(key)} bytes of {size}; {_RESTORE}")
    check_chunk(files.get(key, {}), data, where, _RESTORE)
    return np.frombuffer(data[:-4], dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def check_chunk(expected, data, where, remedy):
    """Raises CorruptCacheError unless `data` is the chunk that its marker says, `expected`, in every bit."""
    if data is None:
        raise CorruptCacheError(f"{where} is missing, though it was written; {remedy}")
    if len(data) != expected.get("size"):
        raise CorruptCacheError(f"{where} is damaged: it has {len(data)} bytes of {expected.get('size')}; {remedy}")
    if chunk_checksum(data) != expected.get("checksum"):
        raise CorruptCacheError(f"{where} is damaged: it is not the chunk that was written; {remedy}")
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptCacheError(f"{where} is damaged: its checksum does not match; {remedy}")
