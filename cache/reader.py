"""Reading a store: its identity, one view's plane at a time, and checks that what is read is what was written.

V views, N samples, C classes. Nothing of a store is trusted before it equals what the format says of it.
"""

import errno
import itertools
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass

import google_crc32c  # Zarr's own
import numpy as np

from . import features, parts, tempering
from .encodings import Dense
from .format import CacheError, CorruptCacheError, LostCacheError, read_marker, reason, whole_numbers
from .metadata import FOREIGN, MARKER_BYTES, check_chunk, load_metadata
from .storage import open_storage

_MARKER = re.compile(r"(0|[1-9]\d{0,6})\.(0|[1-9]\d{0,6})")
_EXACT = Dense(name="probability", dtype="float32")  # of blocks that a codebook does not fit
_LOOKED_AT = 8  # rows of a block, in each reading: all of them would take as long as reading itself, or longer
_PIECE = 64 << 10  # of a chunk, bytes; it stays in the CPU's cache
_AT_ONCE = 1000  # markers that are read together


def open_cache(url) -> "Cache":
    """Open the store `url`, a path or fsspec URL, for reading.

    Raises CacheError where there is no store that this version reads, or the place cannot be reached; CorruptCacheError
    where one is damaged.
    """
    try:
        return Cache(open_storage(url))
    except OSError as error:
        raise _unreadable(url, error, CacheError) from error


def _unreadable(what, error, kind):
    return kind(f"{what} cannot be read: {reason(error, what)}; check the address, the connection and what you may read")


class Cache:
    """A store that is open for reading. It holds no file open, and may be read while it is being dumped.

    identity: whose answers these are.  sample_id, label int64 [N].  image_size int64 [N, 2] (height, width).
    encoding: how probabilities are stored.  features: the width D of each, by name.
    held: the encoding of what `stored_plane` gives: `encoding`, or float32 probabilities where some blocks are stored so.
    class_counts int64 [C]: samples a class.  digest: of all of the above.
    """

    def __init__(self, storage):
        self._storage, self._reference = storage, {}
        self._metadata = metadata = load_metadata(storage)
        self.identity, self.digest, self.layout = metadata.identity, metadata.digest, metadata.layout
        self.encoding, self.features, self.additions = metadata.encoding, metadata.features, metadata.additions
        self.sample_id, self.label, self.image_size = metadata.sample_id, metadata.label, metadata.image_size
        self.class_counts, self.held = metadata.class_counts, metadata.encoding
        if self.encoding.exact_blocks and any(name.startswith("c.") for name in storage.names(_EXACT.name)):
            self.held = _EXACT

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
        return self.held.decoder

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

    def parts(self, count: int) -> list[list[tuple[int, int]]]:
        """The (view, block) that are not dumped, as `count` lists that as many processes may write, at once or in any order.

        Which list a block is in follows from the store alone: part 3 of 64 is always the same blocks, less what is there by
        now. Some lists are empty where the store has fewer blocks that may be written apart.
        """
        if count < 1:
            raise ValueError(f"there must be at least one part, found {count}")
        return parts.share(self.layout, {*self.missing(), *self.lost()}, count)

    def lost(self) -> list[tuple[int, int]]:
        """The (view, block) that were dumped, but of which a chunk is missing by now or cut short. No chunk is read."""
        if not (committed := self.committed()):
            return []
        there = self._chunk_sizes()
        return [pair for pair, written in self._written(committed) if not written.items() <= there.items()]

    def refuse_incomplete(self) -> None:
        """Raises CacheError where blocks are not dumped, or have lost a chunk since. No chunk is read."""
        if missing := self.missing_blocks:
            raise CacheError(f"{self} lacks {_blocks(missing)}; finish it with dump-logits --resume")
        if lost := self.lost():
            raise CacheError(
                f"{self}: {_blocks(len(lost))} lost files, or parts of them; write them again with dump-logits --resume"
            )

    def _chunk_sizes(self):
        """Bytes of every chunk that is there, by key."""
        with self._reading(self):
            arrays = {*self.layout.arrays, *self.encoding.names()}
            return {f"{array}/{name}": size for array in arrays for name, size in self._storage.sizes(array).items()}

    def _written(self, blocks):
        """Each (view, block) of `blocks`, and the bytes of its chunks when they were written, by key."""
        layout = self.layout
        if not self.encoding.plain:  # what compresses to any size is in the markers
            for pair, marker, _ in self._markers(blocks):
                yield pair, {key: entry["size"] for key, entry in marker["files"].items()}
            return
        sizes = {f"feature/{name}": layout.plain_bytes(width, "int8") for name, width in self.features.items()}
        sizes[self.encoding.array] = layout.plain_bytes(self.encoding.columns(layout.classes), self.encoding.dtype)
        for pair in blocks:
            yield pair, {layout.chunk(array, *pair): size for array, size in sizes.items()}

    def committed(self) -> list[tuple[int, int]]:
        """The (view, block) that are dumped, in order."""
        with self._reading(self):
            names = self._storage.names("done")
        numbers = (name.split(".") for name in names if _MARKER.fullmatch(name))
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
        return self.survey().nbytes

    def survey(self) -> "Survey":
        """What the markers of all committed blocks say, each read once and many at a time."""
        blocks, nbytes, exact, lost = self.committed(), self._metadata.nbytes, 0, []
        there = self._chunk_sizes()
        error = _Error(self.encoding.max_error)
        feature_error = {name: _Error(features.MAX_ERROR) for name in self.features}
        for pair, marker, size in self._markers(blocks):
            written = {key: entry["size"] for key, entry in marker["files"].items()}
            nbytes += size + sum(written.values())
            if not written.items() <= there.items():
                lost.append(pair)
            exact += not self.encoding.plain and any(key.startswith(f"{_EXACT.name}/") for key in marker["files"])
            rows = _length(self.layout.rows(pair[1]))
            try:
                if self.encoding.max_error is not None:
                    error.add(marker["error"], rows)
                for name in self.features:
                    feature_error[name].add(marker["features"][name], rows)
            except (KeyError, TypeError):
                message = f"{self._storage} is not usable: its markers do not say what was lost; {FOREIGN}"
                raise CacheError(message) from None
        return Survey(
            blocks=blocks,
            lost=lost,
            exact=exact,
            nbytes=nbytes,
            error=None if self.encoding.max_error is None else error.summary(),
            feature_error={name: found.summary() for name, found in feature_error.items()},
        )

    def _markers(self, blocks):
        """((view, block), marker, its size in bytes) of each of `blocks`."""
        for start in range(0, len(blocks), _AT_ONCE):
            pairs = blocks[start : start + _AT_ONCE]
            with self._reading(self):
                found = self._storage.read_several([f"done/{view}.{block}" for view, block in pairs], MARKER_BYTES)
            for (view, block), data in zip(pairs, found, strict=True):
                if data is not None:  # else it was taken away since, to be written anew
                    yield (view, block), self._parse_marker(view, block, data), len(data)

    @contextmanager
    def _reading(self, what):
        """What the storage raises is one line that names `what` was to be read."""
        try:
            yield
        except OSError as error:
            denied = error.errno in (errno.EACCES, errno.EPERM)
            raise _unreadable(what, error, CacheError if denied else LostCacheError) from error

    # reading

    def row_format(self, features: bool) -> tuple[int, np.dtype]:
        """(width R, dtype) of a sample's codes under one view: those of its probabilities or of all teachers' features."""
        if features:
            return sum(self.features.values()), np.dtype("int8")
        return self.held.width(len(self.classes)), np.dtype(self.held.dtype)

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
            self._read_feature_block(name, view, block, out[layout.rows(block)])
        return out

    def _read_feature_block(self, name, view, block, out):
        with self._reading(self._where(view, block, f"feature/{name}")):
            self._read_plain(f"feature/{name}", view, block, out)

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
        out = self._room(_length(self.layout.rows(block)), out)
        with self._reading(self._where(view, block)):
            self._read_block(view, block, out)
        return out

    def _read_block(self, view, block, out):
        if self.encoding.plain:  # what is stored is what is asked for
            return self._read_dense(self.encoding, view, block, out)
        marker = self._marker(view, block)
        exact = self.encoding.exact_blocks and self.layout.chunk(_EXACT.name, view, block) in marker["files"]
        if self.held is self.encoding:
            if exact:
                raise CacheError(f"{self._where(view, block)} is stored otherwise since this store was opened; open it again")
            self._read_codes(view, block, marker, out)
        elif exact:
            self._read_dense(_EXACT, view, block, out)
        else:
            self.encoding.decode(self._read_codes(view, block, marker), out)

    def _read_dense(self, encoding, view, block, out):
        """Probabilities as they are stored. Who wrote them may have checked nothing: some rows are looked at."""
        self._read_plain(encoding.array, view, block, out)
        self._refuse_flaws(encoding, view, block, out, step=max(1, len(out) // _LOOKED_AT))

    def _refuse_flaws(self, encoding, view, block, codes, step=1):
        if wrong := encoding.flaw(codes[::step]):
            row, found = wrong
            what = f"sample {self.sample_id[self.layout.rows(block).start + row * step]} has no distribution ({found})"
            raise CorruptCacheError(f"{self._where(view, block)} is not usable: {what}; {_redo(view, block)}")

    def _read_codes(self, view, block, marker, out=None):
        """Of a compressed store: codes, [rows of the block, R]."""
        columns = self._read_columns(view, block, marker)
        reference = self.reference_codes(view, block)  # whose errors are its own
        if reference is not None and marker.get("reference_checksum", known := self.reference_checksum(block)) != known:
            raise CorruptCacheError(
                f"{self._where(view, block)} is stored as differences from what view {self.encoding.reference} was before it "
                f"was written anew; {_redo(view, block)}"
            )
        try:
            return self.encoding.unpack(columns, marker, reference, out)
        except ValueError as error:
            raise CorruptCacheError(f"{self._where(view, block)} is damaged: {error}; {_redo(view, block)}") from error

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
            self._reference[block] = marker, np.asfortranarray(self._read_codes(reference, block, marker))
        return self._reference[block][1]

    def reference_checksum(self, block: int) -> str:
        """The checksum of the chunk that `reference_codes` has read for `block`."""
        marker, _ = self._reference[block]
        return marker["files"][self.layout.chunk(self.encoding.array, self.encoding.reference, block)]["checksum"]

    def _read_columns(self, view, block, marker):
        """A compressed chunk: the rows of columns, int8 [rows, S], that are of the block. Zarr reads it as well."""
        rows, key = self.layout.rows(block), self.layout.chunk(self.encoding.array, view, block)
        where = self._where(view, block)
        size = self.layout.block_rows * self.encoding.columns(self.layout.classes)
        data = self._storage.read(key, size + size // 64 + 1024)  # more than zstd makes of what it cannot compress
        check_chunk(marker["files"].get(key, {}), data, where, _redo(view, block))
        try:
            return self.encoding.decompress(data[:-4], self.layout.block_rows)[: _length(rows)]
        except (ValueError, RuntimeError) as error:
            raise CorruptCacheError(f"{where} is damaged: {error}; {_redo(view, block)}") from error

    def _read_plain(self, array, view, block, out):
        """A chunk of plain numbers and their crc32c into `out`.

        Zarr reads this as well, at three times the cost: here every piece is summed while it is in the CPU's cache.
        """
        where, key = self._where(view, block, array), self.layout.chunk(array, view, block)
        expected = self._marker(view, block)["files"].get(key, {})
        size = self.layout.plain_bytes(out.shape[1], out.dtype)
        file = self._storage.open(key, size + 1)
        if file is None:
            raise CorruptCacheError(f"{where} is missing, though it was written; {_redo(view, block)}")
        with file:
            found = file.seek(0, os.SEEK_END)
            if found != size or found != expected.get("size"):
                raise CorruptCacheError(f"{where} is damaged: it has {found} bytes of {size}; {_redo(view, block)}")
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
            raise CorruptCacheError(f"{where} is damaged: its checksum does not match; {_redo(view, block)}")
        if stored.hex() != expected.get("checksum"):
            raise CorruptCacheError(f"{where} is damaged: it is not the chunk that was written; {_redo(view, block)}")

    def _room(self, count, out):
        width, dtype = self.row_format(features=False)
        return _room((count, width), dtype, out)

    def _where(self, view, block, array=None):
        rows = self.layout.rows(block)
        return f"{self._storage}: {array or self.encoding.array}, view {view}, rows {rows.start} to {rows.stop - 1}"

    def _marker(self, view, block):
        where = self._where(view, block)
        with self._reading(where):
            data = self._storage.read(f"done/{view}.{block}", MARKER_BYTES)  # in one request, where each takes long
        if data is None:
            raise CacheError(f"{where} is not dumped yet; resume the dump")
        return self._parse_marker(view, block, data)

    def _parse_marker(self, view, block, data):
        def where():
            return f"the marker done/{view}.{block} of {self._where(view, block)}"

        rows, marker = self.layout.rows(block), read_marker(data, where, "delete it and resume the dump")
        owner = {"store": self.digest, "view": view, "rows": [rows.start, rows.stop]}
        if any(marker.get(key) != value for key, value in owner.items()):
            raise CorruptCacheError(f"{where()} is another block's or store's; {_redo(view, block)}")
        return marker

    def plane(self, view: int) -> np.ndarray:
        """One view of every sample: probabilities, float32 [N, C]. Raises what `stored_plane` raises."""
        return self.held.decode(self.stored_plane(view))

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
            out[chosen] = self.held.decode(self.stored_plane(int(view))[samples[chosen]])
        return out

    def verify_checksums(self) -> list[str]:
        """Read everything that is committed; one line for each block that is damaged, or has a row that is no distribution.

        Opening the store has verified the rest.
        """
        problems = []
        for view, block in self.committed():
            try:
                codes = self.stored_block(view, block)
                if self.held.plain:
                    self._refuse_flaws(self.held, view, block, codes)
                if self.held is not self.encoding:  # codes of blocks that are stored exactly serve other views
                    with self._reading(self._where(view, block)):
                        self._read_codes(view, block, self._marker(view, block))
                for name, width in self.features.items():
                    room = np.empty((_length(self.layout.rows(block)), width), np.int8)
                    self._read_feature_block(name, view, block, room)
            except CacheError as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))  # a block that others are stored as differences from fails for each of them

    def checksum_report(self) -> dict:
        """Whether the store is whole and as it was written, how many blocks were read, and what is wrong, as JSON values."""
        problems, missing, blocks = self.verify_checksums(), self.missing_blocks, self.layout.views * self.layout.blocks
        if missing:
            problems.append(f"{missing:,} of {blocks:,} blocks are not dumped; finish it with dump-logits --resume")
        return {"passed": not problems, "blocks": blocks - missing, "problems": problems}

    def to_pandas(self, view=None, sample=None, label=None, probabilities: bool = False):
        """One row a (view, sample) as a DataFrame; `cache.frame.to_pandas` says which columns."""
        from . import frame

        return frame.to_pandas(self, view=view, sample=sample, label=label, probabilities=probabilities)

    def export_parquet(self, path, view=None, sample=None, label=None, probabilities: bool = False) -> int:
        """Write the rows of `to_pandas` to the Parquet file `path`, a few blocks at a time; returns their number."""
        from . import frame

        return frame.export_parquet(self, path, view=view, sample=sample, label=label, probabilities=probabilities)

    def summary(self, planes: int = 4) -> dict:
        """What the store is, as JSON values; `cache.frame.summary` says which."""
        from . import frame

        return frame.summary(self, planes=planes)


def _redo(view: int, block: int) -> str:
    """What to do about a block that is damaged."""
    return f"delete its marker done/{view}.{block} and resume the dump, which writes it again"


def _blocks(count):
    return "1 block" if count == 1 else f"{count:,} blocks"


def _length(rows):
    return rows.stop - rows.start


def _room(shape, dtype, out):
    dtype = np.dtype(dtype)
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be {dtype} {list(shape)}, contiguous, found {out.dtype} {list(out.shape)}")
    return out


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the markers of all committed blocks say.

    blocks: (view, block), in order.  lost: those of which a chunk is missing by now or cut short.  exact: how many
    `klt` has stored as they are, since its codebook does not fit them.  nbytes: of all files that are committed.  error:
    what the encoding costs, {"bound", "mean", "worst"} of a total variation; None where it is exact but for rounding.
    feature_error: likewise by name, of a cosine distance. "mean" and "worst" are None where nothing is committed.
    """

    blocks: list[tuple[int, int]]
    lost: list[tuple[int, int]]
    exact: int
    nbytes: int
    error: dict | None
    feature_error: dict[str, dict]


class _Error:
    def __init__(self, bound):
        self.bound, self.rows, self.total, self.worst = bound, 0, 0.0, None

    def add(self, stated, rows):
        """`stated` of a block of so many rows. Raises TypeError for what is no error."""
        mean, worst = stated["mean"], stated["worst"]
        if not all(type(value) in (int, float) and 0 <= value <= 2 for value in (mean, worst)):
            raise TypeError(f"an error is a number from 0 to 2, found {mean!r} and {worst!r}")
        self.rows, self.total, self.worst = self.rows + rows, self.total + rows * mean, max(self.worst or 0.0, worst)

    def summary(self):
        return {"bound": self.bound, "mean": self.total / self.rows if self.rows else None, "worst": self.worst}
