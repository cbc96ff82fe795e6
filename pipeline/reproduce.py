"""Published tables by one command: every run of a table, resumed or new, and ours beside the published numbers.

A table is a YAML file: columns are experiments, rows are what is changed in them, each by a file that has a base or by
overrides. Each run is a process of its own with its own folder, so that whatever interrupts the command, the same command
goes on. Teachers and caches are shared by all rows that ask for the same ones.

    OUT/<column>/teacher-<key>-<seed>   cache-<key>.zarr   <row>-<key>-<seed>   and a .log beside each
    OUT/table.md  table.csv  table.json  table.png

A key is a digest of all that goes in, so a folder never holds another experiment than its name says.
"""

import csv
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, Strict, ValidationError

from offline_bkd.cache import CacheError, open_cache
from offline_bkd.cache.views import to_json
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.config import explain, load_config, read_yaml
from offline_bkd.pipeline.schema import Experiment, Section
from offline_bkd.pipeline.show import terminal
from offline_bkd.pipeline.show.progress import Progress
from offline_bkd.pipeline.show.report import spread

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "configs" / "tables"
COLUMNS = terminal.COLUMNS
SECTIONS = ("data", "views", "teacher", "cache", "student")

Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63)]


def _different(values: tuple) -> tuple:
    if repeated := [value for number, value in enumerate(values) if value in values[:number]]:
        raise ValueError(f"{repeated[0]} comes twice; give each once")
    return values


def _of_an_experiment(override: str) -> str:
    if override.split("=")[0].split(".")[0] not in SECTIONS:
        raise ValueError(f"overrides begin with one of {', '.join(SECTIONS)}; found {override!r}")
    return override


Override = Annotated[str, AfterValidator(_of_an_experiment)]


def _of_the_teacher(override: str) -> str:
    if re.split("[.=]", override)[0] not in ("teacher", "views"):
        raise ValueError(f"a member changes its own training, so overrides begin with teacher or views; found {override!r}")
    return override


class Member(Section):
    """A teacher, alone or of an ensemble. Its views are those it is trained under; it is asked about the row's."""

    seed: Seed = 0
    set: tuple[Annotated[str, AfterValidator(_of_the_teacher)], ...] = ()  # overrides of its own


class Column(Section):
    """An experiment."""

    config: str  # a file, from the table's own folder
    quick: str | None = None  # its small version; without one, --quick leaves the column out
    set: tuple[Override, ...] = ()  # as with -o


class Published(Section):
    """Top-1 by shot group."""

    all: float
    many: float | None = None
    medium: float | None = None
    few: float | None = None


class Row(Section):
    """What is changed in every column's experiment."""

    config: str | None = None  # a file from the table's own folder, read over the column's in place of its own base
    columns: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_different)] | None = None  # null: in all
    set: tuple[Override, ...] = ()
    quick: tuple[Override, ...] = ()  # further ones at the small scale
    stage: Literal["teacher", "student"] = "student"  # teacher: the row is the teacher itself
    # whose average, or whose features, the student learns from
    teachers: Annotated[tuple[Member, ...], Field(min_length=1), AfterValidator(_different)] = (Member(),)
    backbone: str | None = None  # the row whose run of the same seed gives the backbone
    published: dict[str, Published] = {}  # by column

    def stands_in(self, column: str) -> bool:
        return self.columns is None or column in self.columns


class Table(Section):
    title: str
    published: Literal["last", "best"] = "last"  # which of our epochs the published numbers compare with
    quick: tuple[Override, ...] = ()  # of every column at the small scale
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_different)] = (0, 1, 2)
    columns: Annotated[dict[str, Column], Field(min_length=1)]
    rows: Annotated[dict[str, Row], Field(min_length=1)]

    @property
    def compared(self) -> bool:
        """Whether there are published numbers; a sweep has none."""
        return any(row.published for row in self.rows.values())

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(column, row) of each, in order: not every row need stand in every column."""
        return [(column, name) for column in self.columns for name, row in self.rows.items() if row.stands_in(column)]


@dataclass(eq=False)
class Job:
    """One command with the folder that it makes."""

    out: Path
    arguments: list[str]
    needs: list["Job"] = field(default_factory=list)
    process: Popen | None = None
    failed: bool = False

    @property
    def done(self) -> bool:
        if self.out.suffix != ".zarr":
            return (self.out / "summary.json").exists()
        try:
            return open_cache(str(self.out)).complete
        except CacheError:
            return False  # not begun, or what dump-logits will say

    def begin(self, threads: int) -> bool:
        """Starts the command; False while another `reproduce` has it running."""
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
            self.process = Popen(
                [sys.executable, str(ROOT / "cli.py"), *self.arguments, "--out", str(self.out), "--resume"],
                stdout=log,
                stderr=STDOUT,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ,
            )
        return True


def load_table(name: str) -> Table:
    """The table of that name in configs/tables, or in the YAML file `name`. Raises UserError for what is wrong in it."""
    path = TABLES / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    try:
        values = read_yaml(path)
    except OSError:
        known = ", ".join(sorted(found.stem for found in TABLES.glob("*.yaml")))
        raise UserError(f"there is no table {name!r}; known are {known}, or name a YAML file")
    try:
        table = Table.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {where}: {what}" for where, what in explain(error, Table))) from None

    def placed(section, *keys: str):
        files = {key: getattr(section, key) for key in keys}
        return section.model_copy(update={key: str((path.parent / file).resolve()) for key, file in files.items() if file})

    columns = {name: placed(column, "config", "quick") for name, column in table.columns.items()}
    table = table.model_copy(
        update={"columns": columns, "rows": {name: placed(row, "config") for name, row in table.rows.items()}}
    )
    for row, section in table.rows.items():
        if section.backbone and section.backbone not in table.rows:
            raise UserError(f"{path}: rows.{row}.backbone: there is no row {section.backbone!r}")
        if section.backbone and table.rows[section.backbone].backbone:
            raise UserError(
                f"{path}: rows.{row}.backbone: row {section.backbone!r} takes its backbone from another; name that"
            )
        if section.stage == "teacher" and (section.teachers != (Member(),) or section.backbone):
            raise UserError(f"{path}: rows.{row}: a teacher learns from none; leave out teachers and backbone")
        if unknown := set(section.published) - set(table.columns):
            raise UserError(f"{path}: rows.{row}.published: there is no column {', '.join(sorted(unknown))}")
        if unknown := set(section.columns or ()) - set(table.columns):
            raise UserError(f"{path}: rows.{row}.columns: there is no column {', '.join(sorted(unknown))}")
        for column in table.columns if section.backbone else ():
            if section.stands_in(column) and not table.rows[section.backbone].stands_in(column):
                raise UserError(f"{path}: rows.{row}.backbone: row {section.backbone!r} is not in the column {column!r}")
    return table


def select(table: Table, rows: tuple[str, ...], columns: tuple[str, ...], seeds: tuple[int, ...], quick: bool) -> Table:
    """The part of `table` that is asked for; nothing asked for is everything. Raises UserError for unknown names."""
    for kind, asked, known in ("row", rows, table.rows), ("column", columns, table.columns):
        if unknown := [name for name in asked if name not in known]:
            raise UserError(f"the table has no {kind} {unknown[0]!r}; it has {', '.join(known)}")
    kept = {name: column for name, column in table.columns.items() if not columns or name in columns}
    if quick:
        kept = {name: column for name, column in kept.items() if column.quick}
        if not kept:
            raise UserError("none of these columns has a small version; leave out --quick")
    chosen = {name: row for name, row in table.rows.items() if not rows or name in rows}
    part = table.model_copy(update={"columns": kept, "rows": chosen, "seeds": seeds or table.seeds})
    if not part.cells:
        raise UserError(f"the table has no {' or '.join(chosen)} in {' or '.join(kept)}; its rows name their columns")
    return part


def plan(whole: Table, table: Table, out: Path, device: torch.device, quick: bool) -> tuple[list[Job], dict]:
    """All commands of `table`, a part of `whole`, those that others need first; and the student's or teacher's of each cell.

    The second is {(row, column, seed): job}. Every configuration is checked here, before anything runs.
    """
    jobs: dict[Path, Job] = {}

    def add(path: Path, *arguments: str, needs=()) -> Job:
        return jobs.setdefault(path, Job(path, [*arguments, "--device", device.type], list(needs)))

    def asked(name: str, column: str, seed: int, extra: tuple[str, ...] = ()) -> tuple[Experiment, list[str]]:
        """The experiment of a cell, and a command's options for it."""
        section, row = table.columns[column], whole.rows[name]
        path = section.quick if quick else section.config
        overrides = (*section.set, *(whole.quick if quick else ()), *row.set, *(row.quick if quick else ()), *extra)
        if row.config:
            path, overrides = row.config, (f"base={path}", *overrides)
        try:
            experiment = _load(path, overrides, seed)
        except UserError as error:
            raise UserError(f"row {name!r}, column {column!r}: " + str(error).replace("\n", f"\nrow {name!r}: "))
        return experiment, ["--config", path, "--seed", str(seed), *(part for item in overrides for part in ("-o", item))]

    # A key is of what the stage looks at alone, so that rows that differ elsewhere share a run.

    def teacher(name: str, column: str, member: Member) -> Job:
        experiment, options = asked(name, column, member.seed, member.set)
        key = _key(experiment.data, experiment.views, experiment.teacher)
        return add(out / _slug(column) / f"teacher-{key}-{member.seed}", "train-teacher", *options)

    def cache(name: str, column: str) -> Job:
        members = [teacher(name, column, member) for member in whole.rows[name].teachers]
        if len({member.out for member in members}) < len(members):
            raise UserError(f"row {name!r}: two of its teachers are the same; give them other seeds or settings")
        experiment, options = asked(name, column, whole.rows[name].teachers[0].seed)
        key = _key(experiment.data, experiment.views, experiment.cache, *[member.out.name for member in members])
        named = [part for member in members for part in ("--teacher", str(member.out))]
        return add(out / _slug(column) / f"cache-{key}.zarr", "dump-logits", *options, *named, needs=members)

    def cell(name: str, column: str, seed: int) -> Job:
        row = whole.rows[name]
        if row.stage == "teacher":
            return teacher(name, column, Member(seed=seed))
        experiment, options = asked(name, column, seed)
        learns_from, needs = experiment.student.method.learns_from, []
        if (learns_from == "backbone") != (row.backbone is not None):
            what = "names no backbone" if row.backbone is None else f"names the backbone {row.backbone!r}"
            raise UserError(
                f"row {name!r} {what}, but is of method {experiment.student.method.name}; only crt and oltr have one"
            )
        if learns_from == "backbone":
            needs = [cell(row.backbone, column, seed)]
            options = [*options, "--backbone", str(needs[0].out)]
        elif learns_from:
            kinds = [asked(name, column, one.seed, one.set)[0].teacher for one in row.teachers]
            if any((kind.expert is not None) != (learns_from == "experts") for kind in kinds):
                wanted = "experts, so each of its teachers sets" if learns_from == "experts" else "no expert, so none sets"
                raise UserError(f"row {name!r}: method {experiment.student.method.name} learns from {wanted} teacher.expert")
            needs = [cache(name, column)]
            options = [*options, "--cache", str(needs[0].out)]
        parts = experiment.data, experiment.views, experiment.cache, experiment.student
        key = _key(*parts, *[need.out.name for need in needs])
        return add(out / _slug(column) / f"{_slug(name)}-{key}-{seed}", "train-student", *options, needs=needs)

    cells = {(row, column, seed): cell(row, column, seed) for column, row in table.cells for seed in table.seeds}
    return list(jobs.values()), cells


def reproduce(whole: Table, table: Table, out: str, device: torch.device, quick: bool, at_once: int | None) -> list[Job]:
    """Runs what is missing of `table`, a part of `whole`, and writes the table into `out`. Returns the jobs that failed."""
    folder = Path(out)
    jobs, cells = plan(whole, table, folder, device, quick)
    before = refuse_other(whole, folder, quick)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}; name another folder")
    cores = len(os.sched_getaffinity(0))
    at_once = at_once or (min(4, cores) if device.type == "cuda" else cores)
    _run([job for job in jobs if not job.done], len(jobs), at_once, max(1, cores // at_once))
    # What other commands have run in `out` stays in the table.
    everything = select(whole, (), (), tuple(dict.fromkeys((*whole.seeds, *table.seeds, *before))), quick)
    _, cells = plan(whole, everything, folder, device, quick)
    write_table(everything, cells, folder, quick, asked=table.cells)
    return [job for job in jobs if job.failed]


def refuse_other(table: Table, folder: Path, quick: bool) -> list[int]:
    """Raises UserError if `folder` is a file or holds another table than `table`; the seeds of what it holds of this."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    try:
        found = json.loads((folder / "table.json").read_text())
        title, seeds = found["title"], [seed for cell in found["cells"] for seed in cell["seeds"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / 'table.json'} is damaged ({error}); move it away, or name another --out")
    if title != _title(table, quick):
        raise UserError(f"--out {folder} holds another table ({title!r}); name another folder")
    return seeds


def _title(table: Table, quick: bool) -> str:
    if not quick:
        return table.title
    small = f"{table.title} — quick: a small recipe, not the papers'"
    return f"{small}; published numbers are of the full one" if table.compared else small


def _run(waiting: list[Job], total: int, at_once: int, threads: int) -> None:
    """Begins jobs whose needs are done, `at_once` at a time, until none is left that can be."""
    running: list[Job] = []
    start, finished = time.perf_counter(), 0
    with Progress("reproducing", total, total - len(waiting), "runs", plain=True) as progress:
        try:
            while waiting or running:
                for job in list(waiting):  # needs come first, so a failure reaches all that builds on it
                    if any(need.failed for need in job.needs):
                        job.failed = True
                        waiting.remove(job)
                        print(f"{job.out}: left out, what it needs failed", flush=True)
                ready = [job for job in waiting if all(need not in waiting and need not in running for need in job.needs)]
                for job in ready:
                    if len(running) < at_once and job.begin(threads):
                        waiting.remove(job)
                        running.append(job)
                time.sleep(0.2)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    job.failed = job.process.returncode != 0
                    if job.failed:
                        said = Path(f"{job.out}.log").read_text(errors="replace").splitlines()[-1:]
                        print(f"{job.out}: exit {job.process.returncode}; {job.out}.log ends: {''.join(said)}", flush=True)
                    finished += 1
                    progress.advance(finished / (time.perf_counter() - start) * 3600, "runs/h")
        finally:
            for job in running:  # interrupted: each leaves what --resume goes on with
                job.process.terminate()
            for job in running:
                job.process.wait()


def write_table(table: Table, cells: dict, folder: Path, quick: bool, asked: list[tuple[str, str]]) -> list[list[str]]:
    """Writes table.md, .csv, .json and .png from the runs that are complete, and prints the table. Returns its rows.

    A (column, row) that is not `asked` for has a line where there is a run of it.
    """
    title = _title(table, quick)
    heading = [
        "data",
        "method",
        "seeds",
        *COLUMNS,
        "best epoch's all",
        *(["published", "difference"] if table.compared else []),
    ]
    rows, values = [heading], []
    for column, name in table.cells:
        row = table.rows[name]
        found = [
            runs.open_run(cells[name, column, seed].out).summary() for seed in table.seeds if cells[name, column, seed].done
        ]
        if not found and (column, name) not in asked:
            continue
        published = row.published.get(column)
        overall = published and published.all
        ours = [summary[table.published]["top1"] for summary in found]
        scores = {label: [summary["last"][key] for summary in found] for label, key in COLUMNS.items()}
        best = [summary["best"]["top1"] for summary in found]
        rows.append(
            [
                column,
                name,
                str(len(found)),
                *[spread(score) if found else "–" for score in scores.values()],
                spread(best) if found else "–",
            ]
        )
        if table.compared:
            rows[-1] += [
                "–" if overall is None else f"{overall:.2f}",
                "–" if overall is None or not found else f"{np.mean(ours) - overall:+.2f}",
            ]
        seeds = [summary["seed"] for summary in found]
        values.append(
            {
                "column": column,
                "row": name,
                "seeds": seeds,
                "last": scores,
                "best": best,
                "published": published and published.model_dump(),
            }
        )
    rule = ["---", "---"] + ["---:"] * (len(heading) - 2)
    note = "All, many, medium, few: top-1 of the last epoch, %."
    if table.compared:
        note += f" Difference: our {table.published} epoch minus published."
    lines = [f"# {title}", "", note, "", *["| " + " | ".join(row) + " |" for row in (heading, rule, *rows[1:])]]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    runs.write_whole(folder / "table.md", ("\n".join(lines) + "\n").encode())
    runs.write_whole(folder / "table.csv", text.getvalue().encode())
    content = {"title": title, "published": table.published, "cells": values}
    runs.write_whole(folder / "table.json", (json.dumps(content, indent=1) + "\n").encode())
    _draw(table, values, title, folder / "table.png")
    terminal.table(rows, f"{title}\n{note}")
    return rows


def _draw(table: Table, values: list[dict], title: str, path: Path) -> None:
    """Accuracy of each row, ours with its spread and published, a panel for each column."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    present = {cell["row"] for cell in values}
    names, columns = [name for name in table.rows if name in present], list(dict.fromkeys(cell["column"] for cell in values))
    figure = Figure(figsize=(2 + 3.2 * len(columns), 1.6 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)
    for axes, column in zip(panels[0], columns):
        for cell in [value for value in values if value["column"] == column]:
            place = names.index(cell["row"])
            ours = cell["last"]["all"] if table.published == "last" else cell["best"]
            if ours:
                axes.errorbar(np.mean(ours), place, xerr=np.std(ours, ddof=1) if len(ours) > 1 else None, fmt="o", color="C0")
            if cell["published"]:
                axes.plot(cell["published"]["all"], place, "|", color="C1", markersize=12, markeredgewidth=2)
        axes.set(title=column, xlabel=f"top-1 of the {table.published} epoch (%)")
        axes.grid(alpha=0.3, axis="x")
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].set_ylim(len(names) - 0.5, -0.5)
    if table.compared:
        handles = [Line2D([], [], marker="o", ls="", color="C0"), Line2D([], [], marker="|", ls="", color="C1")]
        figure.legend(handles, ["ours", "published"], loc="outside lower center", ncols=2)
    figure.suptitle(title, wrap=True, fontsize="medium")
    figure.savefig(path, dpi=130)


@functools.cache
def _load(path: str, overrides: tuple[str, ...], seed: int) -> Experiment:
    return load_config(path, overrides, seed)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or _key(name)


def _key(*parts) -> str:
    """Eight digits that tell apart what is made from different settings."""
    plain = [part.model_dump(mode="json") if isinstance(part, Section) else _plain(part) for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def _plain(part):
    return part if isinstance(part, str) else to_json(part)
