"""Jobs: commands that make a folder each, run as processes, those that others need first."""

import fcntl
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import torch

from offline_bkd.cache import CacheError, open_cache
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.show import terminal
from offline_bkd.pipeline.show.progress import Progress

CLI = Path(__file__).parent.parent.parent / "cli.py"
POLL_SECONDS = 0.2


@dataclass(eq=False)
class Job:
    """One command with the folder that it makes."""

    out: Path
    arguments: list[str]
    needs: list["Job"] = field(default_factory=list)
    process: Popen | None = None
    card: str | None = None  # the GPU that it runs on, as CUDA_VISIBLE_DEVICES names it
    failed: bool = False

    @property
    def makes_a_run(self) -> bool:
        """Whether the folder is a run's; else it is a cache's."""
        return self.out.suffix != ".zarr"

    @property
    def done(self) -> bool:
        if self.makes_a_run:
            return (self.out / "summary.json").exists()
        try:
            return open_cache(str(self.out)).complete
        except CacheError:
            return False  # not begun, or what dump-logits will say

    def begin(self, threads: int, card: str | None = None) -> bool:
        """Starts the command, which sees no GPU but `card`; False while another `reproduce` has it running."""
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            log = open(f"{self.out}.log", "a")
        except OSError as error:
            raise UserError(f"{self.out.parent} cannot be written: {error.strerror}; name another --out")
        with log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process has it from here, to its end
            except BlockingIOError:
                return False
            self.card, chosen = card, {} if card is None else {"CUDA_VISIBLE_DEVICES": card}
            self.process = Popen(
                [sys.executable, str(CLI), *self.arguments, "--out", str(self.out), "--resume"],
                stdin=PIPE,  # which ends with this process, however it ends, and so does the command
                stdout=log,
                stderr=STDOUT,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | {"OFFLINE_BKD_ENDS_WITH_INPUT": "1"} | chosen,
            )
        return True

    def end(self) -> None:
        """Takes note of how the command ended, and prints the last line of one that failed."""
        self.failed = self.process.returncode != 0
        if self.failed:
            last_line = Path(f"{self.out}.log").read_text(errors="replace").splitlines()[-1:]
            terminal.line(f"{self.out}: exit {self.process.returncode}; {self.out}.log ends: {''.join(last_line)}")


def visible_cards(device: torch.device) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each of the GPUs that torch finds; of a CPU none."""
    if device.type != "cuda":
        return []
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]


def run_jobs(waiting: list[Job], total: int, at_once: int, threads: int, cards: Sequence[str] = ()) -> None:
    """Begins jobs whose needs are done, `at_once` at a time, until none is left that can be.

    Each sees one of the GPUs `cards` alone, the one that the fewest run on.
    """
    running: list[Job] = []
    start, ended = time.perf_counter(), 0
    with Progress("reproducing", total, total - len(waiting), "runs", plain=True) as progress:
        try:
            while waiting or running:
                _leave_out_what_cannot_be(waiting)
                _begin_what_can_be(waiting, running, at_once, threads, cards)
                time.sleep(POLL_SECONDS)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    job.end()
                    ended += 1
                    progress.advance(ended / (time.perf_counter() - start) * 3600, "runs/h")
        finally:
            for job in running:  # interrupted: each leaves what --resume goes on with
                job.process.terminate()
            for job in running:
                job.process.wait()


def _leave_out_what_cannot_be(waiting: list[Job]) -> None:
    for job in list(waiting):  # needs come first, so a failure reaches all that builds on it
        if any(need.failed for need in job.needs):
            job.failed = True
            waiting.remove(job)
            terminal.line(f"{job.out}: left out, what it needs failed")


def _begin_what_can_be(waiting: list[Job], running: list[Job], at_once: int, threads: int, cards: Sequence[str]) -> None:
    ready = [job for job in waiting if all(need not in waiting and need not in running for need in job.needs)]
    for job in ready:
        card = min(cards, key=[other.card for other in running].count, default=None)
        if len(running) < at_once and job.begin(threads, card):
            waiting.remove(job)
            running.append(job)
