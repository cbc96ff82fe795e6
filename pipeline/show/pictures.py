"""Pictures of runs: curves, accuracy over class size, calibration, confusion. Matplotlib is imported where it draws.

A `plot_…` function fills one pair of axes; `save_png` and `to_svg` make figures of them. Lines differ in colour (Okabe and
Ito's, which colour-blind readers tell apart) and in dashes.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np

from offline_bkd.cache.shots import SHOTS, shot_groups
from offline_bkd.pipeline import metrics, runs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # as many as have no common factor with the colours
MARKERS = ("o", "s", "^", "D", "v")
PNG_END = b"IEND\xaeB`\x82"

GROUPS = {"all classes": "all", **{f"{group}-shot classes": group for group in SHOTS}}  # as titles

Epochs = list[dict]  # the records of a run's metrics.jsonl
Plot = Callable[[object], None]  # fills matplotlib axes


def is_whole_png(path: Path) -> bool:
    """Whether there is a PNG at `path` that was written to its end."""
    try:
        data = runs.read(path)
    except OSError:
        return False
    return data.startswith(b"\x89PNG") and data.endswith(PNG_END)


def save_png(path: Path, plots: Sequence[Plot | None], size: tuple[float, float], columns: int = 1) -> None:
    """A figure of `size` inches with a pair of axes for each plot, whole or absent.

    The lines of the first plot are explained where None stands in place of a plot, or else below.
    """
    with names_as_they_are():
        save(_figure(plots, size, columns), path)


def save(figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    runs.write_whole(path, data.getvalue())


def to_svg(plot: Plot, size: tuple[float, float]) -> str:
    """A figure of one plot as SVG; text stays text."""
    import matplotlib

    with names_as_they_are(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 11}):
        figure = _figure([plot], size, 1)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


@contextmanager
def names_as_they_are():
    """A context to draw in: no mathematics between dollars, no warning for characters that the font lacks."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _figure(plots: Sequence[Plot | None], size: tuple[float, float], columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = np.ravel(figure.subplots(-(-len(plots) // columns), columns, squeeze=False))
    for axes, plot in zip_longest(panels, plots):
        plot(axes) if plot else axes.axis("off")
    lines, names = panels[0].get_legend_handles_labels()
    look = {"fontsize": "small", "handlelength": 3.5}
    if None in plots:
        panels[plots.index(None)].legend(lines, names, loc="center", ncols=1 + len(lines) // 12, **look)
    elif lines:
        figure.legend(lines, names, loc="outside lower center", ncols=max(1, int(size[0] // 2.3)), **look)
    return figure


def style(index: int) -> dict:
    """How the line of that number looks."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def plot_loss(axes, runs_by_name: dict[str, list[Epochs]]) -> None:
    """Training loss by epoch, a line a run; the runs of a name look alike."""
    losses = []
    for index, (name, several) in enumerate(runs_by_name.items()):
        for number, epochs in enumerate(several):
            losses += (values := [record["loss"] for record in epochs])
            axes.plot([record["epoch"] for record in epochs], values, label=None if number else name, **style(index))
    positive = [loss for loss in losses if loss > 0]  # one class alone has none to lose
    if positive:
        _plain_log_scale(axes, min(positive), max(positive))
    axes.set(title="training loss", xlabel="epoch")
    _grid(axes)


def plot_accuracy(axes, runs_by_name: dict[str, list[Epochs]], key: str, title: str) -> None:
    """Test accuracy by epoch: of all images (`key` "top1") or of a shot group."""
    for index, (name, several) in enumerate(runs_by_name.items()):
        for number, epochs in enumerate(several):
            evaluated = [record for record in epochs if record.get("test") and record["test"][key] is not None]
            axes.plot(
                [record["epoch"] for record in evaluated],
                [record["test"][key] for record in evaluated],
                marker="." if len(evaluated) < 40 else None,
                label=None if number else name,
                **style(index),
            )
    axes.set(title=title, xlabel="epoch", ylabel="test accuracy (%)")
    _grid(axes)


def curve_plots(runs_by_name: dict[str, list[Epochs]]) -> dict[str, Plot]:
    """A plot of the training loss, and of the test accuracy overall and by each shot group that was tested."""
    plots = {"training loss": lambda axes: plot_loss(axes, runs_by_name)}
    every = [record for several in runs_by_name.values() for epochs in several for record in epochs]
    tested = [record["test"] for record in every if record.get("test")]
    for title, group in GROUPS.items():
        key = "top1" if group == "all" else group
        if any(scores[key] is not None for scores in tested):
            plots[title] = lambda axes, key=key, title=title: plot_accuracy(axes, runs_by_name, key, title)
    return plots


def plot_classes(axes, scores: dict[str, dict], class_counts: np.ndarray) -> None:
    """Accuracy of every class over its training samples, with a running mean where there are many classes.

    `scores`: by name, with "top1" and "per_class" [C] in percent; `class_counts` [C].
    """
    order = np.argsort(-class_counts, kind="stable")[: np.count_nonzero(class_counts)]  # an expert's are some alone
    rank = np.arange(len(order))
    window = max(1, len(order) // 10)
    for index, (name, score) in enumerate(scores.items()):
        accuracy = np.array([np.nan if value is None else value for value in score["per_class"]], float)[order]
        label, look = f"{name} ({score['top1']:.1f} % all)", style(index)
        marker = MARKERS[index % len(MARKERS)]
        if window == 1:
            axes.plot(rank, accuracy, marker=marker, markersize=5, label=label, **look)
            continue
        size = 3 if len(order) < 300 else 1.5
        dots = {"marker": marker, "color": look["color"], "alpha": 0.3, "markersize": size, "markeredgewidth": 0}
        axes.plot(rank, accuracy, linestyle="", rasterized=len(order) > 300, **dots)
        axes.plot(rank, _running_mean(accuracy, window), label=label, linewidth=2, **look)
    _mark_shot_groups(axes, class_counts[order])
    ticks = np.unique(np.linspace(0, len(order) - 1, min(len(order), 11)).astype(int))
    axes.set_xticks(ticks, [f"{count:,}" for count in class_counts[order][ticks]])
    axes.set(xlabel="training samples of the class", ylabel="test accuracy (%)", ylim=(0, 109), xlim=(-0.5, len(order) - 0.5))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(alpha=0.3, axis="y")


def _running_mean(accuracy: np.ndarray, window: int) -> np.ndarray:
    known, near = ~np.isnan(accuracy), np.ones(2 * (window // 2) + 1)
    with np.errstate(invalid="ignore"):  # no class near here was tested: no line
        return np.convolve(np.where(known, accuracy, 0), near, "same") / np.convolve(known, near, "same")


def _mark_shot_groups(axes, sorted_counts: np.ndarray) -> None:
    """Shades the medium-shot classes, and names each group inside its own band, upright where that is narrow."""
    start, inches = 0, axes.figure.get_figwidth() - 1
    for group, members in shot_groups(sorted_counts).items():
        if not members.any():
            continue
        end = start + members.sum()
        if group == "medium":
            axes.axvspan(start - 0.5, end - 0.5, color="black", alpha=0.06, lw=0)
        room = inches * (end - start) / len(sorted_counts)
        text = next((text for text in (f"{group}-shot", group) if 0.085 * len(text) < room), None)
        upright = {} if text else {"rotation": 90, "va": "top", "y": 107}
        place = {"x": (start + end - 1) / 2, "y": 102, "ha": "center", "va": "bottom", "color": "dimgrey", "fontsize": 9}
        axes.text(s=text or group, clip_on=True, **place | upright)
        start = end


def plot_calibration(axes, title: str, bins_by_name: dict[str, list[dict]]) -> None:
    """Accuracy over confidence, a line a name; on the diagonal they agree. `bins_by_name`: parts of `metrics.calibration`.

    A name without bins keeps its place, so that a method looks alike in all pictures.
    """
    axes.plot([0, 100], [0, 100], color="grey", linewidth=1)
    for index, (name, bins) in enumerate(bins_by_name.items()):
        held = [part for part in bins if part["images"]]
        if not held:
            continue
        look = style(index) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        axes.plot([part["confidence"] for part in held], [part["accuracy"] for part in held], label=name, **look)
    axes.set(title=title, xlabel="confidence (%)", ylabel="test accuracy (%)", xlim=(-2, 102), ylim=(-2, 102))
    axes.grid(alpha=0.3)


def plot_confusion(axes, pairs: metrics.Pairs, class_counts: np.ndarray, classes: Sequence[str]) -> None:
    """How often each class is taken for each, the classes with most training samples first.

    Up to 30 classes have their names; beyond 100, neighbours share a cell, so that single errors stay visible.
    """
    seen = class_counts > 0  # an expert's are some alone
    seen[pairs.predicted] = True
    order = np.argsort(-class_counts, kind="stable")
    order = order[seen[order]]
    cells = min(len(order), 100)
    cell = np.zeros(len(class_counts), int)
    cell[order] = np.arange(len(order)) * cells // len(order)
    counts = np.zeros((cells, cells))
    np.add.at(counts, (cell[pairs.label], cell[pairs.predicted]), pairs.images)
    with np.errstate(invalid="ignore"):
        shares = 100 * counts / counts.sum(1, keepdims=True)
    image = axes.imshow(np.sqrt(np.nan_to_num(shares)), cmap="Blues", vmin=0, vmax=10)  # roots: few errors are seen too
    bar = axes.figure.colorbar(image, ax=axes, label="of the true class's images (%)", shrink=0.7)
    bar.set_ticks([0, 1, 3, 5, 7, 10], labels=["0", "1", "9", "25", "49", "100"])
    shared = f" ({len(order) / cells:.0f} classes a cell)" if cells < len(order) else ""
    axes.set(xlabel=f"predicted{shared}", ylabel=f"true class{shared}")
    if len(order) <= 30:
        names = [_short(classes[index], 14) for index in order]
        axes.set_xticks(range(cells), names, rotation=90, fontsize=7)
        axes.set_yticks(range(cells), names, fontsize=7)
        return
    ends = np.cumsum([members.sum() for members in shot_groups(class_counts[order]).values()]) * cells / len(order)
    middles = (ends + [0, *ends[:-1]]) / 2 - 0.5
    shown = [(middle, group) for middle, group, width in zip(middles, SHOTS, np.diff([0, *ends])) if width]
    axes.set_xticks([middle for middle, _ in shown], [group for _, group in shown])
    axes.set_yticks([middle for middle, _ in shown], [group for _, group in shown], rotation=90, va="center")
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="grey", linewidth=0.5)
        axes.axvline(end - 0.5, color="grey", linewidth=0.5)


def plot_worst_pairs(axes, worst: Sequence[dict]) -> None:
    """Bars: the classes most often taken for another ("label", "predicted"), by name, with the number of "images"."""
    rows = [f"{_short(pair['label'], 30)} → {_short(pair['predicted'], 30)}" for pair in worst]
    axes.barh(range(len(worst)), [pair["images"] for pair in worst], color=COLOURS[0])
    axes.set_yticks(range(len(worst)), rows, fontsize=8)
    axes.set(title="most frequent confusions: true → predicted", xlabel="test images", ylim=(max(len(worst), 1) - 0.5, -0.5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, axis="x")


def save_curves(path: Path, runs_by_name: dict[str, list[Epochs]]) -> None:
    """Training loss and test accuracies, overall and by shot group, of the runs of each name."""
    save_png(path, [*curve_plots(runs_by_name).values(), None], (12, 7), columns=3)


def save_classes(path: Path, scores: dict[str, dict], class_counts: np.ndarray) -> None:
    """Accuracy over class size."""
    save_png(path, [lambda axes: plot_classes(axes, scores, class_counts)], (10, 5.4))


def save_confusion(
    path: Path, pairs: metrics.Pairs, class_counts: np.ndarray, classes: Sequence[str], worst: Sequence[dict]
) -> None:
    """The whole confusion matrix, and beside it its worst pairs by name."""
    plots = [
        lambda axes: plot_confusion(axes, pairs, class_counts, classes),
        lambda axes: plot_worst_pairs(axes, worst),
    ]
    save_png(path, plots, (13, 5.5), columns=2)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _plain_log_scale(axes, low: float, high: float) -> None:
    """A logarithmic scale whose ticks are plain numbers: 0.2, not 2 × 10⁻¹."""
    from matplotlib import ticker

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if high > 8 * low else ticker.MaxNLocator(5))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _grid(axes) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
