"""The device that networks run on: which one, what it is called, and what memory there is and was used."""

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from offline_bkd.pipeline import UserError, torchrun
from offline_bkd.pipeline.show.terminal import counted

# glibc's names, from malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def choose_device(name: str) -> torch.device:
    """The device `name` ("auto", "cpu" or "cuda"), this process set to it: the same work there gives the same bits, on a GPU
    but for compiled networks and attention.

    Raises UserError where there is no GPU, or none for this process of several.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    rank, count = torchrun.local_rank(), torch.cuda.device_count()
    if rank >= count:
        raise UserError(f"process {rank + 1} of this machine finds no GPU of its own, of {count}; start {count} at most")
    torch.backends.cudnn.deterministic = True  # its fastest convolutions add in another order each time
    device = torch.device(name, rank)
    torch.cuda.set_device(device)  # where what is gathered from all processes goes, too
    return device


@contextmanager
def repeatable() -> Iterator[None]:
    """Within it, the same work gives the same bits on a GPU too, in a process that `choose_device` did not set up."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def device_name(device: torch.device) -> str:
    """What a person calls it: the card's name, or "cpu (2 threads)". `format.device_kind` tells whether two are one kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({counted(torch.get_num_threads(), 'thread')})"


def memory_limit() -> int:
    """Bytes of the machine's memory that this process may take: its share of all, or of the container's or the job's."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in _limits():
        try:
            limit = min(limit, int(file.read_text()))
        except (OSError, ValueError):  # there is none, or "max"
            pass
    return limit // torchrun.local_world()


def _limits(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[Path]:
    """Files that may limit this process's memory: of its cgroup, version 2 or 1, and of those above, as Slurm nests them."""
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
                own = top / path.strip("/")
                yield from (folder / name for folder in (own, *own.parents) if folder.is_relative_to(top))


def peak_memory(device: torch.device) -> int:
    """The most bytes of the device's memory that this process has used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_freed_memory() -> bool:
    """Leaves memory that is freed with the process: asking the kernel for it again can take as long as arithmetic.

    A batch's activations are freed and asked for again in every step. No result depends on it. True where the C library can
    do so (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 << 20)])
