"""A dump as parts: in any order, at once, again after a kill, the store is the one that a single process writes."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
from cache_store import answers, arguments, dump, files, fill
from click.testing import CliRunner
from test_cache_klt import klt_arguments, teacher

from offline_bkd import cli
from offline_bkd.cache import CacheError, create_cache, format, open_cache
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.dump import dump_logits, writing
from offline_bkd.pipeline.dump.parts import Part, own_part

ROOT = Path(__file__).parent.parent


def run(*words):
    result = CliRunner().invoke(cli.main, list(map(str, words)))
    return result.exit_code, result.output


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 40])
def test_each_block_is_in_one_part_and_parts_are_as_equal_as_can_be(tmp_path, monkeypatch, count):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 100 * 5 * 4)
    create_cache(tmp_path / "s", **arguments()).close()
    cache = open_cache(tmp_path / "s")
    parts = cache.parts(count)
    assert len(parts) == count and sorted(sum(parts, [])) == cache.missing()
    units = [len({(view // 8, block) for view, block in part}) for part in parts]
    assert sum(units) == 4 * 3 and max(units) - min(units) <= 1, "views of one decode are not parted"
    with pytest.raises(ValueError, match="at least one part, found 0"):
        cache.parts(0)


def test_a_part_is_the_same_blocks_less_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 100 * 5 * 4)
    given = arguments()
    create_cache(tmp_path / "s", **given).close()
    before = open_cache(tmp_path / "s").parts(5)
    with create_cache(tmp_path / "s", resume=True, joint=True, **given) as writer:
        writer.take(before[1] + before[3][:2])
        fill(writer)
    assert open_cache(tmp_path / "s").parts(5) == [before[0], [], before[2], before[3][2:], before[4]]


HOLD = """
import sys
sys.path[:0] = {paths!r}
from cache_store import arguments
from offline_bkd.cache import create_cache
with create_cache(sys.argv[1], resume=True, joint=True, **arguments()) as writer:
    writer.take([(3, 0), (4, 0), (9, 0)])
    print("taken", flush=True)
    sys.stdin.read()
"""


def test_what_one_process_has_taken_no_other_takes(tmp_path):
    dump(tmp_path / "whole")
    script = HOLD.format(paths=[str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", script, str(tmp_path / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "taken\n"
        for mine in ([(4, 0)], [(2, 0), (9, 0)]):
            with create_cache(tmp_path / "s", resume=True, joint=True, **arguments()) as writer:
                with pytest.raises(CacheError, match="another process is writing .*; wait for it, or end it"):
                    writer.take(mine)
        with pytest.raises(CacheError, match="another process is writing"):
            create_cache(tmp_path / "s", resume=True, **arguments())
        with create_cache(tmp_path / "s", resume=True, joint=True, **arguments()) as writer:
            writer.take([(view, 0) for view in range(18) if view not in (3, 4, 9)])
            with pytest.raises(ValueError, match="view 3, block 0 is not this process's to write"):
                writer.write(3, 0, answers(3))
            fill(writer)
        other.kill()
    with create_cache(tmp_path / "s", resume=True, joint=True, **arguments()) as writer:
        writer.take([(3, 0), (4, 0), (9, 0)])
        fill(writer)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


@pytest.mark.parametrize(("pair", "message"), [((18, 0), "there is no view 18"), ((0, 1), "there is no block 1")])
def test_blocks_that_a_store_does_not_have_are_refused(tmp_path, pair, message):
    with create_cache(tmp_path / "s", joint=True, **arguments()) as writer, pytest.raises(CacheError, match=message):
        writer.take([(0, 0), pair])


def test_a_view_that_is_stored_as_differences_goes_with_its_reference(tmp_path):
    probability = teacher()
    given = klt_arguments(probability)
    with create_cache(tmp_path / "s", joint=True, **given) as writer:
        reference = writer.cache.encoding.reference
        parts = writer.cache.parts(4)
        assert [len(part) for part in parts] == [0, 0, 0, 18], "all views of a block"
        other = (reference + 1, 0)
        with pytest.raises(
            CacheError, match=rf"stored as differences from view {reference}, .*; write \({reference}, 0\) too"
        ):
            writer.take([other])
        writer.take([(reference, 0)])
        fill(writer, answers=probability)
    with create_cache(tmp_path / "s", resume=True, joint=True, **given) as writer:
        writer.take([other])
        fill(writer, answers=probability)
    assert other not in open_cache(tmp_path / "s").parts(4)[3]
    (tmp_path / "s" / "done" / f"{reference}.0").unlink()
    assert other in open_cache(tmp_path / "s").parts(4)[3], "what is lost with its reference is missing too"


@pytest.mark.parametrize(("stores", "together"), [(1, 8), (3, 4), (40, 1)])
def test_a_decoded_group_of_views_lies_within_a_part_and_is_the_same_whoever_asks(tmp_path, monkeypatch, stores, together):
    monkeypatch.setattr(writing, "GROUP_BYTES", 360 * 5 * 4 * 16)
    asked = []

    def teacher(rows, views):
        asked.append(tuple(views))
        return [writing.Predictions(np.stack([answers(view)[rows] for view in views]), {})] * stores

    for part in (2, 0, 1):
        writers = [create_cache(tmp_path / str(n), resume=True, joint=True, **arguments()) for n in range(stores)]
        for writer in writers:
            writer.take(writer.cache.parts(3)[part])
        writing.write_pending(writers, teacher, 18, decodes=True)
        for writer in writers:
            writer.close()
    assert sorted(asked) == [tuple(range(start, min(start + together, 18))) for start in range(0, 18, together)]
    dump(tmp_path / "whole")
    assert files(tmp_path / "0") == files(tmp_path / "whole")


def test_parts_in_any_order_leave_the_store_of_one_process_and_inspect_says_which_are_missing(tmp_path, teacher_run, cache):
    out = str(tmp_path / "s")
    for number, left in ((3, "2"), (1, "2"), (2, "")):
        dump_logits(tiny.experiment(tiny.EXACT), [str(teacher_run)], out, tiny.CPU, part=(number, 3))
        assert run("inspect", out, "--parts", 3) == (0, left + "\n")
    assert run("inspect", out, "--parts", 3, "--json") == (0, "[]\n")
    assert files(tmp_path / "s") == files(cache)
    for number in (1, 2):
        (tmp_path / "s" / "done" / f"{number}.0").unlink()
    assert run("inspect", out, "--parts", 2) == (0, "1\n")
    blocks = [pair for part in open_cache(out).parts(2) for pair in part]
    assert blocks == [(1, 0), (2, 0)]
    dump_logits(tiny.experiment(tiny.EXACT), [str(teacher_run)], out, tiny.CPU, blocks=blocks)
    assert files(tmp_path / "s") == files(cache)


def test_a_job_array_with_a_job_that_is_killed_and_submitted_again_leaves_the_store_of_one_process(
    tmp_path, teacher_run, cache, capsys
):
    out = tmp_path / "s"

    def job(number):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "SLURM_ARRAY_TASK_ID": str(number)}
        command = ["bash", "examples/slurm_array.sh", tiny.CONFIG, teacher_run, out, *tiny.options(tiny.EXACT)[2:]]
        return subprocess.Popen([*map(str, command)], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)

    first, second = job(32), job(64)  # of nine views, which are two units, the others of 64 parts have nothing
    while not list(out.glob("done/[0-9]*")) and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it was at work"
    assert second.wait() == 0, "each ends by itself"
    assert run("inspect", out, "--parts", 64)[1] in ("32\n", "\n")
    dump_logits(tiny.experiment(tiny.EXACT), [str(teacher_run)], str(out), tiny.CPU, part=(32, 64))
    assert capsys.readouterr().out.endswith("9 views of 464 samples, part 32/64\n")
    assert files(out) == files(cache)


def test_a_process_that_is_not_the_first_waits_for_the_store(tmp_path, monkeypatch, capsys):
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(writing._wait_for, str(tmp_path / "s"), 60)
        time.sleep(0.2)
        assert not waiting.done()
        create_cache(tmp_path / "s", **arguments()).close()
        assert waiting.result(timeout=10) is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(writing, "QUIET", 0)
    why = "/t is not a store: it is empty, or not there; dump one with the command dump-logits"
    with pytest.raises(RuntimeError, match=f"the first process, or part, has not created .*/t in 0 s .*{why}.; start it"):
        writing._wait_for(str(tmp_path / "t"), 0.2)
    said = capsys.readouterr().err
    assert said.startswith("note: waiting for the first process") and said.endswith(f"{why}\n") and said.count("note") == 1


@pytest.mark.parametrize(
    ("url", "part", "rank", "waits"),
    [("s", 2, 0, False), ("s", 1, 1, True), ("memory://s", 1, 0, False), ("memory://s", 2, 0, True)],
)
def test_part_1_makes_the_store_where_nothing_is_locked_and_the_first_rank_everywhere(url, part, rank, waits):
    assert Part(lambda cache: [], "", part, rank).waits(url) == waits


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "1/0", "-1/3", "1/3/3", "one"])
def test_a_part_that_is_none_is_refused(tmp_path, part):
    code, said = run("dump-logits", *tiny.options(), "--teacher", tmp_path, "--out", tmp_path / "s", "--part", part)
    assert code == 2 and "a part is its number, from 1, and how many there are, such as 3/64" in said


def test_processes_of_torchrun_share_a_part(monkeypatch):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "4")
    assert own_part((3, 64), None).name == "part 10/256"
    with pytest.raises(UserError, match="blocks are for this process alone"):
        own_part(None, [(0, 0)])
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK is 'x', where torchrun sets a number; unset it"):
        own_part(None, None)


LOCAL_CLUSTER = """
import ray, runpy, sys
del sys.argv[0]
init = ray.init
ray.init = lambda: init(**{options})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def holder(path: Path) -> int | None:
    """The process that holds the lock of some block of the store at `path`."""
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1 << 61, 0)
    with open(path / "done" / "lock", "ab") as file:
        kind, _, _, _, process = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else process


def test_ray_replaces_a_killed_worker_and_the_store_is_that_of_one_process(tmp_path, teacher_run):
    pytest.importorskip("ray")
    more = tiny.EXACT, "views={name: crop_flip, pad: 2, flip: false}", "cache.batch_size=8"
    dump_logits(tiny.experiment(*more), [str(teacher_run)], str(tmp_path / "whole"), tiny.CPU)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "offline_bkd").symlink_to(ROOT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "RAY_USAGE_STATS_ENABLED": "0"}
    variables = {name: environment[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    script = LOCAL_CLUSTER.format(options={"num_cpus": 2, "include_dashboard": False, "runtime_env": {"env_vars": variables}})
    example = [ROOT / "examples" / "ray_dump.py", tiny.CONFIG, teacher_run, tmp_path / "s", *tiny.SMALL, *more]
    command = [sys.executable, "-c", script, *map(str, example)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        worker = None
        while worker is None and driver.poll() is None:
            if list((tmp_path / "s").glob("done/[0-9]*")):
                worker = holder(tmp_path / "s")
            time.sleep(0.01)
        assert worker and worker != driver.pid, driver.stdout.read()
        os.kill(worker, signal.SIGKILL)
        said = driver.communicate(timeout=100)[0]
    assert driver.returncode == 0 and f"{tmp_path}/s: complete\n" in said, said
    assert files(tmp_path / "s") == files(tmp_path / "whole")
