"""A table of experiments as a YAML file: its schema, how it is read and checked, and the part of it that is asked for."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict, ValidationError

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import explain
from offline_bkd.pipeline.schema import Section
from offline_bkd.pipeline.yaml_files import read_yaml

TABLES = Path(__file__).parent.parent.parent / "configs" / "tables"
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

    table = _with_whole_paths(table, path.parent)
    for name, row in table.rows.items():
        _refuse_unfit(path, table, name, row)
    return table


def _with_whole_paths(table: Table, folder: Path) -> Table:
    """The same table with its files named from the root; a table names them from its own `folder`."""

    def placed(section, *keys: str):
        files = {key: getattr(section, key) for key in keys}
        return section.model_copy(update={key: str((folder / file).resolve()) for key, file in files.items() if file})

    columns = {name: placed(column, "config", "quick") for name, column in table.columns.items()}
    rows = {name: placed(row, "config") for name, row in table.rows.items()}
    return table.model_copy(update={"columns": columns, "rows": rows})


def _refuse_unfit(path: Path, table: Table, name: str, row: Row) -> None:
    """Raises UserError if the row `name` speaks of rows or columns that the table does not have, or of what no row may."""
    backbone = row.backbone and table.rows.get(row.backbone)
    if row.backbone and backbone is None:
        raise UserError(f"{path}: rows.{name}.backbone: there is no row {row.backbone!r}")
    if backbone and backbone.backbone:
        raise UserError(f"{path}: rows.{name}.backbone: row {row.backbone!r} takes its backbone from another; name that")
    if row.stage == "teacher" and (row.teachers != (Member(),) or row.backbone):
        raise UserError(f"{path}: rows.{name}: a teacher learns from none; leave out teachers and backbone")
    if unknown := set(row.published) - set(table.columns):
        raise UserError(f"{path}: rows.{name}.published: there is no column {', '.join(sorted(unknown))}")
    if unknown := set(row.columns or ()) - set(table.columns):
        raise UserError(f"{path}: rows.{name}.columns: there is no column {', '.join(sorted(unknown))}")
    for column in table.columns if backbone else ():
        if row.stands_in(column) and not backbone.stands_in(column):
            raise UserError(f"{path}: rows.{name}.backbone: row {row.backbone!r} is not in the column {column!r}")


def select(table: Table, rows: tuple[str, ...], columns: tuple[str, ...], seeds: tuple[int, ...], quick: bool) -> Table:
    """The part of `table` that is asked for; nothing asked for is everything. Raises UserError for unknown names."""
    for kind, asked, known in ("row", rows, table.rows), ("column", columns, table.columns):
        if unknown := [name for name in asked if name not in known]:
            raise UserError(f"the table has no {kind} {unknown[0]!r}; it has {', '.join(known)}")
    kept = {name: column for name, column in table.columns.items() if not columns or name in columns}
    if quick:
        if lacking := [name for name in columns if not kept[name].quick]:
            raise UserError(f"column {lacking[0]!r} has no small version; name other columns, or leave out --quick")
        kept = {name: column for name, column in kept.items() if column.quick}
        if not kept:
            raise UserError("no column of the table has a small version; leave out --quick")
    chosen = {name: row for name, row in table.rows.items() if not rows or name in rows}
    for name in rows:
        if not any(chosen[name].stands_in(column) for column in kept):
            raise UserError(f"the table has no {name} in {' or '.join(kept)}; its rows name their columns")
    part = table.model_copy(update={"columns": kept, "rows": chosen, "seeds": seeds or table.seeds})
    if not part.cells:
        raise UserError(f"the table has no {' or '.join(chosen)} in {' or '.join(kept)}; its rows name their columns")
    return part
