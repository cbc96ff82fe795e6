"""Runs that are shown together: those that differ in nothing but the seed are one line, which has a name for people."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.runs import Run, experiment_of
from offline_bkd.pipeline.schema import METHODS


@dataclass
class Seeds:
    """Runs that differ in nothing but the seed: a line of the report."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @cached_property
    def summaries(self) -> list[dict]:
        return [run.summary() for run in self.runs]

    @cached_property
    def epochs(self) -> list[list[dict]]:
        """The records of each run's epochs."""
        return [run.metrics(summary["last"]["epoch"]) for run, summary in zip(self.runs, self.summaries)]

    def last(self, key: str) -> list[float | None]:
        """A score of the last epoch, of each seed."""
        return [summary["last"][key] for summary in self.summaries]

    @property
    def best(self) -> list[float]:
        """The top-1 accuracy of the best epoch, of each seed."""
        return [summary["best"]["top1"] for summary in self.summaries]

    @property
    def class_scores(self) -> dict:
        """What a picture over class size shows: means over seeds, of all test images and of each class."""
        return {"top1": float(np.mean(self.last("top1"))), "per_class": self.per_class}

    @cached_property
    def per_class(self) -> list[float | None]:
        """Accuracy of each class [C], the mean over seeds; None for a class that was not tested."""
        means = np.array(self.last("per_class"), float).mean(0)
        return [None if np.isnan(value) else float(value) for value in means]


def group_by_seed(opened: Sequence[Run]) -> list[Seeds]:
    """The runs by what they did, apart from the seed. A name that two experiments share gets a folder's."""
    lines: dict[str, Seeds] = {}
    for run in opened:
        summary = run.summary()
        line = lines.setdefault(json.dumps(experiment_of(run)), Seeds(run_name(run)))
        if same := [other.folder for other in line.runs if other.summary()["seed"] == summary["seed"]]:
            raise UserError(f"{run.folder} repeats the experiment and the seed of {same[0]}; name one of them")
        line.runs.append(run)
    _tell_apart(list(lines.values()), lambda run: run.folder.resolve().name)
    _tell_apart(list(lines.values()), lambda run: run.folder.resolve().parent)
    return list(lines.values())


def _tell_apart(lines: list[Seeds], place: Callable[[Run], object]) -> None:
    """Adds the place of its first run to each name that two lines share."""
    names = [line.name for line in lines]
    for line in lines:
        if names.count(line.name) > 1:
            line.name = f"{line.name} ({place(line.runs[0])})"


def run_name(run: Run) -> str:
    """What a person calls what the run was trained by, and for."""
    summary = run.summary()
    method, backbone = summary["method"], summary.get("backbone")
    own = f"{_title(method)} {run.stage}" if method in METHODS else method
    return f"{own} on {_title(backbone['method'])}" if backbone else own


def _title(method: str) -> str:
    """Of a summary's method, which may also be "teacher", "imported" or an expert."""
    return METHODS[method].title or METHODS[method].__name__ if method in METHODS else method
