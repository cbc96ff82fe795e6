"""A store opens in other readers of Zarr, and lives on object stores as well as in a folder."""

import os
import socket
import threading
import uuid

import numpy as np
import pytest
import tiny
from cache_store import CLASSES, answers, arguments, dump, files, fill, identity

from offline_bkd.cache import CacheError, CorruptCacheError, CropFlip, create_cache, format, open_cache, storage

TWO_VIEWS = {"identity": identity(views=CropFlip(pad=0))}


@pytest.fixture
def two_blocks(monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 180 * 5 * 4)


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


# object stores


@pytest.fixture(scope="module")
def bucket():
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("answers")
    yield "s3://answers"
    running.stop()
    patch.undo()
    s3fs.S3FileSystem.clear_instance_cache()


def remote(bucket, kind):
    return f"{bucket}/{uuid.uuid4().hex}" if kind == "s3" else f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_a_store_on_an_object_store_is_written_resumed_and_read(request, two_blocks, kind):
    pytest.importorskip("fsspec")
    url = remote(request.getfixturevalue("bucket") if kind == "s3" else None, kind)
    with create_cache(url, **arguments(**TWO_VIEWS)) as writer:
        fill(writer, [(0, 0), (1, 1)])
    with pytest.raises(CacheError, match="is not empty; resume the dump"):
        create_cache(url, **arguments(**TWO_VIEWS))
    assert open_cache(url).missing() == [(0, 1), (1, 0)]
    with create_cache(url, resume=True, **arguments(**TWO_VIEWS)) as writer:
        assert writer.pending() == [(0, 1), (1, 0)]
        fill(writer)
    cache = open_cache(url)
    assert cache.complete and cache.verify_checksums() == []
    assert all((cache.plane(view) == answers(view)).all() for view in range(2))
    assert len(cache.to_pandas(view=1)) == 360 and cache.nbytes > 2 * 360 * 5 * 4


@pytest.mark.parametrize("kind", ["folder", "s3", "memory"])
def test_what_is_removed_is_gone(request, tmp_path, kind):
    bucket = request.getfixturevalue("bucket") if kind == "s3" else None
    place = storage.open_storage(tmp_path if kind == "folder" else remote(bucket, kind))
    place.write("done/0.1", b"a"), place.write("done/0.2", b"b")
    place.remove("done/0.1")
    assert place.names("done") == ["0.2"] and place.read("done/0.1") is None and bytes(place.read("done/0.2")) == b"b"


def test_the_bytes_on_an_object_store_are_those_in_a_folder(bucket, tmp_path, two_blocks):
    import s3fs

    url = remote(bucket, "s3")
    dump(tmp_path / "s", **TWO_VIEWS), dump(url, **TWO_VIEWS)
    fs = s3fs.S3FileSystem()
    for key in "zarr.json", "done/store", "done/1.1", "probability/c.1.1.0":
        assert fs.cat_file(f"{url}/{key}") == (tmp_path / "s" / key).read_bytes()


def test_damage_on_an_object_store_is_found(bucket, two_blocks):
    import s3fs

    url = remote(bucket, "s3")
    dump(url, **TWO_VIEWS)
    fs = s3fs.S3FileSystem()
    data = bytearray(fs.cat_file(f"{url}/probability/c.0.1.0"))
    data[50] ^= 1
    fs.pipe_file(f"{url}/probability/c.0.1.0", bytes(data))
    with pytest.raises(CorruptCacheError, match="view 0, rows 180 to 359 is damaged"):
        open_cache(url).plane(0)
    fs.rm_file(f"{url}/probability/c.0.1.0")
    with pytest.raises(CorruptCacheError, match="view 0, rows 180 to 359 is missing, though it was written"):
        open_cache(url).plane(0)


class Proxy:
    """A port that forwards to a server, and cuts every connection, in the middle of an answer, while `broken`."""

    def __init__(self, server):
        self.server, self.broken, self.cut = server, False, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            for source, sink in (client, server), (server, client):
                threading.Thread(target=self._forward, args=(source, sink, source is server), daemon=True).start()

    def _forward(self, source, sink, answering):
        try:
            while data := source.recv(1 << 16):
                if self.broken and answering:
                    self.cut += 1
                    sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in source, sink:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def test_a_connection_that_drops_is_one_line_and_what_is_committed_stays(bucket, two_blocks, monkeypatch):
    import s3fs

    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    proxy = Proxy((host, int(port)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    url = remote(bucket, "s3")
    with create_cache(url, **arguments(**TWO_VIEWS)) as writer:
        fill(writer, [(0, 0), (0, 1)])
        proxy.broken = True
        with pytest.raises(OSError):
            fill(writer, [(1, 0)])
        with pytest.raises(CacheError, match="cannot be read"):
            open_cache(url)
        assert proxy.cut > 0
        proxy.broken = False
        cache = open_cache(url)
        assert (cache.plane(0) == answers(0)).all()
        fill(writer, writer.pending())
    assert cache.complete and cache.verify_checksums() == []
    proxy.socket.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def unreachable(bucket, monkeypatch):
    """An address on an object store that nothing answers for."""
    import s3fs

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield "s3://answers/cache.zarr"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("command", ["inspect", "verify", "export", "train-student"])
def test_an_address_that_cannot_be_reached_is_refused_in_one_line(unreachable, teacher_run, tmp_path, capsys, command):
    from offline_bkd import cli

    run = {
        "inspect": [unreachable],
        "verify": [unreachable, "--teacher", str(teacher_run)],
        "export": [unreachable, "--out", str(tmp_path / "t.parquet")],
        "train-student": [*tiny.options(), "--cache", unreachable, "--out", str(tmp_path / "s")],
    }[command]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *run])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {unreachable} cannot be read: Could not connect")
    assert said.count("\n") == 1 and said.count(unreachable) == 1 and "check the address" in said
    with pytest.raises(CacheError, match=f"^{unreachable} cannot be listed: Could not connect .*choose another place"):
        create_cache(unreachable, **arguments())
    assert not list(tmp_path.iterdir())


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
    url = remote(None, "memory")
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
        create_cache(remote(None, "memory"), **arguments())


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
    url = remote(None, "memory")
    cache = dump(url)
    cache._storage.fs = counting = Counting(cache._storage.fs)
    assert cache.survey().nbytes == cache.nbytes
    counting.asked.clear()
    cache.survey()
    markers = [f"{view}.{block}" for view in range(18) for block in range(2)]
    assert counting.asked == [("ls", "done"), *(("cat_ranges", name) for name in markers)] and counting.together == 36
    counting.asked.clear()
    cache.summary()
    asked = [name for _, name in counting.asked if name in markers]
    assert len(asked) <= 36 + 2 * 12, "and those of the views that are looked into once more"


@pytest.mark.parametrize("data", [b"", b"{}", None])
def test_a_marker_that_is_empty_or_gone_elsewhere_is_named(data):
    pytest.importorskip("fsspec")
    url = remote(None, "memory")
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
