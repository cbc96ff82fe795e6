"""What commands print: tables of plain values, readable on a terminal and in a file."""

import sys

from rich.console import Console
from rich.table import Table

COLUMNS = {"all": "top1", "many": "many", "medium": "medium", "few": "few"}


def table(rows: list[list[str]], title: str, heading: bool = True) -> None:
    """A table of text, its heading first."""
    shown = Table(show_header=heading)
    for index, name in enumerate(rows[0]):
        shown.add_column(name, justify="left" if not index or not heading else "right", overflow="fold")
    for row in rows[heading:]:
        shown.add_row(*row)
    # text of the user's is no markup; a file has no width to fit into
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)
    console.print(title)
    console.print(shown)


def scores(values: dict, title: str) -> None:
    """`metrics.scores` by shot group."""
    cells = ["–" if values[key] is None else f"{values[key]:.2f}" for key in COLUMNS.values()]
    table([list(COLUMNS), cells], f"{title}: test accuracy, %")


def facts(values: dict, title: str) -> None:
    """One line a fact; nested values by dotted name."""
    table([[name, text] for name, text in _leaves(values)], title, heading=False)


def _leaves(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and len(value) > 12:
            yield f"{prefix}{key}", f"{len(value)} values: {', '.join(map(str, value[:4]))}, …"
        else:
            yield f"{prefix}{key}", f"{value:,.4g}" if isinstance(value, float) else str(value)
