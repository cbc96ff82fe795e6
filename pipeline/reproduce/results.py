"""The finished table: ours beside the published numbers, as Markdown, CSV, JSON and a picture."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, FiniteFloat

from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.reproduce.plan import Cells
from offline_bkd.pipeline.reproduce.table import Published, Table
from offline_bkd.pipeline.show import pictures, terminal
from offline_bkd.pipeline.show.tables import spread, write_csv, write_markdown


class Cell(BaseModel):
    seeds: list[int]
    last: dict[str, list[FiniteFloat | None]]
    best: list[FiniteFloat]


class KeptTable(BaseModel):
    """What a later command reads of table.json."""

    title: str
    cells: list[Cell]


def refuse_other(table: Table, folder: Path, quick: bool) -> list[int]:
    """Raises UserError if `folder` is a file or holds another table than `table`; the seeds of what it holds of this."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    try:
        kept = runs.read_json(folder / "table.json", KeptTable)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'table.json'} is damaged ({runs.reason(error)}); move it away, or name another --out")
    if kept["title"] != _title(table, quick):
        raise UserError(f"--out {folder} holds another table ({kept['title']!r}); name another folder")
    return [seed for cell in kept["cells"] for seed in cell["seeds"]]


def write_table(table: Table, cells: Cells, folder: Path, quick: bool, asked: list[tuple[str, str]]) -> list[list[str]]:
    """Writes table.md, .csv, .json and .png from the runs that are complete, and prints the table. Returns its rows.

    A (column, row) that is not `asked` for has a line where there is a run of it.
    """
    title = _title(table, quick)
    heading = ["data", "method", "seeds", *terminal.COLUMNS, "best epoch's all"]
    note = "All, many, medium, few: top-1 of the last epoch, %."
    if table.compared:
        heading += ["published", "difference"]
        note += f" Difference: our {table.published} epoch minus published."
    rows, values = [heading], []
    for column, name in table.cells:
        jobs = [cells[name, column, seed] for seed in table.seeds]
        summaries = [runs.open_run(job.out).summary() for job in jobs if job.done]
        if summaries or (column, name) in asked:
            published = table.rows[name].published.get(column)
            rows.append([column, name, *_texts(table, summaries, published)])
            values.append({"column": column, "row": name, **_numbers(summaries, published)})
    write_markdown(folder / "table.md", rows, names=2, before=[f"# {title}", "", note, ""])
    write_csv(folder / "table.csv", rows)
    runs.write_json(folder / "table.json", {"title": title, "published": table.published, "cells": values})
    draw(table, values, title, folder / "table.png")
    terminal.sentence(_answer(table, values))
    terminal.table(rows, f"{title}\n{note}")
    return rows


def _title(table: Table, quick: bool) -> str:
    if not quick:
        return table.title
    small = f"{table.title} — quick: a small recipe, not the papers'"
    return f"{small}; published numbers are of the full one" if table.compared else small


def _answer(table: Table, values: list[dict]) -> str:
    """How much of the table is there, and how far it is from what was published."""
    cells = f"{sum(bool(cell['seeds']) for cell in values)} of {len(values)} cells have complete runs"
    key = {"last": lambda cell: cell["last"]["all"], "best": lambda cell: cell["best"]}[table.published]
    differences = {
        f"{cell['row']}, {cell['column']}": np.mean(key(cell)) - cell["published"]["all"]
        for cell in values
        if cell["seeds"] and cell["published"]
    }
    if not differences:
        return cells
    name = max(differences, key=lambda name: abs(differences[name]))
    mean = np.mean([abs(difference) for difference in differences.values()])
    return f"{cells}; from published numbers they are {mean:.2f} points away on average, {name} most: {differences[name]:+.2f}"


def _texts(table: Table, summaries: list[dict], published: Published | None) -> list[str]:
    """A cell's line of the table, from the number of its seeds on."""

    def over_seeds(epoch: str, key: str) -> str:
        return spread([summary[epoch][key] for summary in summaries])

    texts = [str(len(summaries)), *[over_seeds("last", key) for key in terminal.COLUMNS.values()], over_seeds("best", "top1")]
    if not table.compared:
        return texts
    if published is None:
        return [*texts, "–", "–"]
    ours = [summary[table.published]["top1"] for summary in summaries]
    return [*texts, f"{published.all:.2f}", f"{np.mean(ours) - published.all:+.2f}" if ours else "–"]


def _numbers(summaries: list[dict], published: Published | None) -> dict:
    return {
        "seeds": [summary["seed"] for summary in summaries],
        "last": {label: [summary["last"][key] for summary in summaries] for label, key in terminal.COLUMNS.items()},
        "best": [summary["best"]["top1"] for summary in summaries],
        "published": published and published.model_dump(),
    }


def draw(table: Table, values: list[dict], title: str, path: Path) -> None:
    """A picture of the accuracy of each row, ours with its spread and published, a panel for each column."""
    with pictures.names_as_they_are():
        pictures.save(_figure(table, values, title), path)


def _figure(table: Table, values: list[dict], title: str):
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
    return figure
