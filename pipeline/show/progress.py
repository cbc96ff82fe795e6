"""How far long work is: a bar with throughput and time left on a terminal, plain lines with the same elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_SECONDS = 30  # between lines where there is no terminal
SHORT_SECONDS = 2  # what is done sooner prints none there


_open: list["Progress"] = []  # a terminal has room for one display, which those that are open at once share


class Progress:
    """A context: `advance` after each unit of work."""

    def __init__(self, what: str, total: int, done: int, unit: str = "", plain: bool = False, shown: bool = True):
        """`unit`: of `total`, where `what` does not end in it. `plain`: print lines where there is no terminal (for work
        that prints none of its own). `shown`: print at all."""
        self.what, self.total, self.done, self.plain, self.shown = what, total, done, plain, shown
        self.unit, self.described = (f" {unit}", f"{what} ({unit})") if unit else ("", what)
        self.start, self.first, self.last_line = time.monotonic(), done, time.monotonic()

    def __enter__(self) -> "Progress":
        self.bar = _open[0].bar if _open else _display(self.shown)
        self.task = self.bar.add_task(self.described, total=self.total, completed=self.done, rate="")
        _open.append(self)
        return self

    def __exit__(self, *_) -> None:
        _open.remove(self)
        self.bar.remove_task(self.task)
        if not _open:
            self.bar.stop()

    def advance(self, rate: float, rate_unit: str, units: int = 1) -> None:
        """`units` more are done, at `rate` in `rate_unit`."""
        self.done += units
        self.bar.update(self.task, advance=units, rate=f"{rate:,.0f} {rate_unit}")
        now = time.monotonic()
        ended = self.done == self.total and now - self.start > SHORT_SECONDS
        if self.plain and self.shown and self.bar.disable and (now - self.last_line > PLAIN_SECONDS or ended):
            self.last_line = now
            left = (now - self.start) / max(self.done - self.first, 1) * (self.total - self.done)
            print(
                f"{self.what} {self.done}/{self.total}{self.unit}  {rate:,.0f} {rate_unit}  {left:.0f} s left",
                flush=True,
            )


def _display(shown: bool) -> Bar:
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not (shown and console.is_terminal))
    bar.start()
    return bar
