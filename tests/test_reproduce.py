"""Tables: every run once, shared where it can be, resumed, and ours beside the published numbers."""

import csv
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from made_runs import make_run

from offline_bkd import cli
from offline_bkd.pipeline import UserError, reproduce, runs
from offline_bkd.pipeline.config import dump_config, load_config
from offline_bkd.pipeline.reproduce import execution, results

ROOT = Path(__file__).parent.parent
TABLES = sorted((ROOT / "configs" / "tables").glob("*.yaml"))


@pytest.fixture
def table(tmp_path):
    """A small table of the tiny experiment: a teacher, KD, BKD from two teachers and a new classifier on it."""
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny.experiment("teacher.training.epochs=1", "student.training.epochs=1")))
    content = {
        "title": "A table",
        "seeds": [0, 1],
        "columns": {"digits": {"config": "tiny.yaml", "quick": "tiny.yaml", "set": ["data.imbalance_ratio=20"]}},
        "rows": {
            "CE": {"stage": "teacher", "published": {"digits": {"all": 50.0}}},
            "KD": {"set": ["student.method.name=kd"], "published": {"digits": {"all": 40, "few": 1}}},
            "BKD, two teachers": {"teachers": [{"seed": 0}, {"seed": 1}], "quick": ["student.method.alpha=2"]},
            "BKD+cRT": {"set": ["student.method.name=crt"], "backbone": "BKD, two teachers"},
        },
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def jobs_of(name, *, rows=(), columns=(), seeds=(), quick=False, out="out"):
    whole = reproduce.load_table(str(name))
    part = reproduce.select(whole, rows, columns, seeds, quick)
    return reproduce.plan(whole, part, Path(out), tiny.CPU, quick)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_shipped_table_is_whole_and_opens_with_its_command(path, monkeypatch):
    monkeypatch.setenv("OFFLINE_BKD_DATA", "data")
    assert path.read_text().startswith(f"# python cli.py reproduce --table {path.stem} ")
    small = any(column.quick for column in reproduce.load_table(path.stem).columns.values())
    for quick in (False, True)[: 1 + small]:
        jobs, cells = jobs_of(path.stem, seeds=(0,), quick=quick)
        assert cells and all(need in jobs for job in jobs for need in job.needs)


def test_teachers_and_caches_are_shared_and_come_first(table):
    jobs, cells = jobs_of(table)
    kinds = [job.arguments[0] for job in jobs]
    assert [kinds.count(kind) for kind in ("train-teacher", "dump-logits", "train-student")] == [2, 2, 6]
    for place, job in enumerate(jobs):
        assert all(jobs.index(need) < place for need in job.needs)
    assert cells["BKD+cRT", "digits", 1].needs == [cells["BKD, two teachers", "digits", 1]]
    assert "data.imbalance_ratio=20" in cells["CE", "digits", 0].arguments
    # a part of the table needs the rest only where it learns from it
    jobs, _ = jobs_of(table, rows=("KD",), seeds=(1,))
    assert [job.arguments[0] for job in jobs] == ["train-teacher", "dump-logits", "train-student"]


def test_the_sweep_over_views_asks_one_teacher_about_all(monkeypatch):
    """Were each row's teacher trained under the row's views, the sweep would compare teachers."""
    monkeypatch.setenv("OFFLINE_BKD_DATA", "data")
    jobs, _ = jobs_of("views", seeds=(0,))
    views = {}
    for job in jobs:
        command, *arguments = job.arguments
        asked = cli.main.commands[command].make_context(command, [*arguments, "--out", "out"]).params
        views.setdefault(command, []).append(load_config(asked["config_file"], asked["overrides"]).views)
    recipe = load_config(ROOT / "configs" / "cifar100-lt.yaml").views
    assert views["train-teacher"] == [recipe]
    assert [found.count for found in views["dump-logits"]] == [1, 4, 16, 64]
    assert views["train-student"] == views["dump-logits"]


def test_a_folder_is_for_one_experiment(table):
    full, quick = (jobs_of(table, quick=quick)[1] for quick in (False, True))
    assert full["KD", "digits", 0].out == quick["KD", "digits", 0].out, "nothing differs"
    assert full["BKD, two teachers", "digits", 0].out != quick["BKD, two teachers", "digits", 0].out
    assert full["BKD+cRT", "digits", 0].out != quick["BKD+cRT", "digits", 0].out, "its backbone differs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"A": {"backbone": "B"}}}, "rows.A.backbone: there is no row 'B'"),
        ({"rows": {"A": {"published": {"mnist": {"all": 1}}}}}, "rows.A.published: there is no column mnist"),
        ({"rows": {"A": {"stage": "pupil"}}}, "rows.A.stage: input should be 'teacher' or 'student'; found 'pupil'"),
        ({"colums": {}}, "colums: unknown key; did you mean 'columns'"),
        ({"rows": {"A": {"published": {"digits": {"al": 1}}}}}, "rows.A.published.digits.al: unknown key; did you mean 'all'"),
        ({"rows": {"A": {"set": ["student.method.nam=kd"]}}}, "row 'A', column 'digits': .*unknown key; did you mean 'name'"),
        ({"rows": {"A": {"set": ["student.method.name=lfme"]}}}, "row 'A': method lfme learns from experts, so each"),
        ({"rows": {"A": {"set": ["teacher.expert=few"]}}}, "row 'A': method bkd learns from no expert, so none sets"),
        ({"rows": {"A": {"set": ["studnet.method.alpha=2"]}}}, "rows.A.set.0: overrides begin with one of data, views"),
        ({"rows": {"A": {"set": ["base=tiny.yaml"]}}}, "overrides begin with one of data, .*; found 'base=tiny.yaml'"),
        ({"rows": {"A": {"stage": "teacher", "teachers": [{"seed": 4}]}}}, "rows.A: a teacher learns from none; leave out"),
        ({"rows": {"A": {"teachers": [{}, {"set": ["teacher.color_jitter=false"]}]}}}, "row 'A': two of its teachers are the"),
        ({"rows": {"A": {"config": "no.yaml"}}}, "row 'A', column 'digits': cannot read the configuration .*no.yaml"),
        ({"rows": {"A": {"set": ["student.method.name=crt"]}}}, "row 'A' names no backbone, but is of method crt"),
        (
            {"rows": {"B": {"stage": "teacher"}, "A": {"backbone": "B"}}},
            "row 'A' names the backbone 'B', but is of method bkd",
        ),
        ({"rows": {"A": {"backbone": "B"}, "B": {"backbone": "A"}}}, "row 'B' takes its backbone from another"),
        ({"rows": {"A": {"teachers": []}}}, "rows.A.teachers: .*at least 1 item"),
        ({"rows": {"A": {"teachers": [{"seed": 1}, {"seed": 1}]}}}, "rows.A.teachers: .*comes twice; give each once"),
        (
            {"rows": {"A": {"teachers": [{"set": ["data.seed=1"]}]}}},
            "overrides begin with teacher or views; found 'data.seed=1'",
        ),
        ({"seeds": [0, 0]}, "seeds: 0 comes twice; give each once"),
        ({"seeds": [True]}, "seeds.0: .*integer; found True"),
        ({"seeds": []}, "seeds: .*at least 1 item"),
        ({"columns": {}}, "columns: .*at least 1 item"),
        ({"rows": {"A": {"columns": []}}}, "rows.A.columns: .*at least 1 item"),
        ({"rows": {"A": {"columns": ["mnist"]}}}, "rows.A.columns: there is no column mnist"),
        ({"columns": {"digits": {"config": "no.yaml"}}}, "row '.*', column 'digits': cannot read .*no.yaml"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_before_anything_runs(table, change, message):
    table.write_text(yaml.safe_dump(yaml.safe_load(table.read_text()) | change))
    with pytest.raises(UserError, match=message):
        jobs_of(table)


def test_a_row_s_file_is_read_over_each_column_s(table, tmp_path):
    content = yaml.safe_load(table.read_text())
    other = tiny.experiment("teacher.training.epochs=3", "student.training.epochs=3")
    (tmp_path / "other.yaml").write_text(dump_config(other))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "kd.yaml").write_text("base: ../tiny.yaml\nstudent: {model: {width: 6}, method: {name: kd}}")
    content["columns"]["other digits"] = {"config": "other.yaml"}
    content["rows"] = {"BKD": {}, "KD": {"config": "rows/kd.yaml", "set": ["student.training.batch_size=16"]}}
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    jobs, cells = jobs_of(table, seeds=(0,))
    kinds = [job.arguments[0] for job in jobs]
    assert kinds.count("train-teacher") == kinds.count("dump-logits") == 2, "rows share them, in each column"
    for column, epochs in (("digits", 1), ("other digits", 3)):
        student = configured(cells["KD", column, 0]).student
        assert (student.method.name, student.model.width, student.training.batch_size) == ("kd", 6, 16)
        assert student.training.epochs == epochs


def configured(job):
    """The experiment of a job's own command."""
    options = cli.train_student.make_context("", [*job.arguments[1:], "--out", "out"]).params
    return load_config(options["config_file"], options["overrides"], options["seed"])


def test_a_row_stands_in_its_columns_alone(table, tmp_path):
    content = yaml.safe_load(table.read_text())
    content["columns"]["more digits"] = {"config": "tiny.yaml"}
    content["rows"]["KD"] |= {"columns": ["more digits"], "published": {"more digits": {"all": 40}}}
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    _, cells = jobs_of(table, out=tmp_path)
    assert {column for row, column, _ in cells if row == "KD"} == {"more digits"} and len(cells) == 2 * 7
    whole = reproduce.load_table(str(table))
    rows = reproduce.write_table(whole, cells, tmp_path, False, whole.cells)
    assert [row[:2] for row in rows[1:]] == [
        *(["digits", name] for name in ("CE", "BKD, two teachers", "BKD+cRT")),
        *(["more digits", name] for name in ("CE", "KD", "BKD, two teachers", "BKD+cRT")),
    ]
    with pytest.raises(UserError, match="the table has no KD in digits; its rows name their columns"):
        jobs_of(table, rows=("KD",), columns=("digits",))
    content["rows"]["BKD, two teachers"]["columns"] = ["digits"]
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="rows.BKD.cRT.backbone: row 'BKD, two teachers' is not in the column 'more digits'"):
        jobs_of(table)


def test_a_picture_has_every_cell_on_the_line_of_its_row(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    part = {"config": "a.yaml"}
    table = reproduce.Table(
        title="A table", columns={"a": part, "b": part}, rows={"A": {"columns": ("a",)}, "B": {}, "C": {"columns": ("b",)}}
    )
    values = [
        {"column": column, "row": row, "last": {"all": [mean]}, "best": [mean], "published": None}
        for mean, (column, row) in enumerate(table.cells)
    ]
    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **named: (drawn.append((x, y)), errorbar(self, x, y, **named))[1])
    results.draw(table, values, "A table", tmp_path / "table.png")
    assert drawn == [(0, 0), (1, 1), (2, 1), (3, 2)]


@pytest.mark.parametrize("published", ["last", "best"])
def test_what_is_published_is_compared_with_the_same_epoch_of_ours(tmp_path, monkeypatch, published):
    table = reproduce.Table(
        title="A table",
        seeds=(0, 1),
        published=published,
        columns={"digits": {"config": "a.yaml"}},
        rows={"BKD": {"published": {"digits": {"all": 50}}}},
    )
    made = [make_run(tmp_path / str(seed), [*"abcdefghij"], seed=seed, evaluated=False).summary() for seed in (0, 1)]
    cells = {("BKD", "digits", seed): reproduce.Job(tmp_path / str(seed), []) for seed in (0, 1)}
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", lambda self, x, y, **named: drawn.append(x))
    _, row = reproduce.write_table(table, cells, tmp_path / "out", quick=False, asked=table.cells)
    last, best = (np.mean([summary[epoch]["top1"] for summary in made]) for epoch in ("last", "best"))
    assert best > last + 1
    compared = {"last": last, "best": best}[published]
    assert float(row[3].split()[0]) == pytest.approx(last, abs=0.006)
    assert float(row[-3].split()[0]) == pytest.approx(best, abs=0.006)
    assert row[-2] == "50.00" and float(row[-1]) == pytest.approx(compared - 50, abs=0.006) and drawn == [compared]
    (kept,) = json.loads((tmp_path / "out" / "table.json").read_text())["cells"]
    assert kept["best"] == [summary["best"]["top1"] for summary in made]
    assert kept["last"]["all"] == [summary["last"]["top1"] for summary in made]


def test_a_sweep_is_compared_with_nothing(tmp_path):
    table = reproduce.load_table("temperature")
    cells = {(row, column, seed): reproduce.Job(tmp_path / "none", []) for column, row in table.cells for seed in table.seeds}
    heading, *rows = reproduce.write_table(table, cells, tmp_path, quick=True, asked=table.cells)
    assert heading[-1] == "best epoch's all" and all(len(row) == len(heading) for row in rows) and len(rows) == 10
    assert "ublished" not in (tmp_path / "table.md").read_text()


def test_what_a_stage_does_not_look_at_does_not_tell_its_runs_apart(table, tmp_path, here):
    content = yaml.safe_load(table.read_text())
    content["rows"] = {"alpha = 1": {}, "alpha = 2": {"set": ["student.method.alpha=2"]}}
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    jobs, _ = jobs_of(table, seeds=(0,))
    assert [job.arguments[0] for job in jobs] == ["train-teacher", "dump-logits", "train-student", "train-student"]
    # whichever row asks first, another goes on with what it left
    out = tmp_path / "out"
    assert invoke(table, out, "--seeds", "0", "--row", "alpha = 1").exit_code == 0
    (teacher,) = out.rglob("teacher-*/summary.json")
    before = teacher.read_text()
    teacher.unlink()
    found = invoke(table, out, "--seeds", "0", "--row", "alpha = 2")
    assert found.exit_code == 0, found.output
    assert json.loads(teacher.read_text())["digest"] == json.loads(before)["digest"]


def test_how_images_are_read_tells_no_runs_apart_but_where_they_are_does(table):
    content = yaml.safe_load(table.read_text())
    before, _ = jobs_of(table)
    (column,) = content["columns"].values()
    for more, same in (["data.workers=7"], True), (["data.root=elsewhere"], False):
        changed = column | {"set": [*column.get("set", []), *more]}
        table.write_text(yaml.safe_dump(content | {"columns": dict.fromkeys(content["columns"], changed)}, sort_keys=False))
        after, _ = jobs_of(table)
        assert more[0] in after[0].arguments and ([job.out for job in after] == [job.out for job in before]) == same


def test_a_row_s_overrides_are_of_its_whole_experiment(table):
    """They stand and fall together: no stage alone need be a valid experiment."""
    content = yaml.safe_load(table.read_text())
    cosine = ["student.model.cosine_scale=20", "teacher.model.cosine_scale=20", "cache.features=true"]
    content["rows"] = {"CBD": {"set": ["student.method.name=cbd", *cosine]}}
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    assert len(jobs_of(table, seeds=(0,))[0]) == 3


def test_a_folder_holds_one_table_and_all_that_was_run_of_it(table, tmp_path, here):
    out = tmp_path / "out"
    content = yaml.safe_load(table.read_text())
    content["rows"] = {"CE": {"stage": "teacher"}}
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    assert invoke(table, out, "--seeds", "5").exit_code == 0
    assert invoke(table, out, "--seeds", "0").exit_code == 0
    (cell,) = json.loads((out / "table.json").read_text())["cells"]
    assert sorted(cell["seeds"]) == [0, 5]
    before = {path: path.read_bytes() for path in out.glob("table.*")}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(content | {"title": "Another table"}, sort_keys=False))
    for asked, options in ((table, ["--quick"]), (other, []), (other, ["--dry-run"])):
        found = invoke(asked, out, *options)
        assert found.exit_code == 2 and "holds another table ('A table')" in found.output + str(found.stderr)
    assert invoke(table, out / "table.csv", "--dry-run").exit_code == 2
    assert {path: path.read_bytes() for path in out.glob("table.*")} == before


@pytest.mark.parametrize("name", ["..", ".", "日", "-"])
def test_no_name_leads_out_of_the_folder(table, name):
    content = yaml.safe_load(table.read_text())
    content["columns"] = {name: content["columns"].pop("digits")}
    content["rows"] = {"CE": {"stage": "teacher"}}
    table.write_text(yaml.safe_dump(content))
    (job, *_), _ = jobs_of(table)
    folder = job.out.parent.name
    assert job.out.parent.parent == Path("out") and folder.strip(".-") == folder != ""


def test_a_place_that_cannot_be_written_is_named(table, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "digits").write_text("")
    found = invoke(table, out)
    assert found.exit_code == 2 and "digits cannot be written" in found.output + str(found.stderr)


def test_a_torn_picture_is_drawn_again_and_a_changed_table_is_refused(table, tmp_path, here, pictures_of_runs):
    content = yaml.safe_load(table.read_text())
    content["rows"] = {"CE": {"stage": "teacher"}}
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    out = tmp_path / "out"
    assert invoke(table, out, "--seeds", "0").exit_code == 0
    (curves,) = out.rglob("curves.png")
    whole = curves.read_bytes()
    for torn in (curves, out / "table.png"):
        torn.write_bytes(torn.read_bytes()[:100])
    assert invoke(table, out, "--seeds", "0").exit_code == 0
    assert curves.read_bytes() == whole and (out / "table.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    kept = out / "table.json"
    for changed, reason in (
        (kept.read_text().replace('"seeds": [\n    0', '"seeds": [\n    2'), "it was changed after it was written"),
        ("[" * 100_000, "it is nested too deeply"),
        ("{}", "title: Field required"),
    ):
        kept.write_text(changed)
        found = invoke(table, out, "--seeds", "0")
        assert found.exit_code == 2 and f"table.json is damaged ({reason}); move it away" in found.output + str(found.stderr)


def test_what_is_not_in_the_table_is_named(table):
    for asked, message in (
        ({"rows": ("KDD",)}, "no row 'KDD'; it has CE, KD"),
        ({"columns": ("mnist",)}, "no column 'mnist'; it has digits"),
    ):
        with pytest.raises(UserError, match=message):
            jobs_of(table, **asked)
    with pytest.raises(UserError, match="there is no table 'cifr'; known are .*cifar"):
        reproduce.load_table("cifr")
    for columns in ("CIFAR-10-LT 50",), ("CIFAR-10-LT 100", "CIFAR-10-LT 50"):
        with pytest.raises(UserError, match="column 'CIFAR-10-LT 50' has no small version; name other columns, or leave"):
            jobs_of("cifar", columns=columns, quick=True)
    content = yaml.safe_load(table.read_text())
    del content["columns"]["digits"]["quick"]
    table.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="no column of the table has a small version; leave out --quick"):
        jobs_of(table, quick=True)


class InThisProcess:
    """What the command starts as processes, run here: starting one takes longer than a tiny run."""

    def __init__(self, command, stdout, **_):
        found = CliRunner().invoke(cli.main, command[2:])
        stdout.write(found.output)
        self.returncode = found.exit_code

    def poll(self):
        return self.returncode


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(execution, "Popen", InThisProcess)
    monkeypatch.setattr(execution, "POLL_SECONDS", 0.001)


def invoke(table, out, *options):
    return CliRunner().invoke(cli.main, ["reproduce", "--table", str(table), "--out", str(out), "--device", "cpu", *options])


def test_a_table_is_run_resumed_and_compared(table, tmp_path, here):
    out = tmp_path / "out"
    dry = invoke(table, out, "--dry-run")
    assert dry.exit_code == 0 and dry.output.count("to do") == 10 and not out.exists()
    first = invoke(table, out, "--seeds", "0", "--jobs", "2")
    assert first.exit_code == 0, first.output
    changed = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    second = invoke(table, out)
    assert second.exit_code == 0, second.output
    assert all(path.stat().st_mtime_ns == before for path, before in changed.items()), "what is done stays"
    assert invoke(table, out, "--dry-run").output.count("done") == 10
    _, cells = jobs_of(table, out=out)
    rows = {row[1]: row for row in csv.reader((out / "table.csv").read_text().splitlines())}
    for name in ("CE", "KD", "BKD, two teachers", "BKD+cRT"):
        found = [runs.open_run(cells[name, "digits", seed].out).summary()["last"]["top1"] for seed in (0, 1)]
        mean, _, spread = rows[name][3].partition(" ± ")
        assert float(mean) == pytest.approx(sum(found) / 2, abs=0.006)
        assert float(spread) == pytest.approx(abs(found[0] - found[1]) / 2**0.5, abs=0.006)
        assert rows[name][2] == "2"
    assert float(rows["KD"][-1]) == pytest.approx(float(rows["KD"][3].split()[0]) - 40, abs=0.011)
    assert rows["BKD+cRT"][-2:] == ["–", "–"]
    apart = {name: float(rows[name][-1]) for name in ("CE", "KD")}
    furthest = max(apart, key=lambda name: abs(apart[name]))
    said = re.search(
        r"4 of 4 cells have complete runs; .* they are ([0-9.]+) points .*, (\w+), digits most: (\S+)\n", second.output
    )
    assert float(said[1]) == pytest.approx(sum(map(abs, apart.values())) / 2, abs=0.011)
    assert (said[2], float(said[3])) == (furthest, apart[furthest])
    assert json.loads((out / "table.json").read_text())["cells"][1]["seeds"] == [0, 1]
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG") and "| digits | CE | 2 |" in (out / "table.md").read_text()


def test_a_mistake_in_a_row_that_is_not_asked_for_is_named_before_anything_runs(table, tmp_path, here):
    content = yaml.safe_load(table.read_text())
    content["rows"]["KD"]["set"] = ["student.method.nam=kd"]
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    for options in ["--dry-run"], []:
        found = invoke(table, tmp_path / "out", "--row", "CE", "--seeds", "0", *options)
        assert found.exit_code == 2 and "row 'KD', column 'digits': " in found.output + str(found.stderr)
    assert not (tmp_path / "out").exists()


def test_what_is_changed_while_runs_go_on_does_not_keep_their_table_from_being_written(table, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "run_jobs", lambda *_: (tmp_path / "tiny.yaml").unlink())
    found = invoke(table, tmp_path / "out", "--row", "CE")
    assert found.exit_code == 0, found.output
    assert (tmp_path / "out" / "table.json").exists()


def test_each_run_sees_one_gpu_and_as_many_share_one_as_where_there_is_no_other(table, tmp_path, monkeypatch):
    begun, asked, gpu = [], [], torch.device("cuda")

    class Ended(InThisProcess):
        returncode = 0

        def __init__(self, command, env, **_):
            begun.append(env["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setattr(execution, "Popen", Ended)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert execution.visible_cards(gpu) == ["0", "1", "2"] and execution.visible_cards(tiny.CPU) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-6,7,-1")
    jobs = [reproduce.Job(tmp_path / f"run-{number}", []) for number in range(7)]
    execution.run_jobs(jobs, 7, 6, 1, execution.visible_cards(gpu))
    assert begun == [*["4", "GPU-6", "7"] * 2, "4"]
    monkeypatch.setattr(reproduce, "run_jobs", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24))
    whole = reproduce.load_table(str(table))
    reproduce.reproduce(whole, whole, str(tmp_path / "out"), gpu, False, None)
    assert asked[0][2:] == (3 * 4, 24 // 12, ["4", "GPU-6", "7"])


def test_a_run_that_fails_is_named_and_leaves_out_what_needs_it(table, tmp_path, here):
    content = yaml.safe_load(table.read_text())
    content["rows"]["CE"]["set"] = ["teacher.training.learning_rate=1.0e+30"]
    content["rows"]["BKD, two teachers"]["set"] = ["student.training.learning_rate=1.0e+30"]
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    found = invoke(table, tmp_path / "out", "--seeds", "0")
    assert found.exit_code == 1
    assert found.output.count("exit 1;") == found.output.count("ends: error: training diverged") == 2, found.output
    assert found.output.count("left out, what it needs failed") == 1
    rows = {row[1]: row for row in csv.reader((tmp_path / "out" / "table.csv").read_text().splitlines())}
    assert [rows[name][2] for name in ("CE", "KD", "BKD, two teachers", "BKD+cRT")] == ["0", "1", "0", "0"]


def test_what_another_command_has_running_is_waited_for(tmp_path, monkeypatch):
    def wait_for_a_line(command, **named):
        return subprocess.Popen([sys.executable, "-c", "input()"], **named)

    monkeypatch.setattr(execution, "Popen", wait_for_a_line)
    theirs, ours = (reproduce.Job(tmp_path / "run", []) for _ in range(2))
    assert theirs.begin(1)
    monkeypatch.setattr(execution, "Popen", InThisProcess)
    waiting = threading.Thread(target=execution.run_jobs, args=([ours], 1, 1, 1))
    waiting.start()
    waiting.join(timeout=1)
    assert waiting.is_alive() and ours.process is None and not ours.failed
    theirs.process.communicate(b"\n")
    waiting.join(timeout=60)
    assert not waiting.is_alive() and ours.process is not None


def test_interrupted_it_goes_on_where_it_was(table, tmp_path, here):
    out, part = tmp_path / "out", ["--seeds", "0", "--row", "KD"]
    command = [sys.executable, str(ROOT / "cli.py"), "reproduce", "--table", str(table), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen([*command, *part, "--jobs", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list(out.rglob("summary.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 130
    assert b"interrupted" in process.stderr.read()
    (teacher,) = out.rglob("summary.json")
    written = teacher.stat().st_mtime_ns
    found = invoke(table, out, *part)
    assert found.exit_code == 0, found.output
    assert len(list(out.rglob("summary.json"))) == 2 and teacher.stat().st_mtime_ns == written


def can_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_killed_it_leaves_none_of_its_commands_running(table, tmp_path):
    content = yaml.safe_load(table.read_text())
    content["rows"]["CE"]["set"] = ["teacher.training.epochs=100000"]
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "cli.py"), "reproduce", "--table", str(table), "--out", str(out), "--device", "cpu"]
    process = subprocess.Popen([*command, "--seeds", "0", "--row", "CE"], stdout=subprocess.DEVNULL)
    while not list(out.rglob("metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    (log,) = out.rglob("*.log")
    with open(log) as file:
        deadline = time.monotonic() + 60
        while not can_lock(file):  # the command holds it to its end
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert log.read_text().splitlines()[-1].startswith("error: interrupted; give the command again")
