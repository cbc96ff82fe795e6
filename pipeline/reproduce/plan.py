"""From a table to its commands: each run and cache once, shared by all rows that ask for the same one."""

import functools
import hashlib
import json
import re
from pathlib import Path

import torch

from offline_bkd.cache.views import to_json
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.reproduce.execution import Job
from offline_bkd.pipeline.reproduce.table import Member, Table, select
from offline_bkd.pipeline.schema import HOW_READ, Data, Experiment, Section

Cells = dict[tuple[str, str, int], Job]  # (row, column, seed): the job whose run is scored there


def plan(whole: Table, table: Table, out: Path, device: torch.device, quick: bool) -> tuple[list[Job], Cells]:
    """All commands of `table`, a part of `whole`, those that others need first; and of each cell of `whole`, asked for or
    not, the student's or teacher's.

    Every configuration of `whole` is checked here, before anything runs.
    """
    planner = _Planner(whole, out, device, quick)
    planner.cells(table)
    asked = list(planner.jobs.values())
    return asked, planner.cells(select(whole, (), (), (), quick))


class _Planner:
    """Collects jobs by the folder that they make.

    A folder's key is of what its stage looks at alone, so that rows that differ elsewhere share a run.
    """

    def __init__(self, table: Table, out: Path, device: torch.device, quick: bool):
        self.table, self.out, self.device, self.quick = table, out, device, quick
        self.jobs: dict[Path, Job] = {}

    def cells(self, part: Table) -> Cells:
        return {(row, column, seed): self.cell(row, column, seed) for column, row in part.cells for seed in part.seeds}

    def cell(self, name: str, column: str, seed: int) -> Job:
        """The job of a row's run of `seed`."""
        row = self.table.rows[name]
        if row.stage == "teacher":
            return self.teacher(name, column, Member(seed=seed))
        experiment, options = self.experiment(name, column, seed)
        method, needs = experiment.student.method, []
        if (method.learns_from == "backbone") != (row.backbone is not None):
            what = "names no backbone" if row.backbone is None else f"names the backbone {row.backbone!r}"
            raise UserError(f"row {name!r} {what}, but is of method {method.name}; only crt and oltr have one")
        if method.learns_from == "backbone":
            needs = [self.cell(row.backbone, column, seed)]
            options = [*options, "--backbone", str(needs[0].out)]
        elif method.learns_from:
            self.refuse_teachers(name, column, method)
            needs = [self.cache(name, column)]
            options = [*options, "--cache", str(needs[0].out)]
        parts = experiment.data, experiment.views, experiment.cache, experiment.student
        key = _key(*parts, *[need.out.name for need in needs])
        return self.add(column, f"{_slug(name)}-{key}-{seed}", "train-student", *options, needs=needs)

    def refuse_teachers(self, name: str, column: str, method) -> None:
        """Raises UserError where a method that learns from experts would be given whole teachers, or the reverse."""
        teachers = [
            self.experiment(name, column, member.seed, member.set)[0].teacher for member in self.table.rows[name].teachers
        ]
        if any((teacher.expert is not None) != (method.learns_from == "experts") for teacher in teachers):
            wanted = "experts, so each of its teachers sets" if method.learns_from == "experts" else "no expert, so none sets"
            raise UserError(f"row {name!r}: method {method.name} learns from {wanted} teacher.expert")

    def teacher(self, name: str, column: str, member: Member) -> Job:
        experiment, options = self.experiment(name, column, member.seed, member.set)
        key = _key(experiment.data, experiment.views, experiment.teacher)
        return self.add(column, f"teacher-{key}-{member.seed}", "train-teacher", *options)

    def cache(self, name: str, column: str) -> Job:
        members = self.table.rows[name].teachers
        teachers = [self.teacher(name, column, member) for member in members]
        if len({teacher.out for teacher in teachers}) < len(teachers):
            raise UserError(f"row {name!r}: two of its teachers are the same; give them other seeds or settings")
        experiment, options = self.experiment(name, column, members[0].seed)
        key = _key(experiment.data, experiment.views, experiment.cache, *[teacher.out.name for teacher in teachers])
        for teacher in teachers:
            options = [*options, "--teacher", str(teacher.out)]
        return self.add(column, f"cache-{key}.zarr", "dump-logits", *options, needs=teachers)

    def experiment(self, name: str, column: str, seed: int, extra: tuple[str, ...] = ()) -> tuple[Experiment, list[str]]:
        """The experiment of a cell, and a command's options for it."""
        section, row = self.table.columns[column], self.table.rows[name]
        path, overrides = section.config, (*section.set, *row.set, *extra)
        if self.quick:
            path, overrides = section.quick, (*section.set, *self.table.quick, *row.set, *row.quick, *extra)
        if row.config:
            path, overrides = row.config, (f"base={path}", *overrides)
        try:
            experiment = _load(path, overrides, seed)
        except UserError as error:
            raise UserError(f"row {name!r}, column {column!r}: " + str(error).replace("\n", f"\nrow {name!r}: "))
        return experiment, ["--config", path, "--seed", str(seed), *(part for item in overrides for part in ("-o", item))]

    def add(self, column: str, folder: str, *arguments: str, needs: list[Job] | tuple = ()) -> Job:
        path = self.out / _slug(column) / folder
        return self.jobs.setdefault(path, Job(path, [*arguments, "--device", self.device.type], list(needs)))


@functools.cache
def _load(path: str, overrides: tuple[str, ...], seed: int) -> Experiment:
    return load_config(path, overrides, seed)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or _key(name)


def _key(*parts) -> str:
    """Eight digits that tell apart what is made from different settings."""
    plain = [  # a root may be all that tells two sets apart
        part.model_dump(mode="json", exclude=HOW_READ if isinstance(part, Data) else None)
        if isinstance(part, Section)
        else _plain(part)
        for part in parts
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def _plain(part):
    return part if isinstance(part, str) else to_json(part)
