"""Format 1 of the store: which arrays it has, what their metadata say, whose answers it holds, what a marker says.

The store is a Zarr v3 group. Every metadata document is written by this file and must read back equal, so a reader
needs to know nothing else of a store before it trusts shapes, types and codecs.

    zarr.json                     attributes: cache_format, encoding, identity
    sample_id [N], label [N], image_size [N, 2]     int64
    logit [V, N, C]               encoding `logit`: one chunk is one view of one block of samples
    probability [V, N, C]         encoding `probability`: likewise
    code [V, N, S]                encoding `klt`: likewise, with codebook/mean [C], basis [R, C], prediction [R]
    feature/<name> [V, N, D]      int8, where there are features: likewise
    done/store                    marker: the files above are written, but the chunks of views
    done/<view>.<block>           marker: this block of this view is written

V views, N samples, C classes. A block is a range of samples; it is what is written, marked and resumed as one.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from . import views as view_space

if TYPE_CHECKING:
    from .encodings import Dense, Klt

FORMAT = 1
STORE_MARKER = "done/store"
LOCK = "done/lock"
_CHUNK_BYTES, _BLOCK_BYTES = 8 << 20, 64 << 20  # of a chunk as stored, of a block as float32 probabilities
LARGEST = 1e300  # of a number that JSON may say to be larger than any float
_MOST = {"views": 10**6, "samples": 10**9, "classes": 10**5, "blocks": 10**7}


class CacheError(ValueError):
    """The store is not usable for what was asked. One line: what was wrong, what was found, what to do."""


class CorruptCacheError(CacheError):
    """What was stored has been damaged since."""


class LostCacheError(CacheError):
    """The store was opened, but cannot be read any more."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose answers to what a store holds.

    classes: names in the order of the labels.  temperature: T of the stored probabilities.
    views: the view specification.  dataset: name and digests, by part.
    teacher: JSON values; its "digest" says whether two teachers are the same, the rest describes it.
    computed: JSON values: how the answers were computed, as far as that changes them. Answers of one store do not differ in
    it, but in its "environment", which changes their last bits alone. Earlier stores do not say it.
    """

    classes: tuple[str, ...]
    temperature: float
    views: view_space.CropFlip | view_space.RandomResizedCrop
    dataset: dict
    teacher: dict
    computed: dict = field(default_factory=dict)

    def differences(self, other: "Identity") -> list[str]:
        """One readable line for each thing in which this store's identity differs from the run's, `other`."""
        lines = []
        for index, (ours, theirs) in enumerate(zip(self.classes, other.classes, strict=False)):
            if ours != theirs:
                lines.append(f"classes: class {index} is {ours!r} in the store and {theirs!r} in the run")
                break
        if len(self.classes) != len(other.classes):
            lines.append(f"classes: the store has {len(self.classes)}, the run has {len(other.classes)}")
        sides = self.to_json(), other.to_json()
        for part in "temperature", "views", "dataset", "teacher":
            left, right = (dict(leaves({part: values[part]})) for values in sides)
            for name in [*left, *(name for name in right if name not in left)]:
                if left.get(name) != right.get(name) and (part != "teacher" or name == "teacher.digest"):
                    ours, theirs = _short(left.get(name)), _short(right.get(name))
                    lines.append(f"{name}: the store has {ours}, the run has {theirs}")
        return lines

    def mixed(self, other: "Identity") -> tuple[list[str], list[str]]:
        """How answers that are computed as the run's, `other`, would differ from those that this store has.

        A line for each thing that makes others of them, and for each that changes their last bits.
        """
        if not self.computed or not other.computed:
            return [], ["the store does not say how its answers were computed"] if other.computed else []
        left, right = (dict(leaves(identity.to_json()["computed"])) for identity in (self, other))
        lines = {
            name: f"{name}: the store has {left.get(name)}, the run has {right.get(name)}"
            for name in [*left, *(name for name in right if name not in left)]
            if device_kind(left.get(name)) != device_kind(right.get(name))
        }
        bits = [line for name, line in lines.items() if name.startswith("environment.")]
        return [line for line in lines.values() if line not in bits], bits

    def to_json(self) -> dict:
        """Plain JSON values; equal identities give equal values."""
        values = {
            "classes": list(self.classes),
            "temperature": float(self.temperature),
            "views": view_space.to_json(self.views),
            "dataset": json.loads(json.dumps(self.dataset)),
            "teacher": json.loads(json.dumps(self.teacher)),
        }
        return values | ({"computed": json.loads(json.dumps(self.computed))} if self.computed else {})

    @classmethod
    def from_json(cls, values: dict) -> "Identity":
        """The identity that `to_json` wrote. Raises CacheError for anything else."""
        try:
            identity = cls(
                classes=tuple(values["classes"]),
                temperature=values["temperature"],
                views=view_space.from_json(values["views"]),
                dataset=values["dataset"],
                teacher=values["teacher"],
                computed=values.get("computed", {}),
            )
            identity.check()
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise CacheError(f"the store's identity is not readable: {error}") from error
        return identity

    def check(self) -> None:
        """Raises ValueError unless every field is of its type and in its range."""
        count, temperature = len(self.classes), self.temperature
        if not all(isinstance(name, str) for name in self.classes) or len(set(self.classes)) != count:
            raise ValueError("classes must be distinct names")
        if not 2 <= count <= _MOST["classes"]:
            raise ValueError(f"there must be 2 to {_MOST['classes']} classes, found {count}")
        if type(temperature) not in (int, float) or not 0 < temperature < LARGEST:
            raise ValueError(f"temperature must be a positive number, found {temperature!r}")
        if not all(isinstance(part, dict) for part in (self.dataset, self.teacher, self.computed)):
            raise ValueError("dataset, teacher and computed must be JSON objects")
        several = [self.teacher[name] for name in ("average_of", "experts") if name in self.teacher]
        if not all(isinstance(members, list) for members in several):
            raise ValueError("teacher.average_of and teacher.experts are lists of teachers")
        teachers = [self.teacher, *(one for members in several for one in members)]
        if not all(isinstance(one, dict) and isinstance(one.get("digest"), str) for one in teachers):
            raise ValueError("a teacher must have a digest")
        if type(self.views.count) is not int or not 1 <= self.views.count <= _MOST["views"]:
            raise ValueError(f"there must be 1 to {_MOST['views']} views, found {self.views.count}")


def device_kind(name):
    """The name of a device less what it varies by: "cpu" of "cpu (1 thread)", and of "cpu (2 cores)", as earlier versions
    wrote it."""
    return "cpu" if isinstance(name, str) and name.startswith("cpu (") else name


def _short(value):
    """A digest's first twelve digits, which do to tell two apart; anything else as it is."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The values that are no dictionaries, by dotted name."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of a store, and every metadata document that follows from them.

    encoding: one of cache.encodings.  features: the width D of each, by name.
    """

    identity: Identity
    samples: int
    encoding: "Dense | Klt"
    features: dict[str, int]

    def __post_init__(self):
        if (count := self.views * self.blocks) > _MOST["blocks"]:
            found = f"{self.views:,} views of {self.samples:,} samples and {self.classes:,} classes are {count:,}"
            raise CacheError(f"a store has at most {_MOST['blocks']:,} blocks, {found}; make several of fewer views")

    @property
    def views(self) -> int:
        return self.identity.views.count

    @property
    def classes(self) -> int:
        return len(self.identity.classes)

    @cached_property
    def block_rows(self) -> int:
        """Samples a block, as equal as can be, so that little of the last chunk is padding."""
        stored = self.encoding.columns(self.classes) * np.dtype(self.encoding.stored_dtype).itemsize
        stored = self.samples * max(stored, *self.features.values(), 0)
        blocks = math.ceil(max(stored / _CHUNK_BYTES, self.samples * self.classes * 4 / _BLOCK_BYTES))
        return math.ceil(self.samples / blocks)

    @cached_property
    def blocks(self) -> int:
        """Blocks a view."""
        return math.ceil(self.samples / self.block_rows)

    def rows(self, block: int) -> slice:
        """The samples of `block`."""
        return slice(block * self.block_rows, min((block + 1) * self.block_rows, self.samples))

    def documents(self) -> dict[str, dict]:
        """Every zarr.json of the store, by key."""
        attributes = {
            "cache_format": FORMAT,
            "encoding": self.encoding.to_json(),
            "identity": self.identity.to_json(),
        }
        found = {
            "zarr.json": group_document(attributes | ({"features": self.features} if self.features else {})),
            "done/zarr.json": group_document({}),  # or Zarr's listings complain of a folder that is no node
            "sample_id/zarr.json": array_document([self.samples], "int64", ["sample"]),
            "label/zarr.json": array_document([self.samples], "int64", ["sample"]),
            "image_size/zarr.json": array_document([self.samples, 2], "int64", ["sample", "side"]),
        }
        sizes = self.views, self.samples
        for name, document in self.encoding.documents(*sizes, self.classes, self.block_rows).items():
            found[f"{name}/zarr.json"] = document
        if self.features:
            found["feature/zarr.json"] = group_document({})
        for name, width in self.features.items():
            shape, chunks = [*sizes, width], [1, self.block_rows, width]
            document = array_document(shape, "int8", ["view", "sample", f"feature_{name}"], chunks=chunks)
            found[f"feature/{name}/zarr.json"] = document
        return found

    @property
    def arrays(self) -> list[str]:
        """The paths of the arrays that are written block by block."""
        return [self.encoding.array, *(f"feature/{name}" for name in self.features)]

    def chunk(self, array: str, view: int, block: int) -> str:
        """The key of the one chunk of `block` of `view` in one of `arrays`."""
        return f"{array}/c.{view}.{block}.0"

    def plain_bytes(self, width: int, dtype: str) -> int:
        """The size of a chunk of `width` plain numbers a row, and their crc32c."""
        return self.block_rows * width * np.dtype(dtype).itemsize + 4


PLAIN = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def group_document(attributes: dict) -> dict:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


# What no array holds, so that a chunk that is missing is never mistaken for data: codes are clipped to ±127.
_NO_DATA = {"float16": "NaN", "float32": "NaN", "int8": -(2**7), "int64": -(2**63)}


def array_document(shape, data_type: str, dimensions, *, codecs=PLAIN, chunks=None) -> dict:
    """The metadata of a Zarr v3 array. Every chain of codecs ends in crc32c, which is what a marker records."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks or shape)}},
        # All chunks of an array lie in one folder: one fsync, and a listing that can be read.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _NO_DATA[data_type],
        "codecs": codecs,
        "attributes": {},
        "dimension_names": list(dimensions),
        "storage_transformers": [],
    }


def to_bytes(document: dict, indent: int | None = 1) -> bytes:
    """A document as it is stored."""
    return json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def from_bytes(data, what: str) -> dict:
    """The JSON object in `data` (a buffer). Raises CorruptCacheError."""
    try:
        document = json.loads(bytes(data).decode())
        if not isinstance(document, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{what} is damaged: {error}; restore it from a copy") from error
    return document


def digest(data) -> str:
    """SHA-256 of a buffer, hex."""
    return hashlib.sha256(data).hexdigest()


def reason(error: OSError, what: object = "") -> str:
    """Why an operation failed, and of which file where it says so, unless `what` is said to have failed names it."""
    why = error.strerror or str(error)
    return f"{why} ({error.filename})" if error.filename and str(error.filename) not in str(what) else why


def chunk_checksum(data) -> str:
    """The checksum at the end of a chunk as stored, hex: its last codec's crc32c, which decoding verifies."""
    return bytes(data[-4:]).hex()


def marker(files: dict[str, dict], **values) -> bytes:
    """A marker: `files` says size and checksum by key. It carries its own checksum."""
    body = {**values, "files": files}
    return to_bytes({**body, "checksum": digest(to_bytes(body))}, indent=None)


def whole_numbers(values, what: str, count: int | None = None) -> np.ndarray:
    """One number or several, int64 [K], in [0, count) if that is given. `what` one of them is: a view, a sample.

    Raises CacheError for others. A float is none, nor is a bool: a mask would be taken for numbers.
    """
    found = np.asarray(values).reshape(-1)
    if found.size and not np.issubdtype(found.dtype, np.integer):
        raise CacheError(f"a {what} is a whole number, found {reprlib.repr(values)}; give one or several such")
    if count is not None and found.size and not (found.min() >= 0 and found.max() < count):
        wrong = found[(found < 0) | (found >= count)][0]
        raise CacheError(f"there is no {what} {wrong}: the store has {what}s 0 to {count - 1}")
    if found.size and found.max() >= 2**63:
        raise CacheError(f"a {what} is below 2^63, found {found.max()}; give one or several such")
    return found.astype(np.int64)


def read_marker(data, where: Callable[[], str], remedy: str) -> dict:
    """What `marker` wrote. Raises CorruptCacheError, which says `where` it is and what to do, if one bit of it differs."""
    try:
        values = json.loads(bytes(data))
        body = {key: value for key, value in values.items() if key != "checksum"}
        entries = [(type(entry["size"]), type(entry["checksum"])) for entry in body["files"].values()]
        intact = bytes(data) == marker(**body) and set(entries) <= {(int, str)}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        intact = False
    if not intact:
        raise CorruptCacheError(f"{where()} is damaged: its checksum does not match; {remedy}")
    return values
