"""Worker processes: the same arrays in the same order, no shared memory, and no waiting for one that has died."""

import errno
import os
import resource
import signal
import time

import numpy as np
import pytest
import tiny
from test_folders import folder_of_images

from offline_bkd.cache.views import RandomResizedCrop
from offline_bkd.pipeline import UserError, guard
from offline_bkd.pipeline.data import datasets, workers
from offline_bkd.pipeline.data.images import DecodedImages
from offline_bkd.pipeline.data.workers import in_workers


@pytest.fixture(autouse=True)
def within_ten_seconds():
    """A test that waits for ever fails."""

    def stop(*_):
        raise TimeoutError("it is still waiting")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def running() -> list[int]:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return [int(number) for number in file.read().split()]


@pytest.fixture(autouse=True)
def others():
    """Processes that other tests have left, such as Python's own tracker of resources."""
    OTHERS[:] = running()


OTHERS: list[int] = []


def children() -> list[int]:
    return [child for child in running() if child not in OTHERS]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_arrays_come_in_order_from_any_number_of_workers(count):
    arrays = list(in_workers(lambda index: np.full((index, 2), index, np.uint8), 7, count))
    assert [array.tolist() for array in arrays] == [[index] * 2 * index for index in range(7)]
    assert not children()


def test_no_file_is_made_not_even_in_shared_memory():
    """A process may write no byte to any file, those in /dev/shm among them, where a small container's are full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError) as refused, open("/dev/shm/full", "wb", buffering=0) as file:
            file.write(b"a")
        total = sum(int(array.sum()) for array in in_workers(lambda index: np.ones(2**22, np.uint8), 6, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        os.unlink("/dev/shm/full")
    assert refused.value.errno == errno.EFBIG and total == 6 * 2**22


@pytest.mark.parametrize("when", ["making", "sending"])
def test_a_worker_that_is_killed_ends_the_work_with_one_line(when):
    def make(index):
        if index == 3 and when == "making":
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(2**22, np.uint8)

    arrays = in_workers(make, 8, 2)
    next(arrays)
    if when == "sending":
        os.kill(children()[1], signal.SIGKILL)
    with pytest.raises(
        RuntimeError, match=r"^a process .* was ended by SIGKILL, as where memory runs out: lower data.workers$"
    ):
        list(arrays)
    assert not children()


def test_a_worker_that_fails_ends_the_work_and_says_where_its_error_stands(capfd):
    def make(index):
        raise ZeroDivisionError("by its own fault")

    with pytest.raises(RuntimeError, match=r"ended by itself \(exit code 1\); its own error stands above"):
        list(in_workers(make, 3, 2))
    assert "ZeroDivisionError: by its own fault" in capfd.readouterr().err


def test_what_the_user_can_put_right_is_raised_as_it_was():
    def make(index):
        if index == 2:
            raise UserError("caf\udce9.png cannot be read")
        return np.zeros(3, np.uint8)

    arrays = in_workers(make, 4, 2)
    next(arrays), next(arrays)
    with pytest.raises(UserError, match="^caf\udce9.png cannot be read$"):
        next(arrays)


def test_signals_to_all_processes_of_a_command_are_its_own_and_not_of_a_worker_that_begins(monkeypatch, capfd):
    """As Ctrl-C sends them, and a terminal that is closed."""
    numbers, work = (signal.SIGINT, signal.SIGHUP), workers._work

    def work_when_signalled(*given):
        for number in numbers:
            os.kill(os.getpid(), number)
        work(*given)

    monkeypatch.setattr(workers, "_work", work_when_signalled)
    before = [signal.signal(number, guard.interrupt) for number in numbers]
    try:
        assert sum(int(array.sum()) for array in in_workers(lambda index: np.ones(3, np.uint8), 6, 2)) == 18
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    assert not capfd.readouterr().err


def test_an_interrupt_while_a_worker_is_forked_is_no_other_error(monkeypatch):
    forked, fork = [], os.fork

    def interrupted():
        if number := fork():
            forked.append(number)
            if len(forked) == 2:
                raise KeyboardInterrupt
        return number

    monkeypatch.setattr(os, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(in_workers(lambda index: np.zeros(2**22, np.uint8), 100, 3))
    os.waitpid(forked[1], 0)  # of whom nobody knows
    assert not children()


def test_nobody_is_left_when_the_arrays_are_not_all_taken(capfd):
    arrays = in_workers(lambda index: np.zeros(2**22, np.uint8), 100, 3)
    next(arrays)
    assert len(children()) == 3
    arrays.close()
    assert not children() and not capfd.readouterr().err


def test_nobody_is_waited_for_whose_array_is_not_wanted():
    arrays = in_workers(lambda index: np.zeros(3, np.uint8) if index < 2 else time.sleep(60), 4, 2)
    next(arrays)
    start = time.monotonic()
    arrays.close()
    assert time.monotonic() - start < 5 and not children()


def test_workers_end_when_their_parent_is_killed():
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        os.close(reader)
        os.setsid()
        arrays = in_workers(lambda index: np.zeros(2**22, np.uint8), 100, 3)
        next(arrays)
        os.write(writer, b"!")
        signal.pause()
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(reader, 1) == b"", "the last worker has closed its end"
    os.close(reader)


def test_decoding_ends_with_one_line_when_a_worker_is_killed(tmp_path):
    images = DecodedImages(datasets.load(folder_of_images(tmp_path))[0], RandomResizedCrop(size=64, count=3), tiny.CPU, 2)
    batches = images.batches(np.arange(6).repeat(100), np.zeros(600, np.int64), 20)
    next(batches)
    for child in children():
        os.kill(child, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="a process that decodes images was ended by SIGKILL"):
        list(batches)
    assert time.monotonic() - start < 5
