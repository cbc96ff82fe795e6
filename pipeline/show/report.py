"""Tables and pictures, made from runs' files alone. Matplotlib is imported where it draws: training should start without."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from offline_bkd.pipeline import UserError, metrics, runs
from offline_bkd.pipeline.show.terminal import COLUMNS

NAMES = {
    "teacher": "teacher",
    "ce": "CE student",
    "kd": "KD student",
    "bkd": "BKD student",
    "cb": "CB student",
    "focal": "Focal student",
    "cb_focal": "CB-Focal student",
    "logit_adjustment": "Logit-adjusted student",
    "ldam": "LDAM student",
    "crt": "cRT student",
    "cbd": "CBD student",
    "bbn": "BBN student",
    "lfme": "LFME student",
    "oltr": "OLTR student",
}


FEW = 6  # lines whose legend has room in the plot


def draw_run(run: runs.Run) -> None:
    """curves.png and accuracy_by_class.png of one run; a student's shows its teacher too."""
    summary = run.summary()
    scores = {name(summary): summary["last"]}
    if summary["teacher"] and "test" in summary["teacher"]:  # an average of teachers was never tested
        scores = {NAMES["teacher"]: summary["teacher"]["test"], **scores}
    _draw_curves([(name(summary), run.metrics(summary["last"]["epoch"]))], run.folder / "curves.png")
    _draw_classes(scores, np.array(summary["class_counts"]), run.folder / "accuracy_by_class.png")


def write_report(folders: list[str], out: str) -> list[list[str]]:
    """Compares complete runs of one data set: table.md, table.csv, curves.png, accuracy_by_class.png in the folder `out`.

    Returns the table, its heading first. Runs that differ in nothing but the seed are one row: mean and standard deviation.
    """
    out = Path(out)
    if (out / "config.yaml").exists():
        raise UserError(f"--out {out} is a run's folder; name another one")
    opened = [runs.open_run(folder) for folder in folders]
    summaries = [run.summary() for run in opened]
    for folder, summary in zip(folders, summaries):
        if any(summary[part] != summaries[0][part] for part in ("dataset", "test_dataset")):
            raise UserError(f"{folder} and {folders[0]} were trained or tested on different data; report them apart")
    groups = _grouped(folders, opened, summaries)
    table = [["method", "seeds", *COLUMNS, "best epoch's all"]]
    for label, group in groups.items():
        last = [spread([summary["last"][column] for summary, _ in group]) for column in COLUMNS.values()]
        table.append([label, str(len(group)), *last, spread([summary["best"]["top1"] for summary, _ in group])])
    rule = ["---"] + ["---:"] * (len(table[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in (table[0], rule, *table[1:])]
    text = io.StringIO()
    csv.writer(text).writerows(table)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}; name another folder")
    runs.write_whole(out / "table.md", ("\n".join(lines) + "\n").encode())
    runs.write_whole(out / "table.csv", text.getvalue().encode())
    _draw_curves([(label, records) for label, group in groups.items() for _, records in group], out / "curves.png")
    means = {
        label: {key: _mean([summary["last"][key] for summary, _ in group]) for key in ("top1", "per_class")}
        for label, group in groups.items()
    }
    _draw_classes(means, np.array(summaries[0]["class_counts"]), out / "accuracy_by_class.png")
    return table


def _grouped(folders: list[str], opened: list[runs.Run], summaries: list[dict]) -> dict[str, list[tuple[dict, list[dict]]]]:
    """(summary, epochs) of the runs by what they did, apart from the seed. A name that two experiments share gets a folder."""
    found: dict[str, dict] = {}
    for folder, run, summary in zip(folders, opened, summaries):
        backbone = summary.get("backbone")
        # a cache is one and the same for all seeds, a backbone has a seed of its own
        did = [runs.experiment_of(run), backbone or run.environment()["learns_from"]]
        group = found.setdefault(json.dumps(did), {"name": name(summary), "folder": folder, "seeds": {}})
        if summary["seed"] in group["seeds"]:
            raise UserError(f"{folder} repeats the experiment and the seed of another run; name each run once")
        group["seeds"][summary["seed"]] = summary, run.metrics(summary["last"]["epoch"])
    names = [group["name"] for group in found.values()]
    return {
        group["name"] if names.count(group["name"]) == 1 else f"{group['name']} ({Path(group['folder']).name})": list(
            group["seeds"].values()
        )
        for group in found.values()
    }


def name(summary: dict) -> str:
    """What a person calls the run's method."""
    own = NAMES.get(summary["method"], summary["method"])
    backbone = summary.get("backbone")
    return f"{own} on {NAMES.get(backbone['method'], backbone['method']).removesuffix(' student')}" if backbone else own


def spread(values: list[float | None]) -> str:
    """Percentages as "mean ± standard deviation", of one value as itself, of none as a dash."""
    if None in values:
        return "–"
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def _mean(values: list):
    return np.array(values, float).mean(0)


def _colour(index: int) -> str | tuple:
    """Ten colours, then ten paler ones."""
    import matplotlib

    return f"C{index}" if index < 10 else matplotlib.colormaps["tab20"](2 * (index % 10) + 1)


def _draw_curves(named: list[tuple[str, list[dict]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {method: _colour(index) for index, method in enumerate(dict.fromkeys(method for method, _ in named))}
    labelled = set()
    for method, records in named:
        colour, label = colours[method], None if method in labelled else method
        labelled.add(method)
        evaluated = [record for record in records if "test" in record]
        left.plot([r["epoch"] for r in records], [r["loss"] for r in records], color=colour, label=label)
        epochs, marker = [r["epoch"] for r in evaluated], "." if len(evaluated) < 40 else None
        right.plot(epochs, [r["test"]["top1"] for r in evaluated], color=colour, label=label, marker=marker)
    some = any(record["loss"] > 0 for _, records in named for record in records)  # one class alone has none to lose
    left.set(xlabel="epoch", ylabel="training loss", yscale="log" if some else "linear")
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if len(colours) > FEW:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    else:
        left.legend()
        right.legend()
    figure.savefig(path, dpi=130)


def _draw_classes(scores: dict[str, dict], class_counts: np.ndarray, path: Path) -> None:
    """Accuracy of every class over its training samples, with a running mean where there are many classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(-class_counts, kind="stable")[: np.count_nonzero(class_counts)]  # an expert's are some alone
    rank = np.arange(len(order))
    window = max(1, len(order) // 10)
    for index, (method, score) in enumerate(scores.items()):
        accuracy = np.array([np.nan if value is None else value for value in score["per_class"]], float)[order]
        label = f"{method} ({score['top1']:.1f} % all)"
        if window == 1:
            axes.plot(rank, accuracy, "o-", color=_colour(index), label=label)
            continue
        axes.plot(rank, accuracy, ".", color=_colour(index), alpha=0.35)
        known, near = ~np.isnan(accuracy), np.ones(2 * (window // 2) + 1)
        with np.errstate(invalid="ignore"):  # no class near here was tested: no line
            means = np.convolve(np.where(known, accuracy, 0), near, "same") / np.convolve(known, near, "same")
        axes.plot(rank, means, color=_colour(index), label=label)
    start = 0
    for group, members in metrics.shot_groups(class_counts[order]).items():
        if members.any():
            end = start + members.sum()
            axes.axvspan(start - 0.5, end - 0.5, color="black", alpha=0.06 if group == "medium" else 0, lw=0)
            axes.text((start + end - 1) / 2, 101, f"{group}-shot", ha="center", va="bottom", color="dimgrey")
            start = end
    ticks = np.unique(np.linspace(0, len(order) - 1, min(len(order), 11)).astype(int))
    axes.set_xticks(ticks, class_counts[order][ticks])
    axes.set(xlabel="training samples of the class", ylabel="test accuracy (%)", ylim=(0, 107), xlim=(-0.5, len(order) - 0.5))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(alpha=0.3, axis="y")
    if len(scores) > FEW:
        figure.legend(loc="outside lower center", ncols=3)
    else:
        axes.legend(loc="lower left")
    figure.savefig(path, dpi=130)
