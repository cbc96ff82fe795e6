"""Storage on S3, Google Cloud and Azure by obstore, and the leases that keep each block to one writer.

Settings and credentials are those of the environment, as obstore reads them.
"""

import errno
import io
import json
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import numpy as np

from .format import CacheError

CLASSES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}  # obstore's, by the scheme of their addresses
RETRIES = {  # of requests that are dropped, or answered with 5xx; some ten seconds in all
    "max_retries": 8,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
CLIENT = {"allow_http": True, "timeout": "60s"}  # plain HTTP only where the endpoint in the environment says so
# Seconds that a lease lasts after its last renewal. A put that begins within a quarter of it, 30 s, ends before it does, with
# all that is tried again: 20 s, a pause of 5 s and the last attempt's 60 s. So none lands on what another has taken over.
LEASE = 120
_REQUESTS = 32  # at once
_PATIENCE = 5  # seconds that a writer waits for others that asked at the same time
_NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|bucket does not exist")
_NOT_ALLOWED = "PermissionDeniedError", "UnauthenticatedError"
_process = None  # the one that uses obstore, whose threads end where a process is forked


class Client:
    """One bucket, or a part of it. What obstore raises is here an OSError of one line that names the address `url`."""

    def __init__(self, url: str):
        scheme, _, place = url.partition("://")
        self.url, (self._bucket, _, self._prefix) = url, place.partition("/")
        try:
            import obstore.store
        except ImportError as error:
            raise CacheError(f"{url} cannot be opened: obstore is not installed; pip install obstore") from error
        if not self._bucket:
            raise CacheError(f"{url} cannot be opened: it names no bucket; write it as {scheme}://bucket/cache.zarr")
        self._class, self._errors = (
            getattr(obstore.store, CLASSES[scheme]),
            (obstore.exceptions.BaseError, OSError, ValueError),
        )
        self._store = None

    def ask(self, request: Callable):
        """What `request(store)` returns, of obstore's store. Raises FileNotFoundError where there is no such object."""
        global _process
        if _process not in (None, os.getpid()):  # a request would wait for ever
            why = "a process cannot use it that was forked from one that did; start processes anew (spawn)"
            raise OSError(errno.ENOTSUP, why, self.url)
        _process = os.getpid()
        try:
            if self._store is None:
                prefix = self._prefix.strip("/") or None
                self._store = self._class(self._bucket, prefix=prefix, client_options=CLIENT, retry_config=RETRIES)
            return request(self._store)
        except self._errors as error:
            number = errno.EACCES if type(error).__name__ in _NOT_ALLOWED else errno.EIO
            if isinstance(error, FileNotFoundError) and not _NO_BUCKET.search(str(error)):
                number = errno.ENOENT
            raise OSError(number, _one_line(error), self.url) from error

    def replace(self, key: str, data: bytes, replaced) -> dict:
        """Put `data` in place of the object that `replaced` describes; returns what describes it now.

        Raises FileNotFoundError where another is there by now, or none.
        """
        version = {name: replaced[name] for name in ("e_tag", "version") if replaced.get(name) is not None}
        try:
            return self.ask(lambda store: store.put(key, data, mode=version))
        except OSError as error:
            if type(error.__cause__).__name__ == "PreconditionError":
                raise FileNotFoundError(errno.ENOENT, error.strerror, self.url) from error
            raise


def _one_line(error: Exception) -> str:
    """Why a request failed, of obstore's pages: what the server says, its status, or what the connection met."""
    text, _, debug = str(error).partition("\n\nDebug source")
    if said := re.search("<Message>(.+?)</Message>", text, re.S):
        return " ".join(said[1].split()).rstrip(".")
    if status := re.search(r"status code: (\d+[\w ]*)", text):
        return f"the server answered {status[1].strip()}"
    cause = re.findall(r'message: "([^"]+)"', debug) or re.findall(r"kind: (\w+)", debug)
    text = " ".join(text.rpartition(" - ")[2].split()).removeprefix("HTTP error: ")
    return f"{text}: {cause[-1]}" if cause else text


class ObjectStorage:
    """Objects under the address `url`. A put is whole by the object store's own promise."""

    def __init__(self, url: str):
        self._client = Client(url)
        self._lease: Callable[[], Lease | None] = lambda: None

    def __str__(self):
        return self._client.url

    def read(self, key: str, limit: int | None = None):
        """The bytes at `key`, uint8 [size], or the first `limit` of them; None if there is no such object."""

        def request(store):
            answer = store.get(key)
            if limit is not None and answer.meta["size"] > limit:
                return store.get_range(key, start=0, length=limit)
            return answer.bytes()

        try:
            return np.frombuffer(self._client.ask(request), np.uint8)
        except FileNotFoundError:
            return None

    def read_several(self, keys: list[str], limit: int) -> list:
        """`read` of each key, many at once."""
        with ThreadPoolExecutor(_REQUESTS) as threads:
            return list(threads.map(lambda key: self.read(key, limit), keys))

    def open(self, key: str, limit: int | None = None):
        """The bytes at `key` as a file, fetched as `read` does, or None if there is no such object."""
        data = self.read(key, limit)
        return None if data is None else io.BytesIO(data)

    def size(self, key: str) -> int | None:
        """The number of bytes at `key`, or None if there is no such object."""
        try:
            return self._client.ask(lambda store: store.head(key))["size"]
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        """The names in `folder`, sorted; none if it does not exist."""
        listed = self._client.ask(lambda store: store.list_with_delimiter(folder or None))
        paths = [*listed["common_prefixes"], *(entry["path"] for entry in listed["objects"])]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)

    def sizes(self, folder: str) -> dict[str, int]:
        """The number of bytes of each object in `folder`, by name; none if it does not exist."""
        listed = self._client.ask(lambda store: store.list_with_delimiter(folder))
        return {entry["path"].rsplit("/", 1)[-1]: entry["size"] for entry in listed["objects"]}

    def keys(self, folder: str = "") -> list[str]:
        """The keys of all objects in `folder` and the folders in it."""
        return [entry["path"] for entry in self._client.ask(lambda store: store.list(folder or None).collect())]

    def write(self, key: str, data) -> None:
        """Put `data` (any buffer) at `key`, whole or not at all. Raises OSError where another has taken over the lease."""
        if lease := self._lease():
            lease.keep()
        self._client.ask(lambda store: store.put(key, bytes(data), use_multipart=False))

    def remove(self, key: str) -> None:
        """Take away what is at `key`."""
        with suppress(FileNotFoundError):
            self._client.ask(lambda store: store.delete(key))

    def partial(self, folder: str = "") -> dict[str, str]:
        """None: a put is whole."""
        return {}

    def lock(self, key: str, ranges) -> "Lease":
        """Hold the numbers in `ranges` of `key` against other processes; returns the lease that does.

        Raises BlockingIOError where another process holds one. A process that is killed holds them for LEASE seconds more.
        """
        lease = Lease(self._client, f"{key}s", ranges)
        self._lease = weakref.ref(lease)
        return lease


class Lease:
    """An object that says what its writer holds. A thread renews it; one that is not renewed may be taken away.

    Each writer first asks, by putting its own, and then looks for others': of two that overlap at least one sees the other.
    Of those that ask at once the first by name waits for the rest to give way; then it holds. Times are the server's.
    Renewing and taking away are conditional on the object being as it was seen, so that only one happens.
    """

    def __init__(self, client: Client, folder: str, ranges):
        numbers = [[held.start, held.stop] for held in ranges]
        self._held = _Held(client, f"{folder}/{secrets.token_hex(8)}", numbers)
        self._end = weakref.finalize(self, self._held.end)
        try:
            self._refuse_others(client, folder)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._held.renew_until_ended, daemon=True).start()

    def _refuse_others(self, client, folder):
        leases = {entry["path"]: entry for entry in client.ask(lambda store: store.list(folder).collect())}
        now, rivals = leases.pop(self._held.key)["last_modified"], []
        for key, entry in leases.items():
            if (now - entry["last_modified"]).total_seconds() > LEASE:
                with suppress(FileNotFoundError):  # it was renewed or given back meanwhile
                    seen = client.ask(lambda store, key=key: store.head(key))  # Google's listings name no version
                    if (now - seen["last_modified"]).total_seconds() > LEASE:
                        client.replace(key, b"", seen)
                        client.ask(lambda store, key=key: store.delete(key))
                        continue
            if self._contested(client, key):
                if key < self._held.key:
                    self._refuse()
                rivals.append(key)
        deadline = time.monotonic() + _PATIENCE
        while rivals := [key for key in rivals if self._contested(client, key)]:  # who comes later sees this one
            if time.monotonic() > deadline:
                self._refuse()
            time.sleep(0.02)
        self._held.hold()

    def _contested(self, client, key) -> bool:
        """Whether the writer of the lease `key` asks for some of the same. Raises BlockingIOError where it holds them."""
        try:
            data = bytes(client.ask(lambda store: store.get(key).bytes())) or b"[[], false]"
        except FileNotFoundError:
            return False
        theirs, holds = json.loads(data)[:2]
        overlap = any(max(a, c) < min(b, d) for a, b in theirs for c, d in self._held.ranges)
        if overlap and holds:
            self._refuse()
        return overlap

    def _refuse(self):
        raise BlockingIOError(f"wait for it, or end it and wait {LEASE} s")

    def keep(self) -> None:
        """Raises OSError unless the numbers are held still."""
        self._held.keep()

    def close(self) -> None:
        """Give the numbers back."""
        self._end()


class _Held:
    """The state of a lease; apart from it so that the thread does not keep alive what nobody else holds."""

    def __init__(self, client: Client, key: str, ranges: list[list[int]]):
        self.client, self.key, self.ranges = client, key, ranges
        self._holds, self._lost, self._ended = False, False, threading.Event()
        self._renewing = threading.RLock()  # a lease may end while this very thread renews: wherever it is collected
        # A put without conditions, which may be tried again where the answer to it is lost: no other has this key.
        self._renewed, self._object = time.time(), client.ask(lambda store: store.put(key, self._data(), use_multipart=False))

    def _data(self) -> bytes:
        # No two are alike, as an etag may be of the bytes alone.
        return json.dumps([self.ranges, self._holds, secrets.token_hex(8)]).encode()

    def hold(self) -> None:
        """From asking to holding."""
        self._holds = True
        self.renew()
        self.keep()

    def renew(self) -> None:
        with self._renewing:
            start = time.time()
            try:
                self._object = self.client.replace(self.key, self._data(), self._object)
            except FileNotFoundError:
                if not self._ours():
                    self._lost = True
                    return
            self._renewed = start

    def _ours(self) -> bool:
        """Whether the object is there after all: an attempt that seemed to fail had been carried out."""
        try:
            answer = self.client.ask(lambda store: store.get(self.key))
        except FileNotFoundError:
            return False
        self._object = answer.meta
        return answer.meta["size"] > 0  # what is taken away is emptied first

    def renew_until_ended(self) -> None:
        while not self._lost and not self._ended.wait(LEASE / 6):
            with suppress(OSError):  # the next time may do
                self.renew()

    def keep(self) -> None:
        if not self._lost and time.time() - self._renewed > LEASE / 4:
            self.renew()
        if self._lost:
            raise OSError(errno.ESTALE, "another process took over, since this one was not heard of for long", self.client.url)

    def end(self) -> None:
        if _process != os.getpid():
            return  # a forked process has a copy; what it holds is its parent's
        self._ended.set()
        with self._renewing, suppress(OSError):  # else it ends by itself
            if not self._lost:
                self.client.ask(lambda store: store.delete(self.key))
