"""Arrays made by worker processes, in order, over a socket each.

Sockets need no shared memory, of which containers have little; and where a worker dies, its socket ends, which is noticed
at once. Workers are forked: they have all that their parent has, and nothing is sent to them.
"""

import multiprocessing
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from offline_bkd.pipeline import UserError

HEADER = struct.Struct("<?q")  # whether bytes of an array follow, or the text of an error; how many
ENDING = signal.SIGINT, signal.SIGHUP, signal.SIGTERM


def in_workers(make: Callable[[int], np.ndarray], count: int, workers: int, pinned: bool = False) -> Iterator[torch.Tensor]:
    """The bytes of `make(index)`, uint8, for each index below `count`, each made ahead by one of `workers` processes.

    They are received into pinned memory, from where a GPU may copy them, if it is asked for. A UserError that `make` raises
    is raised here. Raises RuntimeError where a worker dies.
    """
    context = multiprocessing.get_context("fork")
    sockets, processes = [], []
    try:
        for number in range(workers):
            here, there = socket.socketpair()
            sockets.append(here)
            arguments = make, range(number, count, workers), there, list(sockets)
            with _held_back():
                processes.append(context.Process(target=_work, args=arguments, daemon=True))
                processes[-1].start()
            there.close()
        for index in range(count):
            data = _receive(sockets[index % workers], pinned)
            if data is None:
                raise RuntimeError(_death(processes[index % workers]))
            yield data
    finally:
        for end in sockets:
            end.close()
        for process in processes:
            if process.pid:  # not one that was interrupted while it was forked: it ends without its socket
                process.terminate()
                process.join()


@contextmanager
def _held_back() -> Iterator[None]:
    """In a worker, signals wait until it handles them as one: its parent's handlers, which it begins with, would complain.

    In the parent they wait only where it has no other thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(make: Callable, indices: range, to: socket.socket, parents: list[socket.socket]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and a closed terminal are the parent's, which ends its workers
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    for end in parents:
        end.close()  # or the workers would outlive a parent that is killed
    try:
        for index in indices:
            try:
                whole, data = True, np.ascontiguousarray(make(index)).reshape(-1).view(np.uint8)
            except UserError as error:
                whole, data = False, str(error).encode(errors="surrogateescape")
            to.sendall(HEADER.pack(whole, len(data)))
            to.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent needs no more


def _receive(sender: socket.socket, pinned: bool) -> torch.Tensor | None:
    """The next array, or None where the sender has ended."""
    header = bytearray(HEADER.size)
    if not _read(sender, header):
        return None
    whole, length = HEADER.unpack(header)
    data = torch.empty(length, dtype=torch.uint8, pin_memory=pinned)
    if not _read(sender, data.numpy()):
        return None
    if whole:
        return data
    raise UserError(data.numpy().tobytes().decode(errors="surrogateescape"))


def _read(sender: socket.socket, into: bytearray | np.ndarray) -> bool:
    """Whether the sender has filled `into`; not where it has ended."""
    room, place = memoryview(into), 0
    while place < len(room):
        try:
            received = sender.recv_into(room[place:])
        except ConnectionResetError:
            received = 0
        if not received:
            return False
        place += received
    return True


def _death(process: multiprocessing.Process) -> str:
    process.join()
    if process.exitcode >= 0:
        return f"a process that decodes images ended by itself (exit code {process.exitcode}); its own error stands above"
    name = signal.Signals(-process.exitcode).name
    memory = ", as where memory runs out: lower data.workers" if -process.exitcode == signal.SIGKILL else ""
    return f"a process that decodes images was ended by {name}{memory}"
