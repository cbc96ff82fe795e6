"""A store opens in other readers of Zarr, and where fsspec reaches; what other programs write into it is named."""

import functools
import threading
import uuid
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cache_store import CLASSES, TWO_VIEWS, answers, arguments, dump, files, fill

from offline_bkd.cache import (
    CacheError,
    CorruptCacheError,
    create_cache,
    open_cache,
)

# other readers


def test_xarray_opens_it_with_named_dimensions(tmp_path, two_blocks):
    xarray = pytest.importorskip("xarray")
    dump(tmp_path / "s", **TWO_VIEWS)
    found = xarray.open_zarr(tmp_path / "s", consolidated=False)
    assert dict(found.sizes) == {"view": 2, "sample": 360, "class": 5, "side": 2}
    assert (found.probability.isel(view=1).to_numpy() == answers(1)).all()
    assert (found.label.to_numpy() == arguments()["label"]).all()
    assert found.attrs["identity"]["classes"] == list(CLASSES)


@pytest.mark.parametrize("array, dtype", [("probability", "<f4"), ("sample_id", "<i8"), ("image_size", "<i8")])
def test_tensorstore_opens_it(tmp_path, two_blocks, array, dtype):
    tensorstore = pytest.importorskip("tensorstore")
    dump(tmp_path / "s", **TWO_VIEWS)
    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s" / array)}}
    found = tensorstore.open(where, read=True).result().read().result()
    assert found.dtype == dtype
    expected = np.stack([answers(0), answers(1)]) if array == "probability" else arguments()[array]
    assert (found == expected).all()


def test_zarrs_own_listing_knows_every_node(tmp_path, recwarn):
    import zarr

    dump(tmp_path / "s", **TWO_VIEWS)
    members = dict(zarr.open_group(tmp_path / "s", mode="r").members())
    assert sorted(members) == ["done", "image_size", "label", "probability", "sample_id"]
    assert not [warning for warning in recwarn if "zarr" in str(warning.message).lower()]


# what fsspec reaches


def in_memory():
    return f"memory://{uuid.uuid4().hex}"


class Dropping:
    """A filesystem whose connection drops at the operation numbered `at`, once or for good."""

    def __init__(self, real, at, for_good):
        self._real, self._at, self._for_good, self._count = real, at, for_good, 0

    def __getattr__(self, name):
        value = getattr(self._real, name)
        if name not in ("pipe_file", "cat_file"):
            return value

        def operation(*positional, **options):
            self._count += 1
            if self._count == self._at or (self._for_good and self._count > self._at):
                raise ConnectionResetError("the connection was dropped")
            return value(*positional, **options)

        return operation


def test_a_dropped_connection_is_an_error_and_the_dump_resumes(two_blocks):
    pytest.importorskip("fsspec")
    url = in_memory()
    writer = create_cache(url, **arguments(**TWO_VIEWS))
    fill(writer, [(0, 0)])
    real = writer._storage.fs
    for at in 1, 2:  # the chunk's put, the marker's
        writer._storage.fs = Dropping(real, at, for_good=True)
        with pytest.raises(OSError, match="the connection was dropped"):
            fill(writer, [(0, 1)])
    cache = open_cache(url)
    assert cache.missing() == [(0, 1), (1, 0), (1, 1)]
    with create_cache(url, resume=True, **arguments(**TWO_VIEWS)) as writer:
        fill(writer)
    cache._storage.fs = Dropping(real, 2, for_good=True)
    with pytest.raises(CacheError, match="probability, view 0, rows .* cannot be read: the connection was dropped; check"):
        cache.plane(0)
    cache._storage.fs = real
    assert (cache.plane(0) == answers(0)).all()


def test_an_address_of_no_known_protocol_is_refused():
    pytest.importorskip("fsspec")
    with pytest.raises(CacheError, match="nowhere://x cannot be opened: .*nowhere; install what it needs, or choose another"):
        open_cache("nowhere://x")


@pytest.mark.parametrize("operation, said", [("pipe_file", "written"), ("ls", "listed")])
def test_a_bucket_that_may_not_be_used_is_refused_before_any_work(monkeypatch, operation, said):
    fsspec = pytest.importorskip("fsspec")

    def denied(*_, **__):
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), operation, denied)
    with pytest.raises(CacheError, match=f"cannot be {said}: Access Denied; choose another place"):
        create_cache(in_memory(), **arguments())


class Counting:
    """A filesystem that counts what is asked of it: requests, and how many keys were asked for at once."""

    def __init__(self, real):
        self._real, self.asked, self.together = real, [], 0

    def __getattr__(self, name):
        value = getattr(self._real, name)
        if name not in ("cat_file", "cat_ranges", "ls", "size"):
            return value

        def operation(paths, *positional, **options):
            asked = [paths] if isinstance(paths, str) else paths
            self.asked += [(name, path.rsplit("/", 1)[-1]) for path in asked]
            self.together = max(self.together, len(asked))
            return value(paths, *positional, **options)

        return operation


def test_what_a_store_is_takes_each_marker_once_and_all_at_once(two_blocks):
    url = in_memory()
    cache = dump(url)
    cache._storage.fs = counting = Counting(cache._storage.fs)
    assert cache.survey().nbytes == cache.nbytes
    counting.asked.clear()
    cache.survey()
    markers = [f"{view}.{block}" for view in range(18) for block in range(2)]
    listed = [("ls", "done"), ("ls", "probability")]
    assert counting.asked == listed + [("cat_ranges", name) for name in markers] and counting.together == 36
    counting.asked.clear()
    cache.summary()
    asked = [name for _, name in counting.asked if name in markers]
    assert len(asked) <= 36 + 2 * 12, "and those of the views that are looked into once more"


@pytest.mark.parametrize("data", [b"", b"{}", None])
def test_a_marker_that_is_empty_or_gone_elsewhere_is_named(data):
    pytest.importorskip("fsspec")
    url = in_memory()
    cache = dump(url, **TWO_VIEWS)
    if data is None:
        cache._storage.remove("done/1.0")
        assert cache._storage.read_several(["done/0.0", "done/1.0"], 10)[1] is None
        assert [len(found) for found in cache._storage.read_several(["done/0.0"], 10)] == [10]
    else:
        cache._storage.write("done/1.0", data)
        with pytest.raises(CorruptCacheError, match="the marker done/1.0 of .* is damaged"):
            cache.survey()


@pytest.mark.parametrize("inside", ["", "/deep/s"])
def test_a_store_in_an_archive_is_read_wherever_it_lies_there(tmp_path, inside):
    import zipfile

    pytest.importorskip("fsspec")
    dump(tmp_path / "s", **TWO_VIEWS)
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for key, data in files(tmp_path / "s").items():
            archive.writestr(f"{inside}/{key}".lstrip("/"), data)
    cache = open_cache(f"zip:/{inside or '/'}::{tmp_path}/s.zip" if inside else f"zip://::{tmp_path}/s.zip")
    assert cache.complete and cache.verify_checksums() == [] and (cache.plane(1) == answers(1)).all()


def test_a_store_behind_a_web_server_is_whole(tmp_path):
    """Whose listings say no sizes."""
    cache = dump(tmp_path / "s", **TWO_VIEWS)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = open_cache(f"http://127.0.0.1:{server.server_port}/s")
        assert (found.plane(1) == cache.plane(1)).all() and found.lost() == []
        found.refuse_incomplete()
        (tmp_path / "s/probability/c.1.0.0").write_bytes(b"short")
        assert found.lost() == [(1, 0)]
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("address", ["s3:/answers/c.zarr", Path("gs://answers/c.zarr")])
def test_an_address_with_one_slash_is_no_folder(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    for use in open_cache, lambda url: create_cache(url, **arguments()):
        with pytest.raises(
            CacheError, match=r"^(s3|gs):/answers/c.zarr is an address with one slash; write it as text, (s3|gs)://…"
        ):
            use(address)
    assert not list(tmp_path.iterdir())


def test_a_file_address_may_have_what_addresses_may_have(tmp_path):
    dump(tmp_path / "a b%c")
    for start in "file://", "file://localhost":
        assert open_cache(f"{start}{tmp_path}/a%20b%25c").complete
    dump(f"file://{tmp_path}/%C3%A9%20s", **TWO_VIEWS)
    assert (tmp_path / "é s/zarr.json").exists()


# other programs write into it


@pytest.mark.filterwarnings("ignore:Consolidated metadata", "ignore:Object at")
@pytest.mark.parametrize("encoding", ["logit", "klt"])
def test_consolidated_metadata_and_attributes_of_others_are_named_and_change_nothing(tmp_path, encoding):
    import zarr

    fit = {"fit": lambda views: np.stack([answers(view) for view in views])}
    given = {**TWO_VIEWS, "encoding": {"name": encoding}, **fit}
    url, array = tmp_path / "s", {"logit": "logit", "klt": "code"}[encoding]
    expected = dump(url, **given).plane(1)
    assert open_cache(url).additions == [] and "added_by_others" not in open_cache(url).summary()
    zarr.open_group(url, mode="r+").attrs["licence"] = "CC0"
    zarr.open_array(url / array, mode="r+").attrs["units"] = "nats"
    zarr.consolidate_metadata(url)
    cache = open_cache(url)
    assert cache.complete and cache.verify_checksums() == [] and (cache.plane(1) == expected).all()
    added = [f"{array}/zarr.json: attributes.units", "zarr.json: consolidated_metadata, attributes.licence"]
    assert sorted(cache.additions) == added == sorted(cache.summary()["added_by_others"])
    (url / "done/1.0").unlink()
    with create_cache(url, resume=True, **arguments(**given)) as writer:
        fill(writer)
    assert open_cache(url).complete


@pytest.mark.parametrize("path", [["identity", "classes", 0], ["identity", "temperature"], ["identity", "teacher", "digest"]])
def test_what_others_change_of_the_stores_own_is_damage(tmp_path, path):
    import json

    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    document = json.loads((url / "zarr.json").read_text())
    document["attributes"]["licence"], at = "CC0", document["attributes"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = 1.5 if path[-1] == "temperature" else "pear"
    (url / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(CorruptCacheError, match="zarr.json is damaged: its checksum does not match; restore it from a copy"):
        open_cache(url)
