"""Tables of text as files: Markdown and CSV; and how a number of runs is one cell."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offline_bkd.pipeline import runs
from offline_bkd.pipeline.show.terminal import printable

Rows = Sequence[Sequence[str]]  # the heading first


def write_markdown(path: Path, rows: Rows, names: int = 1, before: Sequence[str] = ()) -> None:
    """The table after the lines `before`; all but its first `names` columns are numbers."""
    rule = ["---"] * names + ["---:"] * (len(rows[0]) - names)
    lines = [*before, *("| " + " | ".join(map(_cell, row)) + " |" for row in (rows[0], rule, *rows[1:]))]
    runs.write_whole(path, "".join(f"{line}\n" for line in lines).encode())


def write_csv(path: Path, rows: Rows) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    runs.write_whole(path, text.getvalue().encode(errors="backslashreplace"))  # names of files may be no text


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def spread(values: Sequence[float | None]) -> str:
    """Percentages as "mean ± standard deviation", of one value as itself, of none as a dash."""
    if None in values or not values:
        return "–"
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
