"""What commands print: tables of plain values, readable on a terminal and in a file."""

from rich.console import Console
from rich.table import Table

COLUMNS = {"all": "top1", "many": "many", "medium": "medium", "few": "few"}


def table(rows: list[list[str]], title: str) -> None:
    """A table of text, its heading first."""
    shown = Table(title=title, title_justify="left")
    for index, heading in enumerate(rows[0]):
        shown.add_column(heading, justify="right" if index else "left", overflow="fold")
    for row in rows[1:]:
        shown.add_row(*row)
    Console(highlight=False).print(shown)


def scores(values: dict, title: str) -> None:
    """`metrics.scores` by shot group."""
    cells = ["–" if values[key] is None else f"{values[key]:.2f}" for key in COLUMNS.values()]
    table([list(COLUMNS), cells], f"{title}: test accuracy, %")


def facts(values: dict, title: str) -> None:
    """One line a fact; nested values by dotted name."""
    table([["", ""], *([name, text] for name, text in _leaves(values))], title)


def _leaves(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and len(value) > 12:
            yield f"{prefix}{key}", f"{len(value)} values: {', '.join(map(str, value[:4]))}, …"
        else:
            yield f"{prefix}{key}", f"{value:,.4g}" if isinstance(value, float) else str(value)
