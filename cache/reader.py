"""Reading a store: its identity, one view's plane at a time, and checks that what is read is what was written.

V views, N samples, C classes. Nothing of a store is trusted before it equals what the format says of it.
"""

import itertools
import math
import os
import re
from dataclasses import replace

import google_crc32c  # Zarr's own
import numpy as np

from . import encodings, features, tempering
from .format import (
    _MOST,
    FORMAT,
    STORE_MARKER,
    CacheError,
    CorruptCacheError,
    Identity,
    Layout,
    chunk_checksum,
    digest,
    from_bytes,
    read_marker,
    whole_numbers,
)
from .storage import open_storage

_REDO = "delete its marker in done/ and resume the dump"
_RESTORE = "restore it from a copy, or dump it again"
_FOREIGN = "dump one with cli.py dump-logits"
_MARKER = re.compile(r"(0|[1-9]\d{0,6})\.(0|[1-9]\d{0,6})")
_PIECE = 64 << 10  # of a chunk, bytes; it stays in the CPU's cache
_DOCUMENT_BYTES = 64 << 20  # more than any real metadata document or marker


def open_cache(url) -> "Cache":
    """Open the store `url`, a path or fsspec URL, for reading.

    Raises CacheError where there is no store that this version reads, or the place cannot be reached; CorruptCacheError
    where one is damaged.
    """
    try:
        return Cache(open_storage(url))
    except OSError as error:
        reason = error.strerror or error
        raise CacheError(f"{url} cannot be read: {reason}; check the address, the connection and what you may read") from error


class Cache:
    """A store that is open for reading. It holds no file open, and may be read while it is being dumped.

    identity: whose answers these are.  sample_id, label int64 [N].  image_size int64 [N, 2] (height, width).
    encoding: how probabilities are stored.  features: the width D of each, by name.
    class_counts int64 [C]: samples a class.  digest: of all of the above.
    """

    def __init__(self, storage):
        self._storage = storage
        attributes = self._attributes()
        self.identity = Identity.from_json(attributes["identity"])
        data = self._read(STORE_MARKER)
        self.digest, files = digest(data), read_marker(data, f"{storage}/{STORE_MARKER}")["files"]
        self.encoding = self._load_encoding(attributes["encoding"])
        self.features = self._load_features(attributes.get("features", {}))
        self.layout = Layout(identity=self.identity, samples=self._samples(), encoding=self.encoding, features=self.features)
        self._check_documents(files)
        self._reference = {}
        self.sample_id, self.label, self.image_size = (
            self._read_whole(name, files) for name in ("sample_id", "label", "image_size")
        )
        classes = len(self.classes)
        if self.label.min() < 0 or self.label.max() >= classes:
            raise CacheError(f"{storage} is not usable: it has labels outside [0, {classes}); dump it again")
        self.class_counts = np.bincount(self.label, minlength=classes)
        self.encoding = self.encoding.with_codebook(lambda name: self._read_whole(name, files), self.class_counts)
        self.layout = replace(self.layout, encoding=self.encoding)

    def __str__(self):
        return str(self._storage)

    def __len__(self):
        return self.layout.samples

    @property
    def classes(self) -> tuple[str, ...]:
        return self.identity.classes

    @property
    def temperature(self) -> float:
        return self.identity.temperature

    @property
    def views(self):
        """The view specification."""
        return self.identity.views

    @property
    def decoder(self):
        """(mean [C], basis [R, C]): `stored_plane` rows @ basis + mean are logits. None where rows are of C numbers."""
        return self.encoding.decoder

    @property
    def temperatures(self) -> tuple[float, float] | None:
        """The lowest and highest temperature at which the answers may be used; None where nothing is dumped yet."""
        return tempering.temperatures(self)

    def refuse_temperature(self, temperature: float) -> None:
        """Raises CacheError where answers at `temperature` do not follow from the store's closely enough."""
        tempering.refuse_temperature(self, temperature)

    # what is there

    def missing(self) -> list[tuple[int, int]]:
        """The (view, block) that are not dumped, in order."""
        done = set(self.committed())
        return [pair for pair in itertools.product(range(self.layout.views), range(self.layout.blocks)) if pair not in done]

    def committed(self) -> list[tuple[int, int]]:
        """The (view, block) that are dumped, in order."""
        numbers = (name.split(".") for name in self._storage.names("done") if _MARKER.fullmatch(name))
        pairs = ((int(view), int(block)) for view, block in numbers)
        return sorted((view, block) for view, block in pairs if view < self.layout.views and block < self.layout.blocks)

    @property
    def missing_blocks(self) -> int:
        """How many blocks of all views are not dumped."""
        # what a store claims to be may be far larger than what is there
        return self.layout.views * self.layout.blocks - len(self.committed())

    @property
    def complete(self) -> bool:
        """Whether every block of every view is dumped."""
        return not self.missing_blocks

    @property
    def nbytes(self) -> int:
        """Bytes that the store's files take: metadata, columns, and the chunks that are committed, with markers."""
        files = read_marker(self._read(STORE_MARKER), f"{self._storage}/{STORE_MARKER}")["files"]
        total = sum(entry["size"] for entry in files.values()) + self._storage.size(STORE_MARKER)
        for view, block in self.committed():
            total += sum(entry["size"] for entry in self._marker(view, block)["files"].values())
            total += self._storage.size(f"done/{view}.{block}")
        return total

    def error(self) -> dict | None:
        """What the encoding costs, as found on every row that is committed; None where it is exact but for rounding.

        Total variation of the BKD target from the exact one: its bound, mean and worst.
        """
        if self.encoding.max_error is None:
            return None
        return {"bound": self.encoding.max_error, **self._error(lambda marker: marker["error"])}

    def feature_error(self, name: str) -> dict:
        """What storing the features `name` costs, as `error` does: their cosine distance from the exact ones."""
        self._width(name)
        return {"bound": features.MAX_ERROR, **self._error(lambda marker: marker["features"][name])}

    def _error(self, of_marker):
        pairs = self.committed()
        try:
            errors = [of_marker(self._marker(view, block)) for view, block in pairs]
            stated = all(type(error[key]) in (int, float) for error in errors for key in ("mean", "worst"))
        except (KeyError, TypeError):
            stated = False
        if not stated:
            raise CacheError(f"{self._storage} is not usable: its markers do not say what was lost; {_FOREIGN}")
        counts = [_length(self.layout.rows(block)) for _, block in pairs]
        return {
            "mean": float(np.average([error["mean"] for error in errors], weights=counts)) if pairs else None,
            "worst": max((error["worst"] for error in errors), default=None),
        }

    # reading

    def stored_plane(self, view: int, out=None) -> np.ndarray:
        """One view of every sample as it is stored, [N, R] of the encoding's dtype, into `out` where given.

        Raises CacheError where a block of the view is not dumped, CorruptCacheError, naming array, view and rows,
        where one is damaged.
        """
        layout = self.layout
        view = self._view(view)
        out = self._room(layout.samples, out)
        for block in range(layout.blocks):
            self.stored_block(view, block, out[layout.rows(block)])
        return out

    def stored_feature_plane(self, name: str, view: int, out=None) -> np.ndarray:
        """The features `name` of one view of every sample as they are stored, int8 [N, D], into `out` where given.

        Raises what `stored_plane` raises, and CacheError where the store has no such features.
        """
        layout, width = self.layout, self._width(name)
        view = self._view(view)
        out = _room((layout.samples, width), "int8", out)
        for block in range(layout.blocks):
            self._read_plain(f"feature/{name}", view, block, out[layout.rows(block)])
        return out

    def _width(self, name):
        if name not in self.features:
            found = f"it has {', '.join(self.features)}" if self.features else "it has none"
            raise CacheError(f"{self._storage} has no features {name!r}: {found}")
        return self.features[name]

    def _view(self, view) -> int:
        return whole_numbers(view, "view", self.layout.views).item()

    def stored_block(self, view: int, block: int, out=None) -> np.ndarray:
        """The rows of one block of `stored_plane`. Raises what it raises."""
        view, block = self._view(view), whole_numbers(block, "block", self.layout.blocks).item()
        rows, encoding = self.layout.rows(block), self.encoding
        out = self._room(_length(rows), out)
        if encoding.reference is None:  # what is stored is what is asked for
            self._read_plain(encoding.array, view, block, out)
        else:
            marker = self._marker(view, block)
            columns = self._read_columns(view, block, marker)
            try:
                encoding.unpack(columns, marker, self.reference_codes(view, block), out)
            except ValueError as error:
                raise CorruptCacheError(f"{self._where(view, block)} is damaged: {error}; {_REDO}") from error
        return out

    def reference_codes(self, view: int, block: int) -> np.ndarray | None:
        """The codes that those of (view, block) are stored as differences from, [rows, R]; None where there are none.

        They are kept, R small numbers a sample, as long as their marker says the same: a repair may write them anew.
        """
        reference = self.encoding.reference
        if reference is None or view == reference:
            return None
        marker = self._marker(reference, block)
        if block not in self._reference or self._reference[block][0] != marker:
            # Column by column, as the differences are stored.
            self._reference[block] = marker, np.asfortranarray(self.stored_block(reference, block))
        return self._reference[block][1]

    def _read_columns(self, view, block, marker):
        """A compressed chunk: the rows of columns, int8 [rows, S], that are of the block. Zarr reads it as well."""
        rows, key = self.layout.rows(block), self.layout.chunk(self.encoding.array, view, block)
        where = self._where(view, block)
        data = self._storage.read(key)
        _check_chunk(marker["files"].get(key, {}), data, where, _REDO)
        try:
            return self.encoding.decompress(data[:-4], self.layout.block_rows)[: _length(rows)]
        except (ValueError, RuntimeError) as error:
            raise CorruptCacheError(f"{where} is damaged: {error}; {_REDO}") from error

    def _read_plain(self, array, view, block, out):
        """A chunk of plain numbers and their crc32c into `out`.

        Zarr reads this as well, at three times the cost: here every piece is summed while it is in the CPU's cache.
        """
        where, key = self._where(view, block, array), self.layout.chunk(array, view, block)
        expected = self._marker(view, block)["files"].get(key, {})
        size = self.layout.block_rows * out.shape[1] * out.itemsize + 4
        file = self._storage.open(key)
        if file is None:
            raise CorruptCacheError(f"{where} is missing, though it was written; {_REDO}")
        with file:
            found = file.seek(0, os.SEEK_END)
            if found != size or found != expected.get("size"):
                raise CorruptCacheError(f"{where} is damaged: it has {found} bytes of {size}; {_REDO}")
            file.seek(0)
            target, checksum = out.reshape(-1).view(np.uint8), 0
            for start in range(0, size - 4, _PIECE):
                length = min(_PIECE, size - 4 - start)
                piece = target[start : start + length]
                if len(piece) == length:
                    file.readinto(piece)
                else:  # a last block is shorter than its chunk
                    whole = np.empty(length, np.uint8)
                    file.readinto(whole)
                    piece[:], piece = whole[: len(piece)], whole
                checksum = google_crc32c.extend(checksum, piece)
            stored = file.read(4)
        if stored != checksum.to_bytes(4, "little"):
            raise CorruptCacheError(f"{where} is damaged: its checksum does not match; {_REDO}")
        if stored.hex() != expected.get("checksum"):
            raise CorruptCacheError(f"{where} is damaged: it is not the chunk that was written; {_REDO}")

    def _room(self, count, out):
        return _room((count, self.encoding.width(self.layout.classes)), self.encoding.dtype, out)

    def _where(self, view, block, array=None):
        rows = self.layout.rows(block)
        return f"{self._storage}: {array or self.encoding.array}, view {view}, rows {rows.start} to {rows.stop - 1}"

    def _marker(self, view, block):
        key, where = f"done/{view}.{block}", self._where(view, block)
        rows = self.layout.rows(block)
        data = self._read(key, f"{where} is not dumped yet; resume the dump")
        marker = read_marker(data, f"the marker {key} of {where}")
        owner = {"store": self.digest, "view": view, "rows": [rows.start, rows.stop]}
        if any(marker.get(name) != value for name, value in owner.items()):
            raise CorruptCacheError(f"the marker {key} of {where} is another block's or store's; {_REDO}")
        return marker

    def plane(self, view: int) -> np.ndarray:
        """One view of every sample: probabilities, float32 [N, C]. Raises what `stored_plane` raises."""
        return self.encoding.decode(self.stored_plane(view))

    def feature_plane(self, name: str, view: int) -> np.ndarray:
        """The features `name` of one view of every sample, of length one, float32 [N, D].

        Raises what `stored_feature_plane` raises.
        """
        return features.decode(self.stored_feature_plane(name, view))

    def rows(self, samples, views) -> np.ndarray:
        """Probabilities of B (sample, view) pairs, float32 [B, C]. `samples` are positions, in [0, N), not ids.

        Reads each view's whole plane; a training loop keeps planes instead.
        """
        samples, views = np.broadcast_arrays(
            whole_numbers(samples, "sample", len(self)), whole_numbers(views, "view", self.layout.views)
        )
        out = np.empty((len(samples), len(self.classes)), np.float32)
        for view in np.unique(views):
            chosen = views == view
            out[chosen] = self.encoding.decode(self.stored_plane(int(view))[samples[chosen]])
        return out

    def verify_checksums(self) -> list[str]:
        """Read everything that is committed; one line for each block that is damaged.

        Opening the store has verified the rest.
        """
        problems = []
        for view, block in self.committed():
            try:
                self.stored_block(view, block)
                for name, width in self.features.items():
                    room = np.empty((_length(self.layout.rows(block)), width), np.int8)
                    self._read_plain(f"feature/{name}", view, block, room)
            except CacheError as error:
                problems.append(str(error))
        return problems

    def to_pandas(self, view=None, sample=None, label=None, probabilities: bool = False):
        """One row a (view, sample) as a DataFrame; `cache.frame.to_pandas` says which columns."""
        from . import frame

        return frame.to_pandas(self, view=view, sample=sample, label=label, probabilities=probabilities)

    def export_parquet(self, path, view=None, sample=None, label=None, probabilities: bool = False) -> int:
        """Write the rows of `to_pandas` to the Parquet file `path`, a view at a time; returns their number."""
        from . import frame

        return frame.export_parquet(self, path, view=view, sample=sample, label=label, probabilities=probabilities)

    def summary(self, planes: int = 4) -> dict:
        """What the store is, as JSON values; `cache.frame.summary` says which."""
        from . import frame

        return frame.summary(self, planes=planes)

    # opening

    def _read(self, key, missing=None):
        """A metadata document or marker. Raises CacheError, with the message `missing` if given, where it is not there."""
        size = self._storage.size(key)
        if size is None:
            missing = missing or f"{self._storage} is not a whole store: it has no {key}; dump it again, or resume its dump"
            raise CacheError(missing)
        if size > _DOCUMENT_BYTES:
            raise CacheError(f"{self._storage} is not a store: {key} has {size} bytes; {_FOREIGN}")
        return self._storage.read(key)

    def _attributes(self):
        storage = self._storage
        if storage.size("zarr.json") is None:
            found = "it is empty, or not there" if not storage.names() else "it has no zarr.json"
            raise CacheError(f"{storage} is not a store: {found}; {_FOREIGN}")
        attributes = from_bytes(self._read("zarr.json"), f"{storage}/zarr.json").get("attributes")
        if not isinstance(attributes, dict) or "cache_format" not in attributes:
            raise CacheError(f"{storage} is not a store: its zarr.json has no cache_format; {_FOREIGN}")
        if attributes["cache_format"] != FORMAT:
            raise CacheError(
                f"{storage} has format {attributes['cache_format']!r}, this version reads {FORMAT}; use the version "
                "that wrote it, or dump it again"
            )
        if not {"identity", "encoding"} <= attributes.keys():
            raise CacheError(f"{storage} is not a store: its attributes are {sorted(attributes)}; {_FOREIGN}")
        return attributes

    def _samples(self):
        """N, from the size of the file that must hold eight bytes for each: no claim is believed that is not there."""
        size = self._storage.size("sample_id/c.0") or 0
        samples, rest = divmod(size - 4, 8)
        if rest or not 1 <= samples <= _MOST["samples"]:
            raise CorruptCacheError(f"{self._storage}: sample_id is damaged: it has {size} bytes; {_RESTORE}")
        return samples

    def _load_encoding(self, values):
        try:
            encoding = encodings.from_json(values)
            encoding.check(self.identity.views.count, len(self.identity.classes))
            return encoding
        except ValueError as error:
            raise CacheError(f"{self._storage} has an encoding that this version does not read: {error}") from error

    def _load_features(self, values):
        try:
            features.check(values)
            return values
        except ValueError as error:
            raise CacheError(f"{self._storage} has features that this version does not read: {error}") from error

    def _check_documents(self, files):
        for key, document in self.layout.documents().items():
            data, where = self._read(key), f"{self._storage}/{key}"
            if from_bytes(data, where) != document:
                raise CacheError(f"{where} is not what format {FORMAT} says; {_FOREIGN}")
            if files.get(key) != {"size": len(data), "checksum": digest(data)}:
                raise CorruptCacheError(f"{where} is damaged: its checksum does not match; {_RESTORE}")

    def _read_whole(self, name, files):
        """An array that was written when the store was made: one chunk, of plain numbers and their crc32c."""
        document = self.layout.documents()[f"{name}/zarr.json"]
        shape, dtype = document["shape"], np.dtype(document["data_type"])
        key = f"{name}/c{'.0' * len(shape)}"
        data, where = self._storage.read(key), f"{self._storage}: {key}"
        size = math.prod(shape) * dtype.itemsize + 4
        if data is not None and len(data) != size:
            raise CorruptCacheError(f"{where} is damaged: it has {len(data)} bytes of {size}; {_RESTORE}")
        _check_chunk(files.get(key, {}), data, where, _RESTORE)
        return np.frombuffer(data[:-4], dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def _length(rows):
    return rows.stop - rows.start


def _room(shape, dtype, out):
    dtype = np.dtype(dtype)
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be {dtype} {list(shape)}, contiguous, found {out.dtype} {list(out.shape)}")
    return out


def _check_chunk(expected, data, where, remedy):
    """Raises CorruptCacheError unless `data` is the chunk that its marker says, `expected`, in every bit."""
    if data is None:
        raise CorruptCacheError(f"{where} is missing, though it was written; {remedy}")
    if len(data) != expected.get("size"):
        raise CorruptCacheError(f"{where} is damaged: it has {len(data)} bytes of {expected.get('size')}; {remedy}")
    if chunk_checksum(data) != expected.get("checksum"):
        raise CorruptCacheError(f"{where} is damaged: it is not the chunk that was written; {remedy}")
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptCacheError(f"{where} is damaged: its checksum does not match; {remedy}")
