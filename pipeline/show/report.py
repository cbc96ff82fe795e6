"""Comparing complete runs, from their files alone: a table, pictures, and a page that holds both and more."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.runs.record import Scores
from offline_bkd.pipeline.show import page, pictures
from offline_bkd.pipeline.show.seeds import Seeds, group_by_seed, run_name
from offline_bkd.pipeline.show.tables import spread, write_csv, write_markdown
from offline_bkd.pipeline.show.terminal import COLUMNS

FILES = "runs.json", "table.md", "table.csv", "curves.png", "accuracy_by_class.png", "report.html"  # as they are written


class Report(NamedTuple):
    answer: str  # for a person, in a sentence
    table: list[list[str]]  # its heading first


def draw_run(run: runs.Run) -> None:
    """curves.png and accuracy_by_class.png of one run, where they are missing or torn; a student's shows its teacher too."""
    curves, classes = run.folder / "curves.png", run.folder / "accuracy_by_class.png"
    if pictures.is_whole_png(curves) and pictures.is_whole_png(classes):
        return
    summary = run.summary()
    scores = {run_name(run): summary["last"]}
    try:
        tested = Scores.model_validate((summary["teacher"] or {}).get("test")).model_dump()
    except ValidationError:  # an average of teachers was never tested, and another's description is free
        tested = {"per_class": []}
    if len(tested["per_class"]) == len(summary["classes"]):
        scores = {"teacher": tested, **scores}
    pictures.save_curves(curves, {run_name(run): [run.metrics(summary["last"]["epoch"])]})
    pictures.save_classes(classes, scores, np.array(summary["class_counts"]))


def write_report(folders: Sequence[str], out: str) -> Report:
    """Compares complete runs of one data set. Writes FILES into the folder `out`, over those of a report that is there.

    Runs that differ in nothing but the seed are one row: mean and standard deviation.
    """
    opened = [runs.open_run(folder) for folder in folders]
    first = opened[0].summary()
    for run in opened:
        if any(run.summary()[part] != first[part] for part in ("dataset", "test_dataset")):
            raise UserError(f"{run.folder} and {folders[0]} were trained or tested on different data; report them apart")
    lines = group_by_seed(opened)
    runs.make_folder(Path(out), FILES)
    table = [["method", "seeds", *COLUMNS, "best epoch's all"]]
    for line in lines:
        scores = [spread(line.last(column)) for column in COLUMNS.values()]
        table.append([line.name, str(len(line.runs)), *scores, spread(line.best)])
    report = Report(answer(lines), table)
    class_counts = np.array(first["class_counts"])
    epochs = {line.name: line.epochs for line in lines}
    text = json.dumps([what_was_run(run) for run in opened], indent=1)
    runs.write_whole(Path(out) / "runs.json", f"{text}\n".encode())  # first: with it, what was interrupted may be replaced
    write_markdown(Path(out) / "table.md", table)
    write_csv(Path(out) / "table.csv", table)
    pictures.save_curves(Path(out) / "curves.png", epochs)
    scores = {line.name: line.class_scores for line in lines}
    pictures.save_classes(Path(out) / "accuracy_by_class.png", scores, class_counts)
    page.write_page(Path(out) / "report.html", report.answer, report.table, lines)
    return report


def what_was_run(run: runs.Run) -> dict:
    """A run in one object: what it was, by which command, and what it reached."""
    config, summary, environment = run.config(), run.summary(), run.environment()
    ratio = config.data.imbalance_ratio
    scores = {
        name: {column: None if (score := summary[name][key]) is None else round(score, 4) for column, key in COLUMNS.items()}
        for name in ("last", "best")
    }
    return {
        "data": config.name if ratio is None else config.name.removesuffix(f"-{ratio:g}"),
        "ratio": ratio,
        "method": summary["method"],
        "seed": summary["seed"],
        "epochs": summary["last"]["epoch"],
        "precision": config.network(run.stage).training.precision,
        "device": environment["device"],
        "commit": environment.get("commit"),
        "command": environment["command"],
        "seconds": summary.get("seconds"),
        "last": {"epoch": summary["last"]["epoch"], **scores["last"]},
        "best": {"epoch": summary["best"]["epoch"], **scores["best"]},
    }


def answer(lines: Sequence[Seeds]) -> str:
    """Which method is best, and by how much: over the teacher, or else over the next best."""

    def mean(line: Seeds, key: str) -> float | None:
        return None if None in line.last(key) else float(np.mean(line.last(key)))

    best, *others = sorted(lines, key=lambda line: -mean(line, "top1"))
    few = mean(best, "few")
    sentence = f"{best.name}: {mean(best, 'top1'):.1f} % of the test images are right"
    if few is not None:
        sentence += f", {few:.1f} % in few-shot classes"
    if others:
        other = next((line for line in others if line.summaries[0]["method"] == "teacher"), others[0])
        sentence += f"; {mean(best, 'top1') - mean(other, 'top1'):+.1f} points over {other.name}"
        if few is not None and mean(other, "few") is not None:
            sentence += f", {few - mean(other, 'few'):+.1f} in few-shot classes"
    return sentence
