"""What commands print: tables of plain values, readable on a terminal and in a file."""

import os
import re
import sys

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

COLUMNS = {"all": "top1", "many": "many", "medium": "medium", "few": "few"}

# what moves the cursor, recolours, or turns the order of what follows; and halves of characters, which cannot be printed
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` on one line, with what a terminal would obey rather than show as its escape, such as \\x1b."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def counted(number: int, one: str, several: str | None = None) -> str:
    """Of 1 and "block": "1 block"; of 1200: "1,200 blocks". `several`: the plural, if it is not formed by an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def table(rows: list[list[str]], title: str, heading: bool = True) -> None:
    """A table of text, its heading first."""
    shown = Table(show_header=heading)
    for index, name in enumerate(rows[0]):
        shown.add_column(printable(name), justify="left" if not index or not heading else "right", overflow="fold")
    for row in rows[heading:]:
        shown.add_row(*map(printable, row))
    for part in title.split("\n"):
        sentence(part)
    _console(140).print(shown)  # of a file, which has no width to fit into


def sentence(text: str) -> None:
    """A line, or as many as the terminal's width asks for."""
    text = printable(text)
    _console(cell_len(text)).print(text)


def _console(width: int) -> Console:
    """As wide as the terminal, or COLUMNS; `width` where neither is known."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        width = None
    return Console(highlight=False, markup=False, emoji=False, width=width)  # text of the user's is no markup


def line(text: str) -> None:
    """A line that is copied or read by programs, such as a path or a command: never broken."""
    print(printable(text), flush=True)


def facts(values: dict, title: str) -> None:
    """One line a fact; nested values by dotted name."""
    from offline_bkd.cache.format import leaves  # late: an error's line needs no Zarr

    table([[name, _text(value)] for name, value in leaves(values)], title, heading=False)


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 12:
        return f"{len(value)} values: {', '.join(map(str, value[:4]))}, …"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
