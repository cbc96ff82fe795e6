"""What Zarr itself asks of a store, of ours: its own tests."""

import functools
import inspect
import uuid

import pytest
from zarr.core.buffer import cpu
from zarr.core.sync import sync
from zarr.testing.store import StoreTests

from offline_bkd.cache.storage import ZarrStorage, open_storage


def waiting(test):
    """A test that is a coroutine, as one that waits for it."""

    @functools.wraps(test)
    def run(*given, **named):
        return sync(test(*given, **named))

    return run


# as pytest's plugin for coroutines would run them
Waiting = type("Waiting", (StoreTests,), {
    name: waiting(test) for name, test in inspect.getmembers(StoreTests, inspect.iscoroutinefunction)
    if name.startswith("test")
})  # fmt: skip


class OurStore(Waiting):
    store_cls, buffer_cls = ZarrStorage, cpu.Buffer

    # of a protocol without coroutines, which a store may have and ours has not
    test_get_sync = test_get_sync_missing = test_set_sync = test_delete_sync = test_delete_sync_missing = None

    @pytest.fixture
    def store(self, open_kwargs):
        return sync(ZarrStorage.open(**open_kwargs))

    @pytest.fixture
    def store_not_open(self, store_kwargs):
        return ZarrStorage(**store_kwargs)

    async def set(self, store, key, value):
        store.storage.write(key, value.to_bytes())

    async def get(self, store, key):
        return cpu.Buffer.from_bytes(bytes(store.storage.read(key)))

    def test_store_repr(self, store):
        assert repr(store) == f"ZarrStorage('{store.storage}')"

    def test_store_supports_writes(self, store):
        assert store.supports_writes

    def test_store_supports_listing(self, store):
        assert store.supports_listing


class TestInAFolder(OurStore):
    @pytest.fixture
    def store_kwargs(self, tmp_path):
        return {"storage": open_storage(tmp_path / "s")}


class TestElsewhere(OurStore):
    @pytest.fixture
    def store_kwargs(self):
        pytest.importorskip("fsspec")
        return {"storage": open_storage(f"memory://{uuid.uuid4().hex}")}
