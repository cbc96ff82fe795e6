"""A store on an object store: one writer a block, connections that fail, and what cannot be reached."""

import logging
import multiprocessing
import os
import socket
import threading
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
import tiny
from cache_store import TWO_VIEWS, answers, arguments, dump, fill
from google_store import GoogleStore

from offline_bkd.cache import (
    CacheError,
    CorruptCacheError,
    create_cache,
    object_storage,
    open_cache,
    storage,
    writer,
)
from offline_bkd.pipeline import guard


@pytest.fixture(scope="module")
def bucket():
    server, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    pytest.importorskip("obstore")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
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
    moment = timedelta(milliseconds=1)
    backoff = {"init_backoff": moment, "max_backoff": 5 * moment, "base": 2}
    patch.setattr(object_storage, "RETRIES", {"max_retries": 3, "retry_timeout": timedelta(seconds=20), "backoff": backoff})
    boto3.client("s3").create_bucket(Bucket="answers")
    yield "s3://answers"
    running.stop()
    patch.undo()


def s3():
    """Another library's client of the same server."""
    import boto3

    return boto3.resource("s3").Bucket("answers")


def object_at(url, key):
    return s3().Object(f"{url.removeprefix('s3://answers/')}/{key}")


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
    place = storage.open_storage(url)
    assert sorted(place.keys("done")) == [f"done/{name}" for name in place.names("done")]
    assert {"zarr.json", "label/zarr.json", "probability/c.1.0.0"} <= set(place.keys())


@pytest.mark.parametrize("kind", ["folder", "s3", "memory"])
def test_what_is_removed_is_gone(request, tmp_path, kind):
    bucket = request.getfixturevalue("bucket") if kind == "s3" else None
    place = storage.open_storage(tmp_path if kind == "folder" else remote(bucket, kind))
    place.write("done/0.1", b"a"), place.write("done/0.2", b"b")
    place.remove("done/0.1")
    assert place.names("done") == ["0.2"] and place.read("done/0.1") is None and bytes(place.read("done/0.2")) == b"b"


def test_the_bytes_on_an_object_store_are_those_in_a_folder(bucket, tmp_path, two_blocks):
    url = remote(bucket, "s3")
    dump(tmp_path / "s", **TWO_VIEWS), dump(url, **TWO_VIEWS)
    place = url.removeprefix("s3://answers/")
    keys = {entry.key.removeprefix(f"{place}/") for entry in s3().objects.filter(Prefix=place)}
    local = {str(path.relative_to(tmp_path / "s")) for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert keys == local - {"done/lock"}
    for key in keys:
        assert object_at(url, key).get()["Body"].read() == (tmp_path / "s" / key).read_bytes()


def test_damage_on_an_object_store_is_found(bucket, two_blocks):
    url = remote(bucket, "s3")
    dump(url, **TWO_VIEWS)
    chunk = object_at(url, "probability/c.0.1.0")
    data = bytearray(chunk.get()["Body"].read())
    data[50] ^= 1
    chunk.put(Body=bytes(data))
    with pytest.raises(CorruptCacheError, match="view 0, rows 180 to 359 is damaged"):
        open_cache(url).plane(0)
    chunk.delete()
    with pytest.raises(CorruptCacheError, match="view 0, rows 180 to 359 is missing, though it was written"):
        open_cache(url).plane(0)
    assert open_cache(url).lost() == [(0, 1)], "which --resume writes again"


def test_an_address_is_taken_literally(bucket):
    url = f"{bucket}/é a%20b+c/{uuid.uuid4().hex}"
    dump(url, **TWO_VIEWS)
    assert open_cache(url).complete and object_at(url, "zarr.json").content_length > 0


def test_without_a_signature_where_the_environment_says_so(bucket, monkeypatch):
    url = remote(bucket, "s3")
    storage.open_storage(url).write("a", b"1")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(PermissionError, match=f"the server answered 403 Forbidden: '{url}'"):
        storage.open_storage(url).read("a")
    object_at(url, "a").Acl().put(ACL="public-read")
    assert bytes(storage.open_storage(url).read("a")) == b"1"


# one writer


def test_an_object_store_has_one_writer_a_block(bucket, two_blocks):
    url = remote(bucket, "s3")
    with create_cache(url, joint=True, **arguments(**TWO_VIEWS)) as first:
        first.take([(0, 0), (1, 0)])
        with pytest.raises(CacheError, match=f"^another process is writing {url}; wait for it, or end it and wait 120 s$"):
            create_cache(url, resume=True, **arguments(**TWO_VIEWS))
        with create_cache(url, resume=True, joint=True, **arguments(**TWO_VIEWS)) as second:
            second.take([(0, 1), (1, 1)])
            fill(second)
        fill(first)
    cache = open_cache(url)
    assert cache.complete and cache.verify_checksums() == []
    create_cache(url, resume=True, **arguments(**TWO_VIEWS)).close()
    assert storage.open_storage(url).names("done/locks") == [], "what a writer held is given back"


def test_parts_that_begin_at_once_on_an_object_store_create_it_once(bucket, two_blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_WAIT", 0.01)
    url, create, created = remote(bucket, "s3"), writer._create, []
    monkeypatch.setattr(writer, "_create", lambda *given: [created.append(given), create(*given)])

    def write(part):
        with create_cache(url, resume=True, joint=True, **arguments()) as mine:
            mine.take(mine.cache.parts(3)[part])
            fill(mine)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write, range(3)))
    assert len(created) == 1 and open_cache(url).complete
    assert storage.open_storage(url).names("done/locks") == []


def test_of_writers_that_begin_at_once_just_one_goes_on(bucket):
    place = remote(bucket, "s3")

    def begin(_):
        try:
            return storage.open_storage(place).lock("done/lock", [range(2)])
        except BlockingIOError:
            return None

    with ThreadPoolExecutor(8) as threads:
        leases = list(threads.map(begin, range(8)))
    assert sum(lease is not None for lease in leases) == 1


def test_a_lease_that_is_not_renewed_is_taken_over_and_its_writer_refused(bucket, two_blocks, monkeypatch):
    url = remote(bucket, "s3")
    lost = create_cache(url, **arguments(**TWO_VIEWS))
    fill(lost, [(0, 0)])
    lost._lock._held._renewed -= 60  # as if it had slept
    with monkeypatch.context() as patch:
        patch.setattr(object_storage, "LEASE", -1)  # every other's has ended
        writer = create_cache(url, resume=True, **arguments(**TWO_VIEWS))
    with writer:
        with pytest.raises(OSError, match="another process took over"):
            fill(lost, [(0, 1)])
        assert writer.pending() == [(0, 1), (1, 0), (1, 1)], "nothing of it is written"
        lost.close()
        assert len(storage.open_storage(url).names("done/locks")) == 1
        fill(writer)
    assert open_cache(url).verify_checksums() == []


def test_a_lease_is_renewed_while_its_writer_lives_and_given_back_with_it(bucket, monkeypatch):
    monkeypatch.setattr(object_storage, "LEASE", 0.1)
    place = storage.open_storage(remote(bucket, "s3"))
    lease = place.lock("done/lock", [range(3)])
    (name,) = place.names("done/locks")
    first = bytes(place.read(f"done/locks/{name}"))
    deadline = time.monotonic() + 10
    while bytes(place.read(f"done/locks/{name}")) == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bytes(place.read(f"done/locks/{name}")) != first
    del lease
    assert place.names("done/locks") == []


def test_of_a_renewal_and_a_takeover_only_one_happens(bucket):
    client = object_storage.Client(remote(bucket, "s3"))
    seen = client.ask(lambda store: store.put("lease", b"1"))
    renewed = client.replace("lease", b"2", seen)
    with pytest.raises(FileNotFoundError):
        client.replace("lease", b"3", seen)
    assert object_at(client.url, "lease").get()["Body"].read() == b"2"
    object_at(client.url, "lease").delete()
    with pytest.raises(FileNotFoundError):
        client.replace("lease", b"3", renewed)


def test_a_renewal_that_was_carried_out_though_it_seemed_to_fail_loses_nothing(bucket, monkeypatch):
    with proxied(monkeypatch) as proxy:
        place = storage.open_storage(remote(bucket, "s3"))
        lease = place.lock("done/lock", [range(1)])
        proxy.break_next("500", 1)
        lease._held.renew()
        assert proxy.broke == 1
        lease.keep(), lease._held.renew(), lease.keep()
        lease.close()


@pytest.mark.parametrize("fault", ["dropped", "500", "cut short"])
def test_a_first_put_that_was_carried_out_though_it_seemed_to_fail_holds(bucket, monkeypatch, fault):
    with proxied(monkeypatch) as proxy:
        place = storage.open_storage(remote(bucket, "s3"))
        proxy.break_next(fault, 1)
        lease = place.lock("done/lock", [range(1)])
        assert proxy.broke == 1 and len(place.names("done/locks")) == 1
        lease.keep(), lease.close()


@pytest.fixture
def google(monkeypatch):
    pytest.importorskip("obstore")
    server = GoogleStore()
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", server.account)
    monkeypatch.setattr(object_storage, "RETRIES", {"max_retries": 3, "retry_timeout": timedelta(seconds=20)})
    yield server
    server.shutdown(), server.server_close()


def test_on_google_cloud_a_store_is_written_and_read(google, two_blocks):
    cache = dump("gs://bucket/deep/s", **TWO_VIEWS)
    assert cache.complete and cache.verify_checksums() == [] and (cache.plane(1) == answers(1)).all()


def test_on_google_cloud_a_lease_is_renewed_kept_from_others_and_taken_over(google):
    url, key = "gs://bucket/s", "done/lock"
    google.lost_answers = 1
    lease = storage.open_storage(url).lock(key, [range(2)])
    lease._held.renew(), lease.keep()
    with pytest.raises(BlockingIOError, match="wait for it"):
        storage.open_storage(url).lock(key, [range(1, 3)])
    lease._held._ended.set()  # its process is killed
    ((held, (data, generation, written)),) = google.objects.items()
    google.objects[held] = data, generation, written - 2 * object_storage.LEASE
    other = storage.open_storage(url).lock(key, [range(1, 3)])
    assert len(google.objects) == 1 and held not in google.objects
    lease._held._renewed = 0  # so that it looks again
    with pytest.raises(OSError, match="another process took over"):
        lease.keep()
    other.keep(), other.close()
    assert not google.objects


def test_a_process_that_was_forked_is_told_so_rather_than_left_waiting(bucket):
    place = storage.open_storage(remote(bucket, "s3"))
    place.write("a", b"1")

    def read(sink):
        try:
            storage.open_storage(str(place)).read("a")
        except OSError as error:
            sink.send(error.strerror)

    ours, theirs = multiprocessing.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads
        child = multiprocessing.get_context("fork").Process(target=read, args=(theirs,), daemon=True)
        child.start()
    said = ours.recv() if ours.poll(20) else "nothing"
    child.kill(), child.join()
    assert said.endswith("start processes anew (spawn)")


# connections that fail


class Proxy:
    """A port that forwards to a server, and breaks its answers in one of several ways."""

    STATUS = {"500": b"500 Internal Server Error", "503": b"503 Service Unavailable"}

    def __init__(self, server):
        self.server, self.fault, self.left, self.broke = server, None, 0, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def break_next(self, fault, times=float("inf")):
        self.fault, self.left, self.broke = fault, times, 0

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
                if answering and self.left > 0:
                    self.left, self.broke = self.left - 1, self.broke + 1
                    if self.fault == "slowed":
                        for start in range(0, len(data), 200):
                            sink.sendall(data[start : start + 200])
                            time.sleep(0.001)
                        continue
                    if self.fault == "cut short":
                        sink.sendall(data[:-1])
                    elif self.fault in self.STATUS:
                        sink.sendall(
                            b"HTTP/1.1 " + self.STATUS[self.fault] + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                        )
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in source, sink:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@contextmanager
def proxied(monkeypatch):
    """The environment's object store, behind a proxy."""
    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    proxy = Proxy((host, int(port)))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy
    proxy.socket.close()


FAULTS = {
    "dropped": "error sending request",
    "cut short": "error sending request|body",
    "500": "the server answered 500 Internal Server Error",
    "503": "the server answered 503 Service Unavailable",
}


@pytest.mark.parametrize("fault", [*FAULTS, "slowed"])
def test_what_fails_for_a_moment_is_asked_for_again(bucket, two_blocks, monkeypatch, fault):
    with proxied(monkeypatch) as proxy:
        url = remote(bucket, "s3")
        with create_cache(url, **arguments(**TWO_VIEWS)) as writer:
            proxy.break_next(fault, 2)
            fill(writer, [(0, 0), (0, 1)])
            assert proxy.broke == 2
            proxy.break_next(fault, 2)
            cache = open_cache(url)
            assert proxy.broke == 2
            proxy.break_next(fault, 2)
            assert (cache.plane(0) == answers(0)).all() and proxy.broke == 2
            fill(writer)
    assert open_cache(url).verify_checksums() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_connection_that_is_lost_is_one_line_and_what_is_committed_stays(bucket, two_blocks, monkeypatch, fault):
    with proxied(monkeypatch) as proxy:
        url = remote(bucket, "s3")
        with create_cache(url, **arguments(**TWO_VIEWS)) as writer:
            fill(writer, [(0, 0), (0, 1)])
            cache = open_cache(url)
            proxy.break_next(fault)
            with pytest.raises(OSError, match=FAULTS[fault]) as stop:
                fill(writer, [(1, 0)])
            assert url in str(stop.value) and "\n" not in str(stop.value)
            assert guard.explained(stop.value)[1] == 1
            for read, code in (lambda: open_cache(url), 2), (lambda: cache.plane(0), 1):
                with pytest.raises(CacheError, match=f"^{url}.* cannot be read: .*({FAULTS[fault]}).*; check the ad") as stop:
                    read()
                assert "\n" not in str(stop.value) and guard.explained(stop.value)[1] == code
            assert proxy.broke > 0
            proxy.break_next(None, 0)
            assert (cache.plane(0) == answers(0)).all()
            fill(writer, writer.pending())
        assert cache.complete and cache.verify_checksums() == []


@pytest.fixture
def unreachable(bucket, monkeypatch):
    """An address on an object store that nothing answers for."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    return "s3://answers/cache.zarr"


def test_a_bucket_that_is_not_there_is_refused_in_one_line(bucket):
    with pytest.raises(CacheError, match="^s3://none/x cannot be read: The specified bucket does not exist; check"):
        open_cache("s3://none/x")
    with pytest.raises(CacheError, match="^s3://none/x cannot be listed: The specified bucket does not exist; choose another"):
        create_cache("s3://none/x", **arguments())
    with pytest.raises(CacheError, match="^s3://none/x cannot be listed: The specified bucket does not exist; choose another"):
        create_cache("s3://none/x", resume=True, **arguments())
    for ask in storage.open_storage("s3://none/x").read, lambda key: storage.open_storage("s3://none/x").write(key, b""):
        with pytest.raises(OSError, match=r"^\[Errno 5\] The specified bucket does not exist: 's3://none/x'$"):
            ask("a")  # which is not that there is no such object
    with pytest.raises(CacheError, match="^s3:///x cannot be opened: it names no bucket; write it as s3://bucket/cache.zarr"):
        open_cache("s3:///x")


def test_a_bucket_that_may_not_be_read_or_written_is_refused_in_one_line(bucket, monkeypatch):
    monkeypatch.setitem(Proxy.STATUS, "403", b"403 Forbidden")
    url = remote(bucket, "s3")
    with proxied(monkeypatch) as proxy:
        proxy.break_next("403")
        with pytest.raises(CacheError, match=f"^{url} cannot be read: the server answered 403 Forbidden; check the address"):
            open_cache(url)
        with pytest.raises(CacheError, match=f"^{url} cannot be listed: the server answered 403 Forbidden; choose another"):
            create_cache(url, **arguments())


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_object_stores_are_reached_by_the_same_library(monkeypatch, scheme):
    pytest.importorskip("obstore")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    place = storage.open_storage(f"{scheme}://bucket/deep/s")
    reached = place._client.ask(lambda store: store)
    assert reached.prefix == "deep/s" and "bucket" in reached.config.values()


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
    assert stop.value.code == 2 and said.startswith(
        f"error: {unreachable} cannot be read: error sending request: Connection refused;"
    )
    assert said.count("\n") == 1 and said.count(unreachable) == 1 and "check the address" in said
    with pytest.raises(CacheError, match=f"^{unreachable} cannot be listed: .*refused; choose another place"):
        create_cache(unreachable, **arguments())
    assert not list(tmp_path.iterdir())
