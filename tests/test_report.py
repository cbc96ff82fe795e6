"""Reports and evaluations: what they say is what the runs' files say, in files that are whole, whatever names are."""

import csv
import dataclasses
import errno
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from made_runs import class_counts, make_run
from matplotlib.figure import Figure

from offline_bkd.cache.storage import LocalStorage
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.evaluate import ask_run
from offline_bkd.pipeline.show import evaluation, pictures
from offline_bkd.pipeline.show.report import draw_run, write_report

NAMES = ["<script>alert(1)</script>", "a|b", "$\\frac$", "cat\x1b[2J", "猫", '"quoted" & more', "_hidden", "g", "h", "i"]
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Reads a page as a browser does: its tables, its pictures, and whatever it would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tables, self.sources, self.headings, self.cell = [], [], [], [], None
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data
        elif "h2" in self.open:
            self.headings.append(data)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Runs of a teacher, and of BKD with two seeds, on ten classes of odd names; the first two are evaluated."""
    root = tmp_path_factory.mktemp("compared")
    return [
        make_run(root / "teacher", NAMES, "teacher", skill=0.5),
        make_run(root / "bkd-0", NAMES, "bkd", seed=0, skill=0.7),
        make_run(root / "bkd-1", NAMES, "bkd", seed=1, skill=0.7, evaluated=False),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory, compared):
    """(what write_report returned, the folder)."""
    out = tmp_path_factory.mktemp("report")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # names that are mathematics or have no glyph are no trouble
        return write_report([str(run.folder) for run in compared], str(out)), out


@pytest.fixture(scope="module")
def page(report):
    return Page((report[1] / "report.html").read_text())


def table_under(page, first_cell):
    return next(table for table in page.tables if table[0][0] == first_cell)


def test_a_report_says_first_which_method_is_best_and_by_how_much(report, compared):
    last = [run.summary()["last"] for run in compared]
    all_, few = (np.mean([last[1][key], last[2][key]]) for key in ("top1", "few"))
    assert report[0].answer == (
        f"BKD student: {all_:.1f} % of the test images are right, {few:.1f} % in few-shot classes; "
        f"{all_ - last[0]['top1']:+.1f} points over teacher, {few - last[0]['few']:+.1f} in few-shot classes"
    )


def test_a_report_says_of_every_run_what_was_run_and_what_it_reached(report, compared):
    found = json.loads((report[1] / "runs.json").read_text())
    assert [(one["data"], one["ratio"], one["method"], one["seed"], one["epochs"]) for one in found] == [
        ("digits-lt", 20, "teacher", 0, 20),
        ("digits-lt", 20, "bkd", 0, 20),
        ("digits-lt", 20, "bkd", 1, 20),
    ]
    for one, run in zip(found, compared):
        last = run.summary()["last"]
        scores = {"all": last["top1"], **{group: last[group] for group in ("many", "medium", "few")}}
        assert one["last"] == {"epoch": 20, **{name: round(score, 4) for name, score in scores.items()}}
        assert one["best"]["epoch"] == 12 and one["best"]["all"] == round(run.summary()["best"]["top1"], 4)
        assert one["best"]["all"] > one["last"]["all"]
        assert one["precision"] == "float32" and one["seconds"] == 12.3 and one["commit"] == runs.commit()
        assert one["command"] == run.environment()["command"] and one["device"].startswith("cpu (")


def test_a_commit_is_of_the_checkout_alone(tmp_path, monkeypatch):
    """Not of the project that an installed package lies in."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(runs.record, "ROOT", tmp_path)
    assert runs.commit() == head
    (tmp_path / "file").write_text("2")
    assert runs.commit() == f"{head}-dirty"
    monkeypatch.setattr(runs.record, "ROOT", tmp_path / "site-packages")
    assert runs.commit() is None


def test_runs_on_backbones_of_one_experiment_are_a_row_whatever_their_seeds(tmp_path):
    teachers = [make_run(tmp_path / f"teacher-{seed}", NAMES, "teacher", seed=seed, evaluated=False) for seed in (0, 1)]
    other = make_run(tmp_path / "other", NAMES, "teacher", evaluated=False, overrides=["teacher.training.epochs=9"])
    students = [
        make_run(tmp_path / f"crt-{seed}", NAMES, "crt", seed, evaluated=False, backbone=runs.experiment_of(teacher))
        for seed, teacher in enumerate([*teachers, other])
    ]
    table = write_report([str(run.folder) for run in students], str(tmp_path / "report")).table
    assert [row[:2] for row in table[1:]] == [["cRT student on teacher (crt-0)", "2"], ["cRT student on teacher (crt-2)", "1"]]


def test_a_page_needs_nothing_from_elsewhere(page, report):
    text = (report[1] / "report.html").read_text()
    assert len(page.sources) == 10 and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "http://" not in re.sub('base64,[^"]*', "", text) and "https://" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_a_page_has_every_class_with_its_samples_and_the_mean_of_the_seeds(page, compared):
    table = next(table for table in page.tables if table[0][:2] == ["class", "training samples"])
    assert table[0] == ["class", "training samples", "shots", "teacher", "BKD student"] and len(table) == 11
    counts = class_counts(10)
    teacher, *students = (run.summary()["last"]["per_class"] for run in compared)
    for row in table[1:]:
        index = [name.replace("\x1b", "\\x1b") for name in NAMES].index(row[0])
        assert row[1] == str(counts[index])
        assert row[3:] == [f"{teacher[index]:.2f}", f"{(students[0][index] + students[1][index]) / 2:.2f}"]


def test_a_page_shows_scores_confusions_and_what_differs_in_the_configurations(page, report, compared):
    results = table_under(page, "method")
    assert [row[:7] for row in results] == report[0].table
    teacher, *students = ([run.summary()[epoch]["top1"] for epoch in ("last", "best")] for run in compared)
    for row, (last, best) in zip(results[1:], (teacher, np.mean(students, axis=0))):
        assert [float(row[place].split()[0]) for place in (2, 6)] == pytest.approx([last, best], abs=0.006)
    assert results[1][7] == f"{compared[0].summary()['last']['top5']['all']:.2f}"
    settings = {row[0]: row[1:] for row in table_under(page, "setting")[1:]}
    assert settings["method.name"] == ["ce", "bkd"] and "model.depth" not in settings
    assert settings["cache.digest"] == ["–", "cafecafecafe"] and settings["cache.temperature"] == ["–", "2.0"]
    kept = evaluation.kept_evaluation(compared[1])
    confused = [table for table in page.tables if table[0] == ["class", "taken for", "test images"]]
    assert len(confused) == 2 and len(confused[1]) == 11
    assert confused[1][1][2] == f"{kept.worst_pairs[0].images} ({kept.worst_pairs[0].share:.0f} %)"
    assert page.headings == [
        "Results", "Accuracy over class size", "Curves", "Calibration", "Most frequent confusions", "Every class",
        "Differences between configurations",
    ]  # fmt: skip


def test_what_was_not_evaluated_is_said_and_a_thousand_classes_have_a_page(tmp_path):
    names = [f"species {index}" for index in range(1000)]
    run = make_run(tmp_path / "run", names, evaluated=False)
    page_of = write_report([str(run.folder)], str(tmp_path / "out"))
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert len(table_under(page, "class")) == 1001 and "Calibration and confusions" in page.headings
    assert page_of.answer.startswith("BKD student: ") and "points over" not in page_of.answer


def test_an_evaluation_of_other_weights_is_left_out_and_a_damaged_one_refused(tmp_path, compared):
    shutil.copytree(compared[1].folder, tmp_path / "run")
    path = tmp_path / "run" / "evaluation-last" / "scores.json"
    kept = json.loads(path.read_text())
    del kept["checksum"]
    runs.write_json(path, kept | {"digest": "0"})
    assert evaluation.kept_evaluation(runs.open_run(tmp_path / "run")) is None
    path.write_text(path.read_text().replace('"digest": "0"', '"digest": "1"'))
    with pytest.raises(UserError, match="scores.json is damaged .it was changed after it was written.; evaluate .* again"):
        write_report([str(tmp_path / "run")], str(tmp_path / "out"))


def test_every_file_of_reports_and_evaluations_is_written_whole_or_not_at_all(tmp_path, compared, monkeypatch):
    written, write = [], LocalStorage.write
    monkeypatch.setattr(LocalStorage, "write", lambda *arguments: written.append(arguments[1]) or write(*arguments))
    write_report([str(compared[0].folder)], str(tmp_path / "report"))
    make_run(tmp_path / "run", NAMES)
    draw_run(runs.open_run(tmp_path / "run"))
    appended = {"metrics.jsonl", "log.txt"}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} - appended <= {*written}


def test_a_report_replaces_no_files_but_its_own(tmp_path, compared):
    folders = [str(compared[0].folder)]
    for name in "table.csv", "curves.png", "report.html":
        mine = tmp_path / name.split(".")[0] / name
        mine.parent.mkdir()
        mine.write_text("mine")
        with pytest.raises(UserError, match=f"holds a {name} that would be replaced, but no runs.json, so .*; move it away"):
            write_report(folders, str(mine.parent))
        assert [*mine.parent.iterdir()] == [mine] and mine.read_text() == "mine"
    write_report(folders, str(tmp_path / "out"))
    page = tmp_path / "out" / "report.html"
    page.unlink()  # as where it was interrupted
    write_report(folders, str(tmp_path / "out"))
    assert page.exists()


def test_pictures_that_are_missing_or_torn_are_drawn_again_and_others_left_alone(tmp_path, compared):
    shutil.copytree(compared[0].folder, tmp_path / "run")
    run, curves = runs.open_run(tmp_path / "run"), tmp_path / "run" / "curves.png"
    draw_run(run)
    whole, before = curves.read_bytes(), curves.stat().st_mtime_ns
    draw_run(run)
    assert curves.stat().st_mtime_ns == before
    for torn in (whole[: len(whole) // 2], b"", None):
        curves.write_bytes(torn) if torn is not None else curves.unlink()
        draw_run(run)
        assert curves.read_bytes() == whole


def test_seeds_are_one_line_whatever_is_set_of_a_cache_that_they_did_not_look_at(tmp_path):
    make_run(tmp_path / "0", NAMES, "teacher", evaluated=False)
    make_run(tmp_path / "1", NAMES, "teacher", seed=1, evaluated=False, overrides=["cache.temperature=3"])
    table = write_report([str(tmp_path / "0"), str(tmp_path / "1")], str(tmp_path / "out")).table
    assert [row[:2] for row in table[1:]] == [["teacher", "2"]]
    make_run(tmp_path / "2", NAMES, "teacher", seed=2, evaluated=False, overrides=["views.pad=3"])
    table = write_report([str(tmp_path / name) for name in "012"], str(tmp_path / "out")).table
    assert [row[1] for row in table[1:]] == ["2", "1"]


def test_runs_whose_folders_have_one_name_are_told_apart(tmp_path, compared):
    for place, method in {"a": "ce", "b": "kd"}.items():
        make_run(tmp_path / place / "run", NAMES, method, evaluated=False)
        path = tmp_path / place / "run" / "summary.json"
        summary = json.loads(path.read_text())
        del summary["checksum"]
        runs.write_json(path, summary | {"method": "ce"})
    table = write_report([str(tmp_path / place / "run") for place in "ab"], str(tmp_path / "out")).table
    assert len({row[0] for row in table[1:]}) == 2


def test_an_evaluation_is_kept_beside_the_weights_as_tables_of_classes_and_confusions(compared):
    folder = compared[0].folder / "evaluation-last"
    assert {path.name for path in folder.iterdir()} == {
        "scores.json", "classes.csv", "confusion.csv", "confusion.png", "calibration.png"
    }  # fmt: skip
    classes = list(csv.DictReader((folder / "classes.csv").read_text().splitlines()))
    assert [row["class"] for row in classes] == NAMES and [int(row["training_samples"]) for row in classes] == [
        *class_counts(10)
    ]
    assert {row["shots"] for row in classes} == {"many", "medium", "few"}
    last = compared[0].summary()["last"]
    assert [float(row["top1"]) for row in classes] == pytest.approx(last["per_class"], abs=0.006)
    assert {row["test_images"] for row in classes} == {"20"}
    top5 = {group: [float(row["top5"]) for row in classes if row["shots"] == group] for group in ("many", "medium", "few")}
    assert {group: np.mean(values) for group, values in top5.items()} == pytest.approx(
        {group: last["top5"][group] for group in top5}, abs=0.006
    )
    confusion = list(csv.DictReader((folder / "confusion.csv").read_text().splitlines()))
    assert sum(int(row["images"]) for row in confusion) == 200
    most = next(row for row in confusion if row["class"] == NAMES[9] and row["predicted"] != NAMES[9])
    assert (classes[9]["most_taken_for"], classes[9]["images_taken_for_it"]) == (most["predicted"], most["images"])


@pytest.fixture(scope="module")
def answered(teacher_run):
    return ask_run(str(teacher_run), "last", (), tiny.CPU)


def test_an_evaluation_goes_where_it_belongs_or_where_it_is_told_to(tmp_path, teacher_run, answered, monkeypatch):
    assert answered.scores == {k: v for k, v in runs.open_run(teacher_run).summary()["last"].items() if k != "epoch"}
    other = ask_run(str(teacher_run), "last", ("data.seed=0", "data.root=."), tiny.CPU)
    other.test_dataset["labels"] = "others"
    assert "not written, for these are other test images" in evaluation.keep_evaluation(other, None)
    rounded = ask_run(str(teacher_run), "last", ("teacher.training.precision=bfloat16",), tiny.CPU)
    assert "not written, for bfloat16 is not the run's own precision" in evaluation.keep_evaluation(rounded, None)
    assert str(tmp_path / "out") in evaluation.keep_evaluation(other, str(tmp_path / "out"))
    assert (tmp_path / "out" / "scores.json").exists() and not (teacher_run / "evaluation-last").exists()
    with pytest.raises(UserError, match="is a run's folder; name another one"):
        evaluation.keep_evaluation(other, str(teacher_run))

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system", "somewhere")

    monkeypatch.setattr(LocalStorage, "write", refuse)
    assert "not written: " in evaluation.keep_evaluation(answered, None)
    with pytest.raises(OSError, match="Read-only file system"):
        evaluation.keep_evaluation(answered, str(tmp_path / "elsewhere"))
    (teacher_run / "evaluation-last").rmdir()


def test_an_evaluation_is_replaced_by_one_of_the_same_network_and_images_alone(tmp_path, compared, answered):
    out, kept = str(tmp_path / "out"), tmp_path / "out" / "scores.json"
    for _ in range(2):
        evaluation.keep_evaluation(answered, out)
    before = {path: path.read_bytes() for path in kept.parent.iterdir()}
    for changed, message in (
        ({"run": compared[0]}, "out holds the evaluation of another network than .*teacher's; name another folder"),
        ({"test_dataset": answered.test_dataset | {"labels": "others"}}, "out holds an evaluation on other test images"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.keep_evaluation(dataclasses.replace(answered, **changed), out)
    assert {path: path.read_bytes() for path in kept.parent.iterdir()} == before
    kept.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="scores.json is damaged, or no evaluation .checkpoint: Field required.; move it away"):
        evaluation.keep_evaluation(answered, out)
    kept.unlink()
    with pytest.raises(UserError, match="out holds a classes.csv that would be replaced, but no scores.json"):
        evaluation.keep_evaluation(answered, out)


def test_an_evaluation_that_was_interrupted_is_repeated_into_the_same_folder(tmp_path, answered, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pictures, "save_confusion", interrupted)
        evaluation.keep_evaluation(answered, str(out))
    assert (out / "classes.csv").exists() and not (out / "calibration.png").exists()
    evaluation.keep_evaluation(answered, str(out))
    assert {path.name for path in out.iterdir()} == set(evaluation.FILES)


def test_an_evaluation_is_told_in_a_sentence_first(answered, capsys):
    evaluation.print_evaluation(answered)
    said = capsys.readouterr().out
    assert re.match(rf".*\(last epoch\): {answered.scores['top1']:.1f} % of [0-9,]+ test images are right .many-shot ", said)
    assert "top-5" in said and "ECE" in said and " %) taken for '" in said


def test_lines_differ_in_colour_and_dashes():
    looks = [pictures.style(index) for index in range(28)]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 28
    assert len({str(look["linestyle"]) for look in looks[:4]}) == 4


def test_a_method_looks_alike_in_all_pictures_also_where_another_was_not_evaluated():
    bins = [{"images": 3, "confidence": 50.0, "accuracy": 40.0}]
    axes = Figure().subplots()
    pictures.plot_calibration(axes, "all classes", {"first": [], "second": bins})
    (line,) = [line for line in axes.lines if line.get_label() == "second"]
    assert line.get_color() == pictures.style(1)["color"] and not [line for line in axes.lines if line.get_label() == "first"]


@pytest.mark.parametrize("counts", [[500, 400, 90, 10], [500] * 3 + [50] + [5] * 60, [500] * 90 + [30] + [2]])
@pytest.mark.parametrize("width", [4.6, 10])
def test_the_name_of_a_shot_group_stands_inside_its_band(counts, width):
    counts = np.array(counts)
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    pictures.plot_classes(axes, {"a": {"top1": 1.0, "per_class": [1.0] * len(counts)}}, counts)
    figure.draw_without_rendering()
    groups = [(counts > 100).sum(), ((counts >= 20) & (counts <= 100)).sum(), (counts < 20).sum()]
    ends = np.cumsum(groups) - 0.5
    for text, low, high in zip(axes.texts, [-0.5, *ends], ends):
        box = text.get_window_extent().transformed(axes.transData.inverted())
        assert low <= box.x0 and box.x1 <= high or high - low < len(counts) / 40, text.get_text()
        assert box.y1 <= axes.get_ylim()[1]


@pytest.mark.parametrize("losses", [[4.0, 0.02], [2.31, 2.29], [1e-5, 3.0], [0.0, 0.0]])
def test_the_ticks_of_losses_are_plain_numbers(losses):
    figure = Figure()
    axes = figure.subplots()
    pictures.plot_loss(axes, {"a": [[{"epoch": index + 1, "loss": loss} for index, loss in enumerate(losses)]]})
    figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_yticklabels() if label.get_text()]
    assert len(labels) >= 2 and all(float(label.replace("−", "-")) is not None for label in labels)
