"""A store survives: killed at any moment, on a full disk, and with damage anywhere, it never gives wrong answers."""

import builtins
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cache_store import TWO_VIEWS, answers, arguments, dump, files, fill, flip, flips, identity, problems

from offline_bkd.cache import CacheError, CorruptCacheError, CropFlip, create_cache, format, open_cache, storage


class Killed(BaseException):
    """Ends the dump where it is raised. No clean-up of the code under test catches it, as none survives a kill."""


class Faults:
    """Stands between the storage and the disk: counts its operations and stops at the one numbered `at`."""

    def __init__(self, monkeypatch, at=None, fault=None):
        self.at, self.fault, self.log = at, fault, []
        monkeypatch.setattr(storage, "open", self._open, raising=False)
        for name in "replace", "fsync", "mkdir", "link":
            monkeypatch.setattr(storage.os, name, self._wrap(name, getattr(os, name)))

    def _step(self, *what):
        self.log.append(what)
        if len(self.log) - 1 == self.at:
            raise self.fault if self.fault is not None else Killed()

    def _wrap(self, name, real):
        def operation(first, *rest, **options):
            self._step(name, os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first), *map(str, rest))
            return real(first, *rest, **options)

        return operation

    def _open(self, path, mode="r", **options):
        if mode == "xb":
            self._step("open", str(path))
        file = builtins.open(path, mode, **options)
        if mode == "xb":
            write = file.write
            file = _File(file, lambda data: self._write(path, write, data))
        return file

    def _write(self, path, write, data):
        data = bytes(data)
        write(data[: len(data) // 2])  # torn: half of it arrives
        self._step("write", str(path))
        write(data[len(data) // 2 :])


class _File:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def dump_two(url):
    with create_cache(url, **arguments(**TWO_VIEWS)) as writer:
        fill(writer)


def finish(url):
    """Resume; returns the number of blocks that were written."""
    with create_cache(url, resume=True, **arguments(**TWO_VIEWS)) as writer:
        pending = writer.pending()
        fill(writer)
    return len(pending)


def test_killed_at_every_operation_it_resumes_to_the_same_bytes_and_redoes_one_block(tmp_path, two_blocks):
    dump_two(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        log = Faults(patch).log
        dump_two(tmp_path / "counted")
    whole = files(tmp_path / "whole")
    assert len(log) > 80 and {name for name, *_ in log} == {"open", "write", "fsync", "replace", "mkdir"}
    for at in range(len(log)):
        url = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Faults(patch, at)
            dump_two(url)
        markers = [name for name in storage.LocalStorage(url).names("done") if name[0].isdigit()]
        if (url / "done/store").exists():
            for view, block in {(0, 0), (0, 1), (1, 0), (1, 1)} - set(open_cache(url).missing()):
                rows = slice(block * 180, block * 180 + 180)
                assert (open_cache(url).stored_block(view, block) == answers(view)[rows]).all()
        assert finish(url) == 4 - len(markers)
        assert files(url) == whole


def test_everything_is_synced_before_its_marker_appears(tmp_path, monkeypatch, two_blocks):
    log = Faults(monkeypatch).log
    dump_two(tmp_path / "s")
    synced = set()
    for name, path, *_ in log:
        if name == "fsync":
            synced.add(path)
        elif name in ("write", "open"):
            synced.discard(path)
        elif name == "replace":
            assert path in synced, f"{path} is renamed before it is synced"
            if "/done/" in path and "/done/zarr.json." not in path:
                assert str(tmp_path / "s/probability") in synced, f"{path} appears before its chunks are safe"
            synced.discard(os.path.dirname(path))
        elif name == "mkdir":
            synced.discard(os.path.dirname(path))
    assert {str(tmp_path), str(tmp_path / "s"), str(tmp_path / "s/done"), str(tmp_path / "s/probability")} <= synced


KILLS = """
import glob, os, random, signal, sys, time
sys.path[:0] = {paths!r}
from cache_store import arguments, fill
from offline_bkd.cache import create_cache, format
format._CHUNK_BYTES = 60 * 5 * 4
url, kills = sys.argv[1], int(sys.argv[2])
random.seed(0)
found = set()
for kill in range(kills):
    progress, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with create_cache(url, resume=True, **arguments()) as writer:
            for block in writer.pending():
                os.write(tells, b"!")
                fill(writer, [block])
        os._exit(0)
    os.close(tells)
    for _ in range(kill % 4):  # so many blocks are begun, none in every fourth time
        os.read(progress, 1)
    time.sleep(random.uniform(0, 0.003))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(progress)
    found.add(len(glob.glob(url + "/done/[0-9]*")))
print(len(found))
with create_cache(url, resume=True, **arguments()) as writer:
    fill(writer)
"""


def test_killed_at_60_random_moments_it_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 60 * 5 * 4)
    dump(tmp_path / "whole")
    script = KILLS.format(paths=[str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", script, str(tmp_path / "s"), "60"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(run.stdout) >= 10, "kills landed between blocks"
    assert files(tmp_path / "s") == files(tmp_path / "whole")


# errors of the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_is_reported_and_what_is_committed_stays(tmp_path, two_blocks, code, operation):
    url = tmp_path / "s"
    writer = create_cache(url, **arguments(**TWO_VIEWS))
    fill(writer, [(0, 0), (0, 1)])
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        fill(writer, [(1, 0)])
        at = [name for name, *_ in faults.log].index(operation)
    (url / "done/1.0").unlink()
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, at, OSError(code, os.strerror(code)))
        with pytest.raises(OSError, match=os.strerror(code)):
            fill(writer, [(1, 0)])
    writer.close()
    assert not list(url.rglob("*.partial"))
    cache = open_cache(url)
    assert (cache.plane(0) == answers(0)).all() and cache.missing() == [(1, 0), (1, 1)]
    assert finish(url) == 2 and (open_cache(url).plane(1) == answers(1)).all()


def test_what_a_killed_dump_left_of_its_own_blocks_is_taken_away(tmp_path, two_blocks):
    url, given = tmp_path / "s", arguments(**TWO_VIEWS)
    create_cache(url, **given).close()
    mine = ["probability/c.1.0.0.0123456789abcdef.partial", "done/1.0.aaaaaaaaaaaaaaaa.partial"]
    others = ["probability/c.1.1.0.0123456789abcdef.partial", "done/0.1.fedcba9876543210.partial"]
    for name in (*mine, *others):
        (url / name).write_text("half")
    with create_cache(url, resume=True, joint=True, **given) as writer:
        writer.take([(0, 0), (1, 0)])
    assert sorted(str(path.relative_to(url)) for path in url.rglob("*.partial")) == sorted(others)
    assert finish(url) == 4 and not list(url.rglob("*.partial"))


def test_another_program_s_half_written_file_beside_a_new_store_stays(tmp_path, two_blocks):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "film.mkv.partial").write_text("half of it")
    create_cache(tmp_path / "s", **arguments(**TWO_VIEWS)).close()
    assert finish(tmp_path / "s") == 4 and (tmp_path / "s" / "film.mkv.partial").read_text() == "half of it"


def test_a_write_follows_no_link_and_shares_its_partial_file_with_none(tmp_path, two_blocks, monkeypatch):
    kept = tmp_path / "kept"
    kept.write_text("mine")
    place = storage.LocalStorage(tmp_path / "s")
    (tmp_path / "s/done").mkdir(parents=True)
    for name in "0.0.partial", "0.0":
        (tmp_path / "s/done" / name).symlink_to(kept)
    with pytest.MonkeyPatch.context() as patch:
        log = Faults(patch).log
        place.write("done/0.0", b"a"), place.write("done/0.0", b"b")
    assert len({path for name, path, *_ in log if name == "open"}) == 2
    assert kept.read_text() == "mine" and bytes(place.read("done/0.0")) == b"b" and place.names("done") == ["0.0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.secrets, "token_hex", lambda _: "0" * 16)
        (tmp_path / "s/done/0.1.0000000000000000.partial").symlink_to(kept)
        with pytest.raises(FileExistsError):
            place.write("done/0.1", b"c")
    assert kept.read_text() == "mine"


def test_what_is_complete_is_resumed_where_nothing_can_be_written(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "done/lock")

    dump_two(tmp_path / "s")
    monkeypatch.setattr(storage.LocalStorage, "lock", read_only)
    assert finish(tmp_path / "s") == 0
    (tmp_path / "s/done/1.0").unlink()
    with pytest.raises(CacheError, match=r"s cannot be written: Read-only file system \(done/lock\); choose another place"):
        finish(tmp_path / "s")


@pytest.mark.parametrize("what", ["chunk", "marker", "folder"])
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, what):
    dump_two(tmp_path / "s")
    cache, name = open_cache(tmp_path / "s"), {"chunk": "c.1.0.0", "marker": "1.0", "folder": "done"}[what]

    def denied(real):
        def operation(path, *rest, **options):
            if Path(path).name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *rest, **options)

        return operation

    monkeypatch.setattr(storage, "open", denied(open), raising=False)
    monkeypatch.setattr(storage.os, "listdir", denied(os.listdir))
    message = f"cannot be read: Permission denied .*{name}.; check the address, the connection and what you may read"
    for read in (lambda: cache.missing(),) if what == "folder" else (lambda: cache.plane(1), cache.summary):
        with pytest.raises(CacheError, match=message):
            read()
    if what != "folder":
        assert len(cache.verify_checksums()) == 1 and (cache.plane(0) == answers(0)).all()


@pytest.mark.parametrize("key", ["zarr.json", "done/store", "sample_id/c.0", "done/1.0", "probability/c.1.0.0", "done/lock"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, key):
    url = tmp_path / "s"
    dump_two(url)
    (url / "done/0.0").unlink()
    (url / key).unlink()
    os.mkfifo(url / key)
    if key == "done/lock":
        with pytest.raises(CacheError, match="cannot be written: No such device or address"):
            finish(url)
    else:
        with pytest.raises(CacheError, match="it is no regular file|damaged"):
            open_cache(url).plane(1)


def test_a_file_that_cannot_be_made_is_named_and_not_its_partial_one():
    with pytest.raises(FileNotFoundError, match="No such file or directory: '/proc/self/s'$"):
        with storage.new_file(Path("/proc/self/s")):  # where not even root makes files
            pass


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    if os.geteuid() == 0:
        target = Path("/proc/self/s")  # where not even root makes folders
    else:
        (tmp_path / "s").mkdir(mode=0o500)
        target = tmp_path / "s/s"
    with pytest.raises(CacheError, match=f"{target} cannot be written: .*; choose another place"):
        create_cache(target, **arguments())
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file is a file; name a folder"):
        create_cache(tmp_path / "file", **arguments())


# damage


def test_a_thousand_flipped_bits_are_all_found(tmp_path, two_blocks):
    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    assert problems(url) == []
    for place in flips(url, 1000):
        assert problems(url), place
    assert problems(url) == []


def test_a_flipped_bit_is_never_read_as_data_and_names_array_view_and_rows(tmp_path, two_blocks):
    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    flip(url / "probability/c.1.1.0", 100, 3)
    message = "probability, view 1, rows 180 to 359 is damaged: .*; delete its marker done/1.1 and resume the dump"
    with pytest.raises(CorruptCacheError, match=message):
        open_cache(url).plane(1)
    assert (open_cache(url).plane(0) == answers(0)).all()
    (url / "done/1.1").unlink()  # what the message says to do
    assert finish(url) == 1 and (open_cache(url).plane(1) == answers(1)).all()


@pytest.mark.parametrize("left", [0, 1, 3, 4, 1000])
def test_a_truncated_chunk_is_named(tmp_path, two_blocks, left):
    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    os.truncate(url / "probability/c.0.1.0", left)
    with pytest.raises(CorruptCacheError, match=f"view 0, rows 180 to 359 is damaged: it has {left} bytes of 3604"):
        open_cache(url).plane(0)


def test_every_truncated_or_missing_file_is_found(tmp_path, two_blocks):
    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    for key, data in files(url).items():
        path = url / key
        path.write_bytes(data[:-1])
        if key.endswith("zarr.json"):  # which lacks a newline now, and says the same
            assert problems(url) == [] and open_cache(url).additions == [f"{key}: other bytes, the same values"]
            path.write_bytes(data[:-2])
        assert problems(url), f"{key} truncated"
        path.unlink()
        missing = problems(url) or (not open_cache(url).complete)
        assert missing, f"{key} missing"
        path.write_bytes(data)
    assert problems(url) == []


def test_a_missing_chunk_is_named(tmp_path):
    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    (url / "probability/c.1.0.0").unlink()
    with pytest.raises(CorruptCacheError, match="view 1, rows 0 to 359 is missing, though it was written"):
        open_cache(url).plane(1)


def test_a_chunk_or_marker_in_anothers_place_is_found(tmp_path):
    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    first, second = url / "probability/c.0.0.0", url / "probability/c.1.0.0"
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptCacheError, match="view 0, rows 0 to 359 is damaged: it is not the chunk that was writ"):
        open_cache(url).plane(0)
    first.write_bytes(whole)
    (url / "done/0.0").write_bytes((url / "done/1.0").read_bytes())
    with pytest.raises(CorruptCacheError, match="the marker done/0.0 of .* is another block's"):
        open_cache(url).plane(0)


def test_a_block_of_another_teachers_store_is_found(tmp_path):
    dump(tmp_path / "a", **TWO_VIEWS)
    dump(tmp_path / "b", **{"identity": identity(views=CropFlip(pad=0), teacher={"digest": "another"})})
    for key in "done/1.0", "probability/c.1.0.0":
        (tmp_path / "a" / key).write_bytes((tmp_path / "b" / key).read_bytes())
    with pytest.raises(CorruptCacheError, match="the marker done/1.0 of .* is another block's or store's"):
        open_cache(tmp_path / "a").plane(1)


def test_resuming_never_takes_blocks_for_its_own_that_it_does_not_know(tmp_path):
    dump(tmp_path / "s")
    (tmp_path / "s/done/store").unlink()
    with pytest.raises(CorruptCacheError, match="has blocks but no done/store; restore that, or choose another folder"):
        create_cache(tmp_path / "s", resume=True, **arguments(identity=identity(teacher={"digest": "another"})))


def test_a_damaged_marker_is_named(tmp_path):
    url = tmp_path / "s"
    dump(url, **TWO_VIEWS)
    for damage in b"", b"[]", b'{"files": NaN}', (url / "done/0.0").read_bytes().replace(b"360", b"361"):
        (url / "done/1.0").write_bytes(damage)
        with pytest.raises(CorruptCacheError, match="the marker done/1.0 of .*view 1, rows 0 to 359 is damaged"):
            open_cache(url).plane(1)


# two dumps


def test_two_dumps_into_one_folder_one_is_refused(tmp_path):
    url = tmp_path / "s"
    script = (
        "import sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}\n"
        "from cache_store import arguments\nfrom offline_bkd.cache import create_cache\n"
        f"writer = create_cache({str(url)!r}, **arguments())\nprint('open', flush=True)\nsys.stdin.read()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(CacheError, match="another process is writing .*; wait for it, or end it"):
            create_cache(url, resume=True, **arguments())
        other.stdin.close()
        other.wait()
    create_cache(url, resume=True, **arguments()).close()  # the lock ends with its process


SHARE = """
import sys
sys.path[:0] = {paths!r}
from cache_store import arguments, fill
from offline_bkd.cache import create_cache, format
format._CHUNK_BYTES = 60 * 5 * 4
with create_cache(sys.argv[1], resume=True, joint=True, **arguments()) as writer:
    writer.take(writer.cache.parts(int(sys.argv[3]))[int(sys.argv[2])])
    fill(writer, writer.pending()[: int(sys.argv[4])])
"""


def test_processes_come_and_go_in_any_number_and_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 60 * 5 * 4)
    dump(tmp_path / "whole")
    url = tmp_path / "s"
    script = SHARE.format(paths=[str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    for world, share in (3, 10), (2, 1000):
        running = [
            subprocess.Popen([sys.executable, "-c", script, str(url), str(rank), str(world), str(share)])
            for rank in range(world)
        ]
        assert [process.wait() for process in running] == [0] * world
    assert files(url) == files(tmp_path / "whole")


def test_a_short_last_block_that_is_damaged_is_written_anew_without_reading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 125 * 5 * 4)
    given = arguments(**TWO_VIEWS)
    given = {**given, **{key: given[key][:359] for key in ("sample_id", "label", "image_size")}}
    url = tmp_path / "s"
    with create_cache(url, **given) as writer:
        assert writer.rows(2) == slice(240, 359)
        fill_short(writer)
    whole = files(url)
    flip(url / "probability/c.1.2.0", 30, 2)
    (url / "done/1.2").unlink()
    with create_cache(url, resume=True, **given) as writer:
        fill_short(writer)
    assert files(url) == whole


def fill_short(writer):
    for view, block in writer.pending():
        writer.write(view, block, answers(view, 359)[writer.rows(block)])
