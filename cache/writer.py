"""Writing a store block by block, so that a crash at any moment loses no more than the block in hand.

A block's chunks are written and synced, then its marker. Only markers are trusted: resuming redoes what has none, and what
has lost a chunk since.
"""

import functools
import itertools
import random
import re
import time
from contextlib import closing, nullcontext

import numpy as np
import zarr

from . import encodings, features
from .format import (
    LOCK,
    STORE_MARKER,
    CacheError,
    CorruptCacheError,
    Identity,
    Layout,
    chunk_checksum,
    digest,
    marker,
    reason,
    to_bytes,
    whole_numbers,
)
from .metadata import wrong_columns
from .reader import Cache
from .storage import LocalStorage, ZarrStorage, open_storage
from .target import no_distribution

_NAMES = {"zarr.json", "done", "sample_id", "label", "image_size", "feature"}
_CREATION = range(1 << 62, (1 << 62) + 1)  # of the lock's numbers; those below stand for the blocks of all views
_ALL = range(_CREATION.stop)
_WAIT = 0.2  # s at least, between looks at a store that another process creates


def create_cache(
    url,
    *,
    identity: Identity,
    sample_id,
    label,
    image_size,
    encoding: dict,
    features: dict[str, int] | None = None,
    fit=None,
    resume: bool = False,
    joint: bool = False,
) -> "CacheWriter":
    """Make the store `url`, a path or fsspec URL, with every array at its full size, and open it for writing.

    sample_id [N] distinct integers, label [N] in [0, C), image_size [N, 2] (height, width) in pixels.
    encoding: {"name": "logit"}; {"name": "probability", "dtype": "float16" | "float32"}; or {"name": "klt", "max_error": …},
    the mean total variation of the BKD target that the encoding may cost.
    features: the width D of each that is stored beside the probabilities, by the name of the teacher; none by default.
    fit: `klt` calls fit(views), which returns the teacher's probabilities of some samples, the same for every view,
    float32 [len(views), S, C]; a few thousand samples do.
    resume: open a store that is there, to write what it does not have yet. One that is not, or whose creation was cut
    short, is created.
    joint: other processes may write the store at the same time; each writes what it has taken (`CacheWriter.take`). With
    `resume`, whoever comes first creates it; at an address without locks (`fsspec`) that is the caller's to see to.

    Raises CacheError where there is something at `url`, or with `resume` something else than the store of exactly these
    arguments, and says what differs; where it cannot be written, or another process does; where `klt` cannot keep to
    max_error. ValueError for arguments that do not fit together.
    """
    contents = _Contents(identity, sample_id, label, image_size, encoding, features)
    try:
        return _open_writer(url, contents, fit, resume, joint)
    except OSError as error:
        raise CacheError(f"{url} cannot be written: {reason(error, url)}; choose another place") from error


def _open_writer(url, contents, fit, resume, joint):
    (storage, names), lock = _open(url, resume), None
    if storage.size(STORE_MARKER) is None:
        strangers = [name for name in names if name not in contents.encoding.names() | _NAMES]
        if strangers:
            raise CacheError(f"{url} is not a store: it holds {strangers[0]}; choose another folder")
        if any(name[0].isdigit() for name in storage.names("done")) and storage.size(STORE_MARKER) is None:
            raise CorruptCacheError(f"{url} has blocks but no {STORE_MARKER}; restore that, or choose another folder")
        if joint:
            _create_once(storage, contents, fit)
        else:
            layout = contents.layout(fit)  # which may fail: before anything is there
            lock = _lock(storage, [_ALL])
            if storage.size(STORE_MARKER) is None:
                _create(storage, contents, layout)
            elif not resume:  # fitting takes long
                raise CacheError(
                    f"{url} was made by another process meanwhile; resume its dump (--resume) or name another folder"
                )
    cache = Cache(storage)
    others, notes = cache.identity.mixed(contents.identity)
    differences = cache.identity.differences(contents.identity) + others + contents.differences(cache)
    if differences:
        raise CacheError(f"{url} is another store: {'; '.join(differences)}; choose another folder")
    writer = CacheWriter(cache, notes)
    if not joint:
        try:
            writer.own(
                itertools.product(range(cache.layout.views), range(cache.layout.blocks)), lock or _lock(storage, [_ALL])
            )
        except OSError:
            if cache.missing_blocks or cache.lost():  # what is complete may lie where nothing can be written
                raise
    return writer


def _create_once(storage, contents, fit) -> None:
    """Create the store, unless another process does; then wait until it has, or has ended."""
    while storage.size(STORE_MARKER) is None:
        try:
            lock = storage.lock(LOCK, [_CREATION])
        except BlockingIOError:
            time.sleep(_WAIT * random.uniform(1, 3))  # on an object store two that come at once are both refused
            continue
        with closing(lock) if lock else nullcontext():
            if storage.size(STORE_MARKER) is None:
                _create(storage, contents, contents.layout(fit))


def _lock(storage, ranges):
    try:
        return storage.lock(LOCK, ranges)
    except BlockingIOError as error:
        raise CacheError(f"another process is writing {storage}; {error}") from error


def _sweep(storage, folders, owned=None) -> None:
    """Take away what was left by writes that were cut short: of everything, or of the (view, block) `owned`, once locked."""
    for folder in folders:
        for name, whole in storage.partial(folder).items():
            pair = re.fullmatch(r"(?:c\.)?(\d+)\.(\d+)(?:\.0)?", whole)
            if owned is None or (pair and (int(pair[1]), int(pair[2])) in owned):
                storage.remove(f"{folder}/{name}")


def refuse_taken(url, resume: bool) -> None:
    """Raises CacheError where `create_cache` would find something that it is not to go on with. Writes nothing."""
    _open(url, resume)


def _open(url, resume: bool):
    """The place `url` and the names of what it holds, which is nothing where a new store is made."""
    storage = open_storage(url)
    if isinstance(storage, LocalStorage) and storage.root.exists() and not storage.root.is_dir():
        raise CacheError(f"{url} is a file; name a folder")
    try:
        names = storage.names()
    except OSError as error:
        raise CacheError(f"{url} cannot be listed: {reason(error, url)}; choose another place") from error
    if names and not resume:
        raise CacheError(f"{url} is not empty; resume the dump (--resume) or name another folder (--out)")
    return storage, names


class _Contents:
    """What a store is to hold, checked."""

    def __init__(self, identity, sample_id, label, image_size, encoding, widths):
        identity.check()
        widths = widths or {}
        features.check(widths)
        self.identity = identity
        self.sample_id = whole_numbers(sample_id, "sample_id")
        self.label, self.image_size = (
            whole_numbers(values, what).reshape(np.shape(values))
            for values, what in ((label, "label"), (image_size, "side of an image"))
        )
        count = len(self.sample_id)
        if count == 0:
            raise ValueError("a cache is of samples; found none")
        if self.label.shape != (count,) or self.image_size.shape != (count, 2):
            raise ValueError(
                f"label must be [{count}] and image_size [{count}, 2], "
                f"found {list(self.label.shape)} and {list(self.image_size.shape)}"
            )
        classes = len(identity.classes)
        if wrong := wrong_columns(self.sample_id, self.label, self.image_size, classes):
            raise ValueError(wrong)
        self.class_counts = np.bincount(self.label, minlength=classes)
        self.encoding = encodings.from_json(encoding)
        self.features = dict(sorted(widths.items()))

    def layout(self, fit) -> Layout:
        encoding = self.encoding.fitted(fit, self.identity.views, self.class_counts)
        return Layout(identity=self.identity, samples=len(self.sample_id), encoding=encoding, features=self.features)

    def differences(self, cache: Cache) -> list[str]:
        lines = []
        for name in "sample_id", "label", "image_size":
            ours, theirs = getattr(cache, name), getattr(self, name)
            if len(ours) != len(theirs):
                return [f"samples: the store has {len(ours)}, the run has {len(theirs)}"]
            rows = np.flatnonzero((ours != theirs).reshape(len(ours), -1).any(1))
            if len(rows):
                row = rows[0]
                lines.append(f"{name}: row {row} is {ours[row]} in the store and {theirs[row]} in the run")
        ours = cache.encoding.to_json()
        for key, value in self.encoding.to_json().items():  # what is asked for; a codebook is the store's own
            if ours.get(key) != value:
                lines.append(f"encoding.{key}: the store has {ours.get(key)}, the run has {value}")
        if cache.features != self.features:
            lines.append(f"features: the store has {cache.features}, the run has {self.features}")
        return lines


def _create(storage, contents: _Contents, layout: Layout) -> None:
    files = {}
    _sweep(storage, {key.rpartition("/")[0] or "." for key in layout.documents()})
    for key, document in layout.documents().items():
        data = to_bytes(document)
        storage.write(key, data)
        files[key] = {"size": len(data), "checksum": digest(data)}
    store = ZarrStorage(storage)
    columns = {name: getattr(contents, name) for name in ("sample_id", "label", "image_size")}
    for name, values in {**columns, **layout.encoding.codebook()}.items():
        zarr.open_array(store, path=name, mode="r+", zarr_format=3)[...] = values
    storage.write(STORE_MARKER, marker(files | _sizes(store.written)))


def _sizes(written: dict) -> dict[str, dict]:
    return {key: {"size": len(data), "checksum": chunk_checksum(data)} for key, data in written.items()}


class CacheWriter:
    """Writes the (view, block) of a store that this process owns: all of them, or where it is joint, what it takes.

    Also a context manager.

    lost: how many of its blocks were dumped before, but have lost a chunk since, or the end of one; they are written again.
    exact: how many blocks `klt` has stored as they are so far, since its codebook does not fit them.
    """

    def __init__(self, cache: Cache, notes: list[str]):
        self.cache, self._lock, self._notes = cache, None, notes
        self._owned: set[tuple[int, int]] = set()
        self._storage, self._layout, self._encoding = cache._storage, cache.layout, cache.encoding
        self._store, self.exact, self.lost = ZarrStorage(self._storage), 0, 0
        self._array = functools.cache(lambda name: zarr.open_array(self._store, path=name, mode="r+", zarr_format=3))

    def take(self, pairs) -> None:
        """Own the (view, block) `pairs`, once for each writer. Closing it, or the end of its process, frees them for others.

        In a folder what keeps others away is the process's: two writers of one process do not see each other.
        Raises CacheError where another process owns one of them, where there is no such view or block, and where a view is
        stored as differences from another that is neither there nor among `pairs`.
        """
        pairs, layout, reference = list(pairs), self._layout, self._encoding.reference
        if self._owned:
            raise ValueError("this writer has taken its blocks; open another")
        if not pairs:
            return
        views, blocks = zip(*pairs)
        known = whole_numbers(views, "view", layout.views), whole_numbers(blocks, "block", layout.blocks)
        pairs = sorted({*zip(*(numbers.tolist() for numbers in known))})  # they may have been NumPy's numbers
        places = np.array([block * layout.views + view for view, block in pairs])
        if reference is not None:
            lost = {pair for pair in self.cache.missing() if pair[0] == reference}.difference(pairs)
            for view, block in pairs:
                if (reference, block) in lost:
                    raise CacheError(
                        f"view {view} of block {block} is stored as differences from view {reference}, which is not there; "
                        f"write ({reference}, {block}) too"
                    )
        places.sort()
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        try:
            self.own(pairs, _lock(self._storage, [range(int(run[0]), int(run[-1]) + 1) for run in runs]))
        except OSError as error:
            raise CacheError(f"{self.cache} cannot be written: {reason(error, self.cache)}; choose another place") from error

    def own(self, pairs, lock) -> None:
        """Own `pairs`, which `lock` keeps from others: what killed processes left of them is taken away."""
        self._owned, self._lock = set(pairs), lock
        _sweep(self._storage, {"done", *self._layout.arrays, *self._encoding.names()}, self._owned)
        lost = self._owned.intersection(self.cache.lost())
        for view, block in lost:
            self._storage.remove(f"done/{view}.{block}")
        self.lost = len(lost)
        self._withdraw_differences()

    def _withdraw_differences(self):
        """Count as not written what is stored as differences from a reference that is lost, and will be written anew.

        A teacher need not answer in the same bits on another machine.
        """
        reference = self._encoding.reference
        missing = set() if reference is None else set(self.cache.missing())
        for _, block in (pair for pair in self._owned if pair[0] == reference and pair in missing):
            for view in range(self._layout.views):
                if (view, block) not in missing:
                    self._storage.remove(f"done/{view}.{block}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Let other processes write what this one owns. Everything written is already safe."""
        if self._lock is not None:
            self._lock.close()

    @property
    def notes(self) -> list[str]:
        """How the answers to come may differ in their last bits from those that the store has."""
        return [] if self.cache.complete else self._notes

    @property
    def blocks(self) -> int:
        """Blocks a view, of all processes."""
        return self._layout.blocks

    @property
    def owned(self) -> frozenset[tuple[int, int]]:
        """The (view, block) that this process writes."""
        return frozenset(self._owned)

    def rows(self, block: int) -> slice:
        """The samples of `block`, by position."""
        return self._layout.rows(block)

    def pending(self) -> list[tuple[int, int]]:
        """The (view, block) that this process owns and that have no marker, in the order to write them in."""
        first = self._encoding.reference
        missing = self._owned.difference(self.cache.committed())
        return sorted(missing, key=lambda pair: (pair[0] != first, pair))

    def write(self, view: int, block: int, probability, features=None) -> None:
        """Encode and commit `probability`, float32 [rows of the block, C]: on return it survives a crash.

        features: float32 [rows of the block, D] by name, of just those that the store has.
        Raises ValueError, naming sample and view, for a row that is no distribution and for features that are zero or
        not finite, and CacheError where the encoding costs more than it may. Raises OSError where the storage does.
        The block then counts as not written.
        """
        layout, rows = self._layout, self._layout.rows(block)
        probability = np.asarray(probability, np.float32)
        vectors = {name: np.asarray(values, np.float32) for name, values in (features or {}).items()}
        if (view, block) not in self._owned:
            raise ValueError(f"view {view}, block {block} is not this process's to write")
        if view == self._encoding.reference and self._storage.size(f"done/{view}.{block}") is not None:
            raise ValueError(f"view {view}, block {block} is written; other views are stored as differences from it")
        count = rows.stop - rows.start
        if probability.shape != (count, layout.classes):
            shape = [count, layout.classes]
            raise ValueError(f"block {block} takes probability {shape}, found {list(probability.shape)}")
        expected = {name: [count, width] for name, width in layout.features.items()}
        found = {name: list(values.shape) for name, values in vectors.items()}
        if found != expected:
            raise ValueError(f"block {block} takes features {expected}, found {found}")
        self._check(probability, view, rows)
        for name, values in vectors.items():
            self._check_features(name, values, view, rows)
        stored, values = self._encode(view, block, probability, vectors)
        self.exact += len(stored) > len(layout.arrays)
        for name, numbers in stored.items():
            self._array(name)[view, rows] = numbers
        chunks = [layout.chunk(name, view, block) for name in stored]
        files = _sizes({chunk: self._store.written.pop(chunk) for chunk in chunks})
        owner = {"store": self.cache.digest, "view": view, "rows": [rows.start, rows.stop]}
        self._storage.write(f"done/{view}.{block}", marker(files, **owner, **values))

    def _encode(self, view, block, probability, vectors):
        """What each array of the store gets, by path, and what the marker says of it."""
        reference = self.cache.reference_codes(view, block)  # whose errors are its own
        from_chunk = {} if reference is None else {"reference_checksum": self.cache.reference_checksum(block)}
        try:
            stored, values = self._encoding.encode(probability, reference)
            errors = {}
            for name in self._layout.features:
                stored[f"feature/{name}"], errors[name] = features.encode(vectors[name])
        except CacheError as error:
            rows = self._layout.rows(block)
            raise CacheError(f"view {view}, rows {rows.start} to {rows.stop - 1}: {error}") from error
        return stored, values | from_chunk | ({"features": errors} if errors else {})

    def _check(self, probability, view, rows):
        if wrong := no_distribution(probability):
            row, found = wrong
            sample = self.cache.sample_id[rows.start + row]
            raise ValueError(f"sample {sample}, view {view}: not a distribution ({found}); mend the teacher's output")

    def _check_features(self, name, vectors, view, rows):
        wrong = features.unusable(vectors)
        if len(wrong):
            sample, found = self.cache.sample_id[rows.start + wrong[0]], vectors[wrong[0]]
            raise ValueError(
                f"sample {sample}, view {view}: features {name} have no direction (from {found.min()} to "
                f"{found.max()}); mend the teacher's output"
            )
