"""Published tables by one command: every run of a table, resumed or new, and ours beside the published numbers.

A table is a YAML file: columns are experiments, rows are what is changed in them, each by a file that has a base or by
overrides. Each run is a process of its own with its own folder, so that whatever interrupts the command, the same command
goes on. Teachers and caches are shared by all rows that ask for the same ones.

    OUT/<column>/teacher-<key>-<seed>   cache-<key>.zarr   <row>-<key>-<seed>   and a .log beside each
    OUT/table.md  table.csv  table.json  table.png

A key is a digest of all that goes in, so a folder never holds another experiment than its name says.
"""

import os
import shlex
from pathlib import Path

import torch

from offline_bkd.pipeline import runs
from offline_bkd.pipeline.reproduce.execution import Job, run_jobs, visible_cards
from offline_bkd.pipeline.reproduce.plan import plan
from offline_bkd.pipeline.reproduce.results import refuse_other, write_table
from offline_bkd.pipeline.reproduce.table import Table, load_table, select
from offline_bkd.pipeline.show import terminal
from offline_bkd.pipeline.show.report import draw_run

__all__ = ["Job", "Table", "load_table", "plan", "reproduce", "select", "show_plan", "write_table"]


def reproduce(whole: Table, table: Table, out: str, device: torch.device, quick: bool, at_once: int | None) -> list[Job]:
    """Runs what is missing of `table`, a part of `whole`, and writes the table into `out`. Returns the jobs that failed."""
    folder = Path(out)
    before = refuse_other(whole, folder, quick)
    # What other commands have run in `out` stays in the table.
    everything = select(whole, (), (), tuple(dict.fromkeys((*whole.seeds, *table.seeds, *before))), quick)
    jobs, cells = plan(everything, table, folder, device, quick)
    runs.make_folder(folder)
    cores, cards = len(os.sched_getaffinity(0)), visible_cards(device)
    at_once = at_once or (len(cards) * min(4, cores) if cards else cores)
    run_jobs([job for job in jobs if not job.done], len(jobs), at_once, max(1, cores // at_once), cards)
    for job in jobs:
        if job.done and job.makes_a_run:
            draw_run(runs.open_run(job.out))  # where a kill, or an earlier version, left no whole picture
    write_table(everything, cells, folder, quick, asked=table.cells)
    return [job for job in jobs if job.failed]


def show_plan(whole: Table, table: Table, out: str, device: torch.device, quick: bool) -> None:
    """Prints the commands that `reproduce` would give, and which are done. Writes nothing."""
    refuse_other(whole, Path(out), quick)
    jobs, _ = plan(whole, table, Path(out), device, quick)
    for job in jobs:
        terminal.line(f"{'done ' if job.done else 'to do'}  {shlex.join([*job.arguments, '--out', str(job.out)])}")
    terminal.line(f"{table.title}: {terminal.counted(len(jobs), 'command')}; nothing written")
