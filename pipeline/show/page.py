"""A report as one page: a single HTML file with its pictures inside, which needs no network.

The rows are in the page; its script only sorts and searches them. All text from runs is escaped.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import numpy as np

from offline_bkd.cache.format import leaves
from offline_bkd.cache.shots import shot_groups
from offline_bkd.pipeline import runs
from offline_bkd.pipeline.show import pictures
from offline_bkd.pipeline.show.evaluation import KeptEvaluation, kept_evaluation
from offline_bkd.pipeline.show.seeds import Seeds
from offline_bkd.pipeline.show.tables import Rows, percent, spread
from offline_bkd.pipeline.show.terminal import printable

TEMPLATE = Path(__file__).with_suffix(".html")
SMALL, WIDE = (4.6, 3.7), (6.5, 4.6)  # inches; text stays readable at the width of a phone
CONFUSIONS = 10  # of each method


def write_page(path: Path, answer: str, table: Rows, lines: Sequence[Seeds]) -> None:
    """Writes the page about `lines`, of which there is one at least; `answer` is its first sentence, `table` their results."""
    summary = lines[0].summaries[0]
    counts = np.array(summary["class_counts"])
    kept = {line.name: found for line in lines for found in [_first_evaluation(line)] if found}
    sections = [
        _results(table, lines),
        _section("Accuracy over class size", _picture(_classes_plot(lines, counts), "accuracy over class size", WIDE)),
        _section("Curves", _pictures(pictures.curve_plots({line.name: line.epochs for line in lines}))),
        _calibration([line.name for line in lines], kept),
        _confusion(kept),
        _every_class(lines, summary["classes"], counts),
        _differences(lines),
    ]
    name = lines[0].runs[0].config().name
    title = f"{name}: {len(lines)} methods compared" if len(lines) > 1 else f"{name}: {lines[0].name}"
    text = Template(TEMPLATE.read_text()).substitute(
        title=_text(title), answer=_text(answer), sections="\n".join(section for section in sections if section)
    )
    runs.write_whole(path, text.encode())


def _results(table: Rows, lines: Sequence[Seeds]) -> str:
    """`table`, with what only the page has room for."""
    heading, *results = table
    rows = [[*heading, "top-5", "ECE", "time (s)"]]
    for result, line in zip(results, lines):
        last = [summary["last"] for summary in line.summaries]
        further = [
            spread([scores[key]["all"] if key in scores else None for scores in last])  # earlier versions had none
            for key in ("top5", "ece")
        ]
        seconds = np.mean([summary.get("seconds", np.nan) for summary in line.summaries])
        rows.append([*result, *further, "–" if np.isnan(seconds) else f"{seconds:,.0f}"])
    data = lines[0].summaries[0]
    note = (
        f"Trained on {data['dataset']['size']}, tested on {data['test_dataset']['size']}. Test accuracy of the last epoch, "
        "in %: of all images, and the mean over classes of many (more than 100), medium and few (below 20) training samples. "
        "ECE: the expected calibration error, in %. Several seeds: mean ± standard deviation."
    )
    return _section("Results", f'<p class="note">{_text(note)}</p>', _table(rows))


def _classes_plot(lines: Sequence[Seeds], counts: np.ndarray) -> pictures.Plot:
    scores = {line.name: line.class_scores for line in lines}
    return lambda axes: pictures.plot_classes(axes, scores, counts)


def _first_evaluation(line: Seeds) -> KeptEvaluation | None:
    return next((kept for kept in map(kept_evaluation, line.runs) if kept), None)


def _calibration(names: Sequence[str], kept: dict[str, KeptEvaluation]) -> str:
    if not kept:
        return _section("Calibration and confusions", '<p class="note">The command evaluate finds them; none was run.</p>')

    def bins(group: str) -> dict[str, list[dict]]:
        found = {name: kept[name].calibration.get(group, ()) if name in kept else () for name in names}
        return {name: [part.model_dump() for part in parts if part.images] for name, parts in found.items()}

    plots = {
        title: lambda axes, title=title, group=group: pictures.plot_calibration(axes, title, bins(group))
        for title, group in pictures.GROUPS.items()
        if any(bins(group).values())
    }
    return _section("Calibration", _pictures(plots))


def _confusion(kept: dict[str, KeptEvaluation]) -> str:
    parts = []
    for name, found in kept.items():
        rows = [["class", "taken for", "test images"]]
        for pair in found.worst_pairs[:CONFUSIONS]:
            rows.append([pair.label, pair.predicted, f"{pair.images} ({pair.share:.0f} %)"])
        parts.append(f"<div><h3>{_text(name)}</h3>{_table(rows, names=2)}</div>")
    return _section("Most frequent confusions", f'<div class="pictures">{"".join(parts)}</div>') if parts else ""


def _every_class(lines: Sequence[Seeds], classes: Sequence[str], counts: np.ndarray) -> str:
    groups = shot_groups(counts)
    shots = [
        "" if not count else next(group for group in groups if groups[group][index]) for index, count in enumerate(counts)
    ]
    headings = ["class", "training samples", "shots", *(line.name for line in lines)]
    head = "".join(f'<th scope="col"><button type="button">{_text(heading)}</button></th>' for heading in headings)
    rows = []
    for index in np.argsort(-counts, kind="stable"):
        values = [line.per_class[index] for line in lines]
        numbers = "".join(f'<td data-value="{"" if v is None else v}">{percent(v)}</td>' for v in values)
        about = f'<td data-value="{counts[index]}">{counts[index]:,}</td><td>{shots[index]}</td>'
        rows.append(f"<tr><td>{_text(classes[index])}</td>{about}{numbers}</tr>")
    search = '<input id="search" type="search" placeholder="search a class" aria-label="search a class"> '
    table = f'<table class="sortable" data-search="search" data-count="count"><thead><tr>{head}</tr></thead>'
    body = "\n".join(rows)
    return _section(
        "Every class",
        f'{search}<span id="count" class="note">{len(classes)} classes</span>',
        f'<div class="tall">{table}<tbody>\n{body}\n</tbody></table></div>',
    )


def _differences(lines: Sequence[Seeds]) -> str:
    """The settings that not all share, without those that change no result."""
    settings = [{key: _setting(value) for key, value in leaves(_compared(line.runs[0]))} for line in lines]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    rows = [["setting", *(line.name for line in lines)]]
    for key in keys:
        values = [values.get(key, "–") for values in settings]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if len(rows) == 1:
        return ""
    return _section("Differences between configurations", _table(rows, names=len(rows[0])))


def _compared(run: runs.Run) -> dict:
    """What a run depended on, with a teacher's and a student's settings under the same names; and where it ran."""
    config, environment = run.config(), run.environment()
    values = runs.settings(config, run.stage)
    del values["seed"]
    own = values.pop(run.stage)
    if config.network(run.stage).method.learns_from_cache:
        values["cache"] = {"digest": environment["learns_from"][:12], "temperature": config.cache.temperature}
    ran_on = {"device": environment["device"], "torch": environment["packages"].get("torch")}
    return {**own, **values, **ran_on}


def _setting(value: object) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def _table(rows: Rows, names: int = 1) -> str:
    """Rows of text, the heading first; of names alone, or with numbers after the first column."""
    head, *body = (
        "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th", *["td"] * (len(rows) - 1)])
    )
    kind = ' class="text"' if names > 1 else ""
    return f'<div class="scroll"><table{kind}><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def _pictures(plots: dict[str, pictures.Plot]) -> str:
    return f'<div class="pictures">{"".join(_picture(plot, name, SMALL) for name, plot in plots.items())}</div>'


def _picture(plot: pictures.Plot, name: str, size: tuple[float, float]) -> str:
    data = base64.b64encode(pictures.to_svg(plot, size).encode()).decode()
    wide = ' class="wide"' if size == WIDE else ""
    return f'<img{wide} alt="{_text(name)}" src="data:image/svg+xml;base64,{data}">'


def _text(text: str) -> str:
    return html.escape(printable(text))
