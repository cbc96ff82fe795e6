"""Where the bytes of a store live: a local folder, an object store or another fsspec URL, by key, and the Zarr store over it.

A local write is durable and whole: a partial file of a name of its own, fsync, rename, fsync of the folder.
"""

import asyncio
import errno
import fcntl
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import unquote

import numpy as np
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from .format import CacheError
from .object_storage import CLASSES, ObjectStorage

PARTIAL = re.compile(r"(.+)\.[0-9a-f]{16}\.partial")  # as `new_file` names it: no other program's is taken away


@contextmanager
def new_file(path: Path, replace: bool = False) -> Iterator[BinaryIO]:
    """A file to write, whose contents are at `path` when the context ends: whole and synchronised, or not at all.

    Unless `replace`, what is there by then stays, and FileExistsError is raised. A crash leaves a partial file beside it,
    of a name that no other process takes.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:  # which follows no link
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(partial, path, replace)
    except (Exception, KeyboardInterrupt) as error:
        with suppress(OSError):
            partial.unlink()  # a full disk gets its space back
        # a full disk does not say which file, and the partial one's name says nothing to a person
        if isinstance(error, OSError) and error.filename in (None, partial, str(partial)):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    _sync_folder(path.parent)


def open_regular(path: Path | str, mode: str = "rb", **options: Any) -> IO:
    """The regular file at `path`. Raises OSError also for a pipe or a device, which might be waited for, or never end."""
    file = open(path, mode, opener=_at_once, **options)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file


def _publish(partial: Path, path: Path, replace: bool) -> None:
    if not replace:
        try:
            os.link(partial, path)  # fails where something is, which a rename would replace
            return partial.unlink()
        except FileExistsError:
            raise
        except OSError:  # no links on this file system
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
    os.replace(partial, path)


class LocalStorage:
    """Files under the folder `root`. Keys are relative paths that the format makes, never text from a store."""

    def __init__(self, root):
        self.root = Path(root)

    def __str__(self):
        return str(self.root)

    def read(self, key: str, limit: int | None = None):
        """The bytes at `key`, uint8 [size], or the first `limit` of them; None if there is no such file."""
        file = self.open(key)
        if file is None:
            return None
        with file:
            whole = limit is None or os.fstat(file.fileno()).st_size <= limit
            return np.frombuffer(file.readall() if whole else file.read(limit), np.uint8)

    def read_several(self, keys: list[str], limit: int) -> list:
        """`read` of each key."""
        return [self.read(key, limit) for key in keys]

    def open(self, key: str, limit: int | None = None):
        """The bytes at `key` as a file, unbuffered, or None if there is no such file. It is not read, whatever the `limit`."""
        try:
            return open_regular(self.root / key, buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def size(self, key: str) -> int | None:
        """The number of bytes at `key`, or None if there is no such file."""
        try:
            found = (self.root / key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if stat.S_ISDIR(found.st_mode) else found.st_size

    def names(self, folder: str = "") -> list[str]:
        """The names in `folder`, sorted; none if it does not exist. Partial files are no part of a store."""
        return [name for name in self._names(folder) if not name.endswith(".partial")]

    def sizes(self, folder: str) -> dict[str, int]:
        """The number of bytes of each file in `folder`, by name; none if it does not exist."""
        sizes = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # it was taken away since
                    if not entry.name.endswith(".partial") and not entry.is_dir():
                        sizes[entry.name] = entry.stat().st_size
        return sizes

    def keys(self, folder: str = "") -> list[str]:
        """The keys of all files in `folder` and the folders in it."""
        files = (path for path in (self.root / folder).rglob("*") if path.is_file() and path.suffix != ".partial")
        return [str(path.relative_to(self.root)) for path in files]

    def partial(self, folder: str = "") -> dict[str, str]:
        """What writes that were cut short have left in `folder`, or are at work on: by name, the name of the whole."""
        names = {name: PARTIAL.fullmatch(name) for name in self._names(folder)}
        return {name: match[1] for name, match in names.items() if match}

    def _names(self, folder):
        try:
            return sorted(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, key: str, data) -> None:
        """Put `data` (any buffer) at `key`: after a crash at any moment it is there whole, or not at all."""
        path = self.root / key
        self._make_folder(path.parent)
        with new_file(path, replace=True) as file:
            file.write(data)

    def remove(self, key: str) -> None:
        """Take away what is at `key`: after this it stays away."""
        path = self.root / key
        if path.parent.is_dir():
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)

    def lock(self, key: str, ranges):
        """Hold the bytes in `ranges` of the file `key` against other processes; returns the open file that holds them.

        Raises BlockingIOError where another process holds one. The kernel frees them when the process ends.
        """
        path = self.root / key
        self._make_folder(path.parent)
        file = open(path, "ab", opener=_at_once)
        try:
            for held in ranges:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, len(held), held.start)
        except (BlockingIOError, PermissionError) as error:
            file.close()
            raise BlockingIOError("wait for it, or end it") from error
        return file


class RemoteStorage:
    """Files under an fsspec URL, in an archive, in memory or elsewhere. There are no locks."""

    def __init__(self, url: str):
        import fsspec

        self.url = url
        # Listings change under us while other processes dump, so they are never cached.
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:  # a protocol that is unknown, or whose package is not installed
            raise CacheError(f"{url} cannot be opened: {error}; install what it needs, or choose another place") from error
        self.root = self.root.rstrip("/")

    def __str__(self):
        return self.url

    def _path(self, key):
        return "/".join(part for part in (self.root, key) if part)  # the root of an archive is empty

    def _ask(self, operation, *arguments, **options):
        """The filesystem's answer. What clients raise for a failing connection is their own; here it is an OSError."""
        try:
            return operation(*arguments, **options)
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, str(error), self.url) from error

    def read(self, key: str, limit: int | None = None):
        """The bytes at `key`, uint8 [size], or the first `limit` of them; None if there is no such object."""
        try:
            cut = limit is not None and self._ask(self.fs.size, self._path(key)) > limit
            return np.frombuffer(self._ask(self.fs.cat_file, self._path(key), **({"end": limit} if cut else {})), np.uint8)
        except FileNotFoundError:
            return None

    def read_several(self, keys: list[str], limit: int) -> list:
        """`read` of each key, all at once."""
        paths = [self._path(key) for key in keys]
        found = self._ask(self.fs.cat_ranges, paths, 0, limit, on_error="return") if paths else []
        for place, data in enumerate(found):
            if isinstance(data, FileNotFoundError):
                found[place] = None
            elif isinstance(data, Exception):  # also that an empty object has no such range
                found[place] = self.read(keys[place], limit)
            else:
                found[place] = np.frombuffer(data, np.uint8)
        return found

    def open(self, key: str, limit: int | None = None):
        """The bytes at `key` as a file, fetched as `read` does, or None if there is no such object."""
        data = self.read(key, limit)
        return None if data is None else io.BytesIO(data)

    def size(self, key: str) -> int | None:
        """The number of bytes at `key`, or None if there is no such object."""
        try:
            return self._ask(self.fs.size, self._path(key))
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        """The names in `folder`, sorted; none if it does not exist."""
        try:
            found = self._ask(self.fs.ls, self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name for name in (entry.rstrip("/").rsplit("/", 1)[-1] for entry in found) if name)

    def sizes(self, folder: str) -> dict[str, int]:
        """The number of bytes of each object in `folder`, by name; none if it does not exist."""
        with suppress(FileNotFoundError):
            entries = [entry for entry in self._ask(self.fs.ls, self._path(folder), detail=True) if entry["type"] == "file"]
            sizes = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries}
            unsaid = [name for name, size in sizes.items() if size is None]  # as where a web server lists a folder
            return sizes | dict(zip(unsaid, self._ask(self.fs.sizes, [self._path(f"{folder}/{name}") for name in unsaid])))
        return {}

    def keys(self, folder: str = "") -> list[str]:
        """The keys of all objects in `folder` and the folders in it."""
        found = self._ask(self.fs.find, self._path(folder))
        return [path.removeprefix(self.root).strip("/") for path in found]

    def write(self, key: str, data) -> None:
        """Put `data` (any buffer) at `key`, whole or not at all."""
        self._ask(self.fs.makedirs, self._path(key).rpartition("/")[0], exist_ok=True)
        self._ask(self.fs.pipe_file, self._path(key), bytes(data))

    def remove(self, key: str) -> None:
        """Take away what is at `key`."""
        with suppress(FileNotFoundError):
            self._ask(self.fs.rm, self._path(key))

    def partial(self, folder: str = "") -> dict[str, str]:
        """None: a put is whole."""
        return {}

    def lock(self, key: str, ranges):
        """There are none here: that each block has one dumping process is the caller's to see to.

        The key is put all the same, so that who may not write learns it before any work is done.
        """
        self.write(key, b"")
        return None


def open_storage(url) -> LocalStorage | ObjectStorage | RemoteStorage:
    """The storage at `url`: a path, an address on S3 (s3://), Google Cloud (gs://) or Azure (az://), or what fsspec knows."""
    url = os.fspath(url)
    if not url:  # which would be the folder that the process stands in
        raise CacheError("the store's address is empty; name a folder, or an address on an object store")
    if one_slash := re.match(r"(\w+):/(?!/)", url):  # as a Path keeps it, which would be a folder here
        raise CacheError(f"{url} is an address with one slash; write it as text, {one_slash[1]}://…")
    if url.startswith("file://"):
        return LocalStorage(unquote(re.sub("^file://(localhost(?=/))?", "", url)))
    scheme, separator, _ = url.partition("://")
    if scheme in CLASSES:
        return ObjectStorage(url)
    return RemoteStorage(url) if separator else LocalStorage(url)


def _at_once(path, flags):
    """Opening a pipe waits for its other end; this does not."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ZarrStorage(Store):
    """The Zarr store that a writer writes through, to a storage. `written` records every value that is set."""

    supports_writes = supports_deletes = supports_listing = True

    def __init__(self, storage, *, read_only: bool = False):
        super().__init__(read_only=read_only)
        self.storage = storage
        self.written: dict[str, np.ndarray] = {}

    def with_read_only(self, read_only: bool = False) -> "ZarrStorage":
        return ZarrStorage(self.storage, read_only=read_only)

    def __eq__(self, other):
        return isinstance(other, ZarrStorage) and str(self.storage) == str(other.storage)

    def __repr__(self):
        return f"ZarrStorage({str(self.storage)!r})"

    async def get(self, key, prototype, byte_range=None):
        data = await asyncio.to_thread(self.storage.read, key)
        if data is None:
            return None
        match byte_range:
            case None:
                part = slice(None)
            case RangeByteRequest(start, end):
                part = slice(start, end)
            case OffsetByteRequest(offset):
                part = slice(offset, None)
            case SuffixByteRequest(suffix):
                part = slice(max(0, len(data) - suffix), None)
            case _:
                raise TypeError(f"Unexpected byte_range, got {byte_range!r}")
        return prototype.buffer.from_array_like(data[part].view("B"))

    async def get_partial_values(self, prototype, key_ranges):
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def set(self, key, value):
        self._check_writable()
        data = value.as_numpy_array()
        await asyncio.to_thread(self.storage.write, key, data)
        self.written[key] = data

    async def exists(self, key):
        return await asyncio.to_thread(self.storage.size, key) is not None

    async def delete(self, key):
        # Zarr deletes a chunk of nothing but fill values; no array of a store of ours holds its fill value.
        self._check_writable()
        await asyncio.to_thread(self.storage.remove, key)

    async def list(self):
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix):
        for key in self.storage.keys(prefix.rpartition("/")[0]):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix):
        for name in self.storage.names(prefix.strip("/")):
            yield name
