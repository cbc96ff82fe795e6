"""The commands as a person uses them: what they print, what they refuse, how they end."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cache_store
import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from test_folders import folder_of_images

from offline_bkd import cli
from offline_bkd.cache import CacheError, create_cache
from offline_bkd.pipeline import UserError, dry_run, guard
from offline_bkd.pipeline.dry_run import show_training_plan
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.show import progress, trackers
from offline_bkd.pipeline.train import train_teacher

ROOT = Path(__file__).parent.parent
COMMANDS = ("train-teacher", "dump-logits", "train-student", "evaluate", "inspect", "verify", "export", "report")


def run_alone(*arguments, **named) -> subprocess.CompletedProcess:
    """A command in a process of its own, as a shell starts it."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **named)


def run(*arguments) -> Result:
    """A command in this process, where torch is imported already; it has ended as a command does."""
    result = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments, code=2) -> str:
    """The one line of an error."""
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_student_is_trained_scored_and_reported_and_again_for_other_seeds(tmp_path, teacher_run, cache):
    student = tmp_path / "student"
    result = run_alone("train-student", *tiny.options(), "--cache", cache, "--out", student)
    assert result.returncode == 0, result.stderr
    files = {path.name for path in student.iterdir()}
    assert files == {
        "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "summary.json", "last.safetensors",
        "best.safetensors", "curves.png", "accuracy_by_class.png",
    }  # fmt: skip
    evaluated = run("evaluate", student, "--json", "--device", "cpu")
    assert f"{student / 'evaluation-last'}" in evaluated.stderr
    scores = json.loads(evaluated.stdout)
    summary = json.loads((student / "summary.json").read_text())
    assert scores == {key: value for key, value in summary["last"].items() if key != "epoch"}
    best = json.loads(run("evaluate", student, "--json", "--device", "cpu", "--checkpoint", "best").stdout)
    assert best["top1"] == summary["best"]["top1"]
    result = run("report", teacher_run, student, "--out", tmp_path / "report")
    assert "BKD student" in result.stdout and f"{summary['last']['top1']:.2f}" in result.stdout
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"table.md", "table.csv", "runs.json", "curves.png", "accuracy_by_class.png", "report.html"}
    assert f"{summary['last']['few']:.2f}" in (tmp_path / "report" / "table.md").read_text()
    several = ["train-student", *tiny.options(), "--cache", cache, "--out", tmp_path / "s", "--seeds", "0,3"]
    result = run(*several)
    assert result.exit_code == 0 and "seed 3: epoch 2/2" in result.stdout, result.stderr
    assert json.loads((tmp_path / "s-0" / "summary.json").read_text())["digest"] == summary["digest"]
    assert "s-0 is not empty; add --resume" in refused(*several)
    assert "--seeds '0,x': seeds are whole numbers" in refused(*several[:-1], "0,x")
    assert "seeds are whole numbers" in refused(*several[:-1], "")
    assert "leave out the one or the other" in refused(*several, "--seed", 1)
    complete = run("train-student", *tiny.options(), "--cache", cache, "--out", student, "--resume")
    assert complete.exit_code == 0 and "is complete" in complete.stdout


def test_inspect_and_verify_tell_what_a_cache_is(cache, teacher_run, tmp_path):
    shown = run("inspect", cache)
    assert shown.exit_code == 0 and "464 samples of 10 classes" in shown.stdout
    assert shown.stdout.endswith("whole: all 9 blocks are there\n")
    assert json.loads(run("inspect", cache, "--json").stdout)["complete"] is True
    compared = run("verify", cache, "--teacher", teacher_run, "--device", "cpu").stdout
    assert compared.endswith("\nPASSED\n")
    assert run("verify", cache, "--checksums").exit_code == 0
    assert "name the teacher's run with --teacher" in refused("verify", cache)
    dump_logits(tiny.experiment(), [str(teacher_run)], str(tmp_path / "rounded.zarr"), tiny.CPU)
    failed = run("verify", tmp_path / "rounded.zarr", "--teacher", teacher_run, "--device", "cpu", "--tolerance", "0")
    assert failed.exit_code == 1 and "FAILED" in failed.stdout.splitlines()[-1]
    for tolerance in "-1", "nan":
        assert "'--tolerance'" in refused("verify", cache, "--teacher", teacher_run, "--tolerance", tolerance)


def test_what_a_program_reads_has_no_lines_of_progress_in_it(cache, teacher_run, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SHORT_SECONDS", -1)
    for command in (
        ["evaluate", str(teacher_run), "--out", str(tmp_path / "evaluation"), "--device", "cpu", "--json"],
        ["verify", str(cache), "--teacher", str(teacher_run), "--device", "cpu", "--json"],
    ):
        said = CliRunner().invoke(cli.main, command)
        assert isinstance(json.loads(said.stdout), dict) and "reading" in said.stderr


def test_export_writes_what_pandas_shows(tmp_path, cache):
    import pandas

    from offline_bkd.cache import open_cache

    out = tmp_path / "answers.parquet"
    result = run("export", cache, "--out", out, "--view", 1, "--view", 3, "--label", "7", "--probabilities")
    assert result.exit_code == 0 and "26 rows" in result.stdout, "thirteen samples of class 7 in two views"
    expected = open_cache(cache).to_pandas(view=[1, 3], label=["7"], probabilities=True)
    pandas.testing.assert_frame_equal(pandas.read_parquet(out), expected, check_dtype=False, check_categorical=False)
    assert "exists; choose another file" in refused("export", cache, "--out", out)


def test_a_run_is_scored_in_another_precision_where_it_is_asked_for(tmp_path, teacher_run):
    for asked in "float32", "bfloat16":
        override = f"teacher.training.precision={asked}"
        result = run("evaluate", teacher_run, "-o", override, "--out", tmp_path / asked, "--device", "cpu")
        assert result.exit_code == 0, result.stderr
        assert json.loads((tmp_path / asked / "scores.json").read_text())["precision"] == asked


def test_damage_ends_with_1_and_names_the_rows(tmp_path, cache):

    shutil.copytree(cache, tmp_path / "cache.zarr")
    chunk = max((path for path in (tmp_path / "cache.zarr" / "probability").iterdir()), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[100] ^= 4
    chunk.write_bytes(data)
    found = run("verify", tmp_path / "cache.zarr", "--checksums")
    assert found.exit_code == 1 and "probability" in found.stdout and "rows 0 to 463" in found.stdout
    error = refused("train-student", *tiny.options(), "--cache", tmp_path / "cache.zarr", "--out", tmp_path / "run", code=1)
    assert "probability" in error and "rows 0 to 463" in error


@pytest.mark.parametrize("command", ["train-teacher", "dump-logits", "train-student"])
def test_a_dry_run_tells_sizes_and_writes_nothing(tmp_path, command):
    extra = {"dump-logits": ["--teacher", "nowhere"], "train-student": ["--cache", "nowhere"]}.get(command, [])
    result = run(command, *tiny.options(), *extra, "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.stderr
    for fact in (
        "training samples (N)",
        "464",
        "classes (C)",
        "views",
        "parameters",
        "store",
        "MB",
        "time",
        "epochs: 2",
    ):
        assert fact in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_takes_the_fastest_of_warm_steps_and_says_that_they_are_not_compiled(monkeypatch, capsys):
    moments = iter([0, 9, 10, 13, 20, 22, 30, 34])  # steps of 9 (not counted), 3, 2 and 4 seconds
    with monkeypatch.context() as patch:
        patch.setattr(dry_run.time, "perf_counter", lambda: next(moments))
        assert dry_run._fastest(lambda size: None, 8, tiny.CPU, 3) == 2
    for compiled in False, True:
        config = tiny.experiment(f"teacher.training.compile={str(compiled).lower()}")
        show_training_plan(config, tiny.CPU, "teacher", "run")
        assert ("images, not compiled as training will be" in " ".join(capsys.readouterr().out.split())) == compiled


def test_a_dry_run_counts_a_store_s_features_and_names_what_is_not_there(teacher_run):
    def plan(*teachers):
        named = [word for teacher in teachers for word in ("--teacher", teacher)]
        said = run("dump-logits", *options, *named, "--out", "x", "--dry-run").stdout
        return float(re.search(r"store\W+([\d.]+) MB", said)[1]), re.findall("note: (.*)", said)

    wide = "teacher.model={name: cifar_resnet, depth: 8, width: 4, projection: 2048}"
    options = tiny.options("cache.features=true", wide)
    (one, note), (two, notes) = plan("nowhere"), plan("nowhere", "neither")
    assert one == pytest.approx(9 * 464 * (2048 + 20) / 1e6, abs=0.06)
    assert two == pytest.approx(9 * 464 * (2 * 2048 + 20) / 1e6, abs=0.06)
    assert note == ["nowhere is not there yet; planned without it"] and len(notes) == 2
    assert plan(teacher_run)[0] == pytest.approx(9 * 464 * (16 + 20) / 1e6, abs=0.06)  # as wide as the run's own


def test_a_dry_run_of_a_part_tells_the_time_of_a_part(monkeypatch):
    monkeypatch.setattr(dry_run, "_cost_of", lambda *_: dry_run._Cost(seconds=60.0, more_memory=0, basis="made up"))
    plan = "dump-logits", *tiny.options(), "--teacher", "nowhere", "--out", "x", "--dry-run"
    assert "about 540 s on cpu" in run(*plan).stdout  # 9 views of 464 images, by one batch a view
    assert "part 2/9: about 60 s on cpu" in run(*plan, "--part", "2/9").stdout
    assert "a part is its number, from 1" in refused(*plan, "--part", "99/3")


def test_a_dry_run_steps_what_learns_alone(monkeypatch, teacher_run):
    real, learning = dry_run.Optimisation, []

    def spy(network, model, training):
        found = real(network, model, training)
        learning.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
        return found

    monkeypatch.setattr(dry_run, "Optimisation", spy)
    for method in "{name: ce}", "{name: crt}":
        backbone = ["--backbone", teacher_run] if "crt" in method else []
        plan = "train-student", *tiny.options(f"student.method={method}"), *backbone, "--out", "x", "--dry-run"
        assert run(*plan).exit_code == 0
    everything, last = learning
    assert len(everything) > len(last) == 2 and last < everything


def test_a_dry_run_counts_on_workers_and_on_shared_decodes(monkeypatch):
    asked = "train-teacher", *tiny.options("views={name: random_resized_crop, size: 8, count: 4}"), "--out", "x", "--dry-run"
    monkeypatch.setattr(dry_run, "_fastest", lambda work, size, *_: work(size) or 1.0)
    # seconds an image, which nothing else comes near
    monkeypatch.setattr(dry_run, "_reading", lambda images, views: 10.0 / views)

    def seconds(workers, together=1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
        more = "-o", f"data.workers={workers}", "-o", f"teacher.training.views_per_decode={together}"
        found = run(*asked, *more, "-o", "teacher.training.evaluate_every=1000").stdout
        return int(re.search(r"about ([\d,]+) s", found)[1].replace(",", ""))

    alone, two, four = map(seconds, (0, 2, 4))
    assert alone == pytest.approx(2 * two, rel=0.05) and alone == pytest.approx(4 * four, rel=0.1)
    assert seconds(0, together=2) < 0.8 * alone


def dry(command, *extra, out="nowhere", overrides=()):
    from offline_bkd import cli

    cli.main([command, *tiny.options(*overrides), *map(str, extra), "--out", str(out), "--dry-run"])


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_a_dry_run_downloads_nothing(tmp_path, monkeypatch, capsys, section):
    from torchvision import datasets, models

    def online(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", online)
    monkeypatch.setattr(datasets.CIFAR10, "download", online)
    pretrained = f"{section}.model={{name: torchvision, architecture: resnet18, weights: IMAGENET1K_V1}}"
    command = [f"train-{section}", *([] if section == "teacher" else ["--cache", "nowhere"])]
    with pytest.raises(SystemExit) as stop:
        dry(*command, overrides=[pretrained])
    assert stop.value.code == 0 and "weights: IMAGENET1K_V1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        dry(*command, overrides=[f"data={{name: cifar10, root: {tmp_path}}}"])
    assert stop.value.code == 2 and "cifar10 is not in" in (said := capsys.readouterr().err)
    assert "a dry run downloads nothing; leave out --dry-run" in said


def test_what_is_read_is_called_by_its_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0)  # so that how far it is is printed

    def said() -> list[str]:
        return [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("reading ")]

    show_training_plan(tiny.experiment(), tiny.CPU, "teacher", str(tmp_path / "run"))  # which estimates from what it reads
    assert said() == ["reading training images 464/464", "reading test images 400/400"]
    train_teacher(tiny.experiment("data.validation=2", "teacher.training.epochs=1"), str(tmp_path / "run"), tiny.CPU)
    parts = ("training", 444), ("test", 400), ("validation", 20)
    assert said() == [f"reading {part} images {count}/{count}" for part, count in parts]


def test_a_dry_run_refuses_what_the_command_refuses(tmp_path, teacher_run, cache, capsys, monkeypatch):
    def refuses(message, command, *extra, overrides=(), out="nowhere"):
        with pytest.raises(SystemExit) as stop:
            dry(command, *extra, overrides=overrides, out=out)
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert stop.value.code == 2 and len(errors) == 1 and message in errors[0]

    graphs = "cuda_graphs needs a CUDA device, found cpu; set true or false"
    refuses(f"teacher.training.compile: {graphs}", "train-teacher", overrides=["teacher.training.compile=cuda_graphs"])
    student = "train-student", "--cache", "nowhere"
    refuses(f"student.training.compile: {graphs}", *student, overrides=["student.training.compile=cuda_graphs"])
    refuses("is not empty; add --resume", "train-teacher", out=teacher_run)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    refuses("--track wandb: wandb is not installed", "train-teacher", "--track", "wandb")
    refuses("--track wandb: wandb is not installed", *student, "--track", "wandb")
    monkeypatch.undo()
    refuses("method bkd learns from a cache; name one with --cache", "train-student")
    refuses("method bkd learns from no backbone; leave out --backbone", *student, "--backbone", teacher_run)
    refuses("is not for this run: temperature", "train-student", "--cache", cache, overrides=["cache.temperature=3"])
    crt = "student.method={name: crt}"
    wider = [crt, "student.model.width=8"]
    refuses("another network than the new one", "train-student", "--backbone", teacher_run, overrides=wider)
    refuses("is not a run's folder", "train-student", "--backbone", tmp_path, overrides=[crt])
    refuses("knows other classes", "dump-logits", "--teacher", teacher_run, overrides=[two_classes(tmp_path)])
    refuses("is not empty; resume the dump", "dump-logits", "--teacher", teacher_run, out=cache)
    refuses(
        "a.zarr is not empty", "dump-logits", "--apart", "--teacher", "runs/a", "--teacher", "b", out=taken(tmp_path, "a.zarr")
    )
    alike = "--teacher", "runs/a", "--teacher", "others/a"
    refuses("kept apart by the names of their folders; give them different ones", "dump-logits", "--apart", *alike)
    refuses("kept apart by the names", "dump-logits", *alike, overrides=["cache.features=true"])
    cbd = ["student.method={name: cbd}", "student.model.cosine_scale=20", "student.model.projection=32"]
    features = tmp_path / "features.zarr"
    dump_logits(tiny.experiment("cache.features=true"), [str(teacher_run)], str(features), tiny.CPU)
    narrow = "features are 32 wide, those of the cache's teachers together 16; set student.model.projection=16"
    refuses(narrow, "train-student", "--cache", features, overrides=cbd)
    unknown = ["teacher.model={name: torchvision, architecture: resnet18, weights: IMAGENET1K_V7}"]
    refuses("there are no weights 'IMAGENET1K_V7' of resnet18; IMAGENET1K_V1, DEFAULT are", "train-teacher", overrides=unknown)
    resized = ["views={name: random_resized_crop, size: 12, count: 2}"]
    sizes = "is for images of 8 x 8 pixels, found 12 x 12; give it images that large"
    refuses(sizes, "dump-logits", "--teacher", teacher_run, overrides=resized)
    with pytest.raises(UserError, match=sizes):
        dump_logits(tiny.experiment(*resized), [str(teacher_run)], str(tmp_path / "resized"), tiny.CPU)
    assert not (tmp_path / "resized").exists()
    transformer = "teacher.model={name: torchvision, architecture: vit_b_32}"
    refuses("cannot train on 64 images of (8, 8) pixels (Wrong image height!", "train-teacher", overrides=[transformer])


def test_of_several_processes_the_first_alone_makes_a_dry_run(monkeypatch, teacher_run):
    monkeypatch.setenv("WORLD_SIZE", "3")
    plans = (
        ("train-teacher", *tiny.options(), "--out", "x", "--dry-run"),
        ("dump-logits", *tiny.options(), "--teacher", teacher_run, "--out", "x", "--dry-run"),
    )
    shares = "3 processes cannot have equal shares of training.batch_size 64; change one or the other"
    assert shares in refused(*plans[0])
    whole = "-o", "student.method={name: oltr}", "-o", "student.model.memory=true", "--backbone", teacher_run
    said = refused("train-student", *tiny.options(), *whole, "--out", "x", "--dry-run")
    assert "method oltr learns from whole batches; train it in one process, without torchrun" in said
    assert "nothing written" in run(*plans[1]).stdout
    monkeypatch.setenv("RANK", "1")
    for plan in plans:
        result = run(*plan)
        assert result.exit_code == 0 and not result.output


def test_a_dry_run_notes_what_the_command_notes(teacher_run, capsys):
    def notes(command, *extra, overrides):
        with pytest.raises(SystemExit) as stop:
            dry(command, *extra, overrides=overrides)
        assert stop.value.code == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]

    step = "teacher.training.schedule={name: step, warmup_epochs: 2, milestones: [1, 7]}"
    assert notes("train-teacher", overrides=[step]) == [
        "note: training.schedule.milestones 7 do not come in 2 epochs",
        "note: training.schedule.warmup_epochs 2 do not end in 2 epochs",
    ]
    (note,) = notes("dump-logits", "--teacher", teacher_run, overrides=["data.max_per_class=20"])
    assert "was trained on other images (464 samples of 10 classes) than it is asked about (" in note
    assert not notes("dump-logits", "--teacher", teacher_run, overrides=[])


def taken(folder, name):
    """A folder with something of that name in it."""
    (folder / "taken" / name / "done").mkdir(parents=True)
    return folder / "taken"


def two_classes(folder) -> str:
    """An override for a data set of two classes, which it makes."""
    from PIL import Image

    for name in "ab":
        (folder / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "train" / name / "0.png")
    return f"data={{name: imagefolder, root: {folder}, train: train, test: train, workers: 0}}"


def test_a_reader_that_goes_away_is_no_error(cache):
    command = [sys.executable, str(ROOT / "cli.py"), "inspect", str(cache), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_an_example(command):
    result = run(command, "--help")
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert result.exit_code == 0 and lines[1].startswith(f"Example: python cli.py {command}")


def test_a_folder_that_is_not_empty_is_refused_and_both_ways_on_are_named(tmp_path, teacher_run):
    before = {path.name: path.read_bytes() for path in teacher_run.iterdir()}
    error = refused("train-teacher", *tiny.options(), "--out", teacher_run)
    assert "is not empty; add --resume" in error and "another folder" in error
    changed = ["train-teacher", *tiny.options("teacher.training.batch_size=32"), "--out", teacher_run, "--resume"]
    assert "teacher.training.batch_size was 64 and is now 32" in refused(*changed)
    other_stage = ["train-student", *tiny.options("student.method={name: ce}"), "--out", teacher_run, "--resume"]
    assert "holds a teacher's run, not a student's" in refused(*other_stage)
    (tmp_path / "mine.txt").write_text("precious")
    assert "holds no run to resume" in refused("train-teacher", *tiny.options(), "--out", tmp_path, "--resume")
    assert "is a file" in refused("train-teacher", *tiny.options(), "--out", tmp_path / "mine.txt")
    assert "mine.txt is a file; name a folder" in refused(
        "dump-logits", *tiny.options(), "--teacher", tmp_path, "--out", tmp_path / "mine.txt"
    )
    assert {path.name: path.read_bytes() for path in teacher_run.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian-teacher"], "there is no command 'trian-teacher'; did you mean 'train-teacher'?"),
        (["train-teacher", "--out", "x"], "Missing option '--config'"),
        (["reproduce", "--table", "cifar", "--out", "x", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["verify", "x", "--checksums", "--teacher", "y"], "--checksums computes no answers; leave out --teacher"),
        (["verify", "x", "--checksums", "--views", "2"], "--checksums computes no answers; leave out --teacher, --views"),
        (["inspect", "x", "--parts", "2", "--all"], "--parts prints numbers of parts alone, --all what the cache"),
        (["train-teacher", "--config", "nowhere.yaml", "--out", "x"], "cannot read the configuration nowhere.yaml"),
        (
            ["train-teacher", *tiny.options("views.padd=1"), "--out", "x"],
            "views.padd: unknown key; did you mean 'pad'?",
        ),
        (["dump-logits", *tiny.options(), "--teacher", "nowhere", "--out", "x"], "there is no folder nowhere"),
        (["train-student", *tiny.options(), "--out", "x"], "method bkd learns from a cache; name one with --cache"),
        (
            ["dump-logits", *tiny.options(), "--teacher", "nowhere", "--out", "memory://x"],
            "memory://x: nothing stays there when the command ends; name a folder, or an address on an object store",
        ),
        (
            ["train-student", *tiny.options(), "--cache", "x", "--cache", "y", "--out", "z"],
            "--cache takes one value, and is given 2 times",
        ),
        (["evaluate", "nowhere"], "there is no folder nowhere"),
        (["inspect", "nowhere.zarr"], "nowhere.zarr"),
        (["train-teacher", "--config", tiny.CONFIG, "--device", "cuda", "--out", "x"], "torch finds no CUDA device"),
    ],
)
def test_what_a_user_gets_wrong_ends_with_2_and_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["train-student", *tiny.options(), "--cache", "", "--out", "x"], "--cache"),
        (["train-student", *tiny.options("student.method.name=crt"), "--backbone", "", "--out", "x"], "--backbone"),
        (["train-teacher", *tiny.options(), "--out", ""], "--out"),
        (["train-teacher", "--config", "", "--out", "x"], "--config"),
        (["dump-logits", *tiny.options(), "--teacher", "", "--out", "x"], "--teacher"),
        (["evaluate", ""], "RUN"),
        (["inspect", ""], "STORE"),
        (["report", "", "--out", "x"], "RUN"),
        (["reproduce", "--table", "cifar", "--out", "", "--dry-run"], "--out"),
    ],
)
def test_an_empty_name_is_not_the_folder_one_stands_in(capsys, monkeypatch, tmp_path, command, named):
    from offline_bkd import cli

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and named in said and "it is empty; is a variable of the shell's not set?" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", "2>&-"])
def test_streams_that_the_shell_closed_are_no_failure_and_no_files(tmp_path, cache, closed):
    command = [sys.executable, ROOT / "cli.py", "export", cache, "--out", tmp_path / "out.parquet"]
    script = ["bash", "-c", f'"$@" {closed}', "bash", *map(str, command)]
    process = subprocess.run(script, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "") and (tmp_path / "out.parquet").read_bytes()[:4] == b"PAR1"
    script[-4:] = ["inspect", str(cache)]  # which asks whether it writes on a terminal
    assert subprocess.run(script, capture_output=True, text=True).returncode == 0


def test_letters_that_the_output_cannot_show_are_shown_by_their_escapes(tmp_path, cache):
    (tmp_path / "é").symlink_to(cache)
    result = run_alone("inspect", tmp_path / "é", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "") and "\\xe9" in result.stdout and result.stdout.isascii()


def test_debug_shows_where_an_error_came_from(tmp_path):
    result = run("evaluate", tmp_path, "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr and "pipeline/runs" in result.stderr
    said = refused("evaluate", tmp_path)
    assert said.startswith("error: ") and said.count("\n") == 1


def interrupted_in_epoch_3(send, *overrides, out):
    """A command that trains, which `send` interrupts, said one line and ended with 130."""
    options = tiny.options("teacher.training.epochs=500", *overrides)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "train-teacher", *options, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a job in the background is started with interrupts ignored, one under nohup with hangups
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    try:
        while not process.stdout.readline().startswith("epoch 2/"):
            assert process.poll() is None
        send(process)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and error.startswith("error: interrupted; give the") and error.count("\n") == 1, error
    until = time.monotonic() + 10  # a worker that was being forked is not waited for: it ends by itself, a moment later
    with pytest.raises(ProcessLookupError):  # none of its processes is left
        while time.monotonic() < until:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_ends_with_130_and_says_how_to_go_on(tmp_path, sent):
    def send(process):
        process.send_signal(sent)
        process.send_signal(signal.SIGTERM)  # as a terminal and a parent each send their own

    interrupted_in_epoch_3(send, out=tmp_path / "run")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_s_signal_which_workers_get_too_is_answered_once(tmp_path, sent):
    folder_of_images(tmp_path / "images")
    data = f"data={{name: imagefolder, root: '{tmp_path / 'images'}', workers: 2}}"
    crops = "views={name: random_resized_crop, size: 8, count: 2}"

    def send(process):
        while not any(file.read_text() for file in Path(f"/proc/{process.pid}/task").glob("*/children")):
            assert process.poll() is None
        os.killpg(process.pid, sent)

    interrupted_in_epoch_3(send, data, crops, "teacher.training.batch_size=1", out=tmp_path / "run")


def test_under_nohup_a_closed_terminal_is_ignored():
    code = "import signal, cli; signal.signal(1, signal.SIG_IGN)\nfrom offline_bkd.pipeline import guard\n"
    code += "guard.end_as_interrupted(); signal.raise_signal(1)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("number", "message", "code"),
    [
        (errno.EACCES, "a/b: Permission denied; check its permissions, or name another place", 2),
        (errno.ENAMETOOLONG, "a/b: File name too long; name another place", 2),
        (errno.EROFS, "a/b: Read-only file system; check its permissions, or name another place", 2),
        (
            errno.ENOSPC,
            "a/b: No space left on device; make room and give the command again, with --resume if it has one",
            1,
        ),
        (errno.EIO, "[Errno 5] Input/output error: 'a/b' (OSError)", 1),
    ],
)
def test_a_place_that_takes_no_file_is_named_with_the_way_out(number, message, code):
    assert guard.explained(OSError(number, os.strerror(number), "a/b")) == (message, code)


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EFBIG, 1), (errno.EACCES, 2)])
def test_a_cache_that_finds_no_room_has_failed_and_is_no_wrong_input(tmp_path, monkeypatch, number, code):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", fails)
    with pytest.raises(CacheError, match=f"s cannot be written: {os.strerror(number)}; choose another place") as caught:
        create_cache(tmp_path / "s", **cache_store.arguments())
    assert guard.explained(caught.value)[1] == code


def test_of_an_error_of_many_lines_the_first_is_said():
    error = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere.\n\nSet X=1 to debug.\n")
    assert guard.explained(error) == ("CUDA error: out of memory (RuntimeError)", 1)


def test_an_error_that_quotes_what_a_terminal_obeys_shows_it_as_text(tmp_path):
    (tmp_path / "a\x1b[2J").mkdir()
    error = refused("evaluate", tmp_path / "a\x1b[2J")
    assert "a\\x1b[2J is not a run's folder" in error and "\x1b" not in error


def test_help_starts_fast_because_nothing_heavy_is_imported():
    code = "import sys, cli; assert not {'torch', 'zarr', 'numpy', 'pandas', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_alone("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.4, "of processor time: the clock on the wall depends on who else is running"


def test_processes_of_one_torchrun_share_a_dump_and_the_bytes_are_the_same(tmp_path, teacher_run, cache):
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "dump-logits",
        *tiny.options(tiny.EXACT),
    ]
    command += ["--teacher", str(teacher_run), "--out", str(tmp_path / "cache.zarr")]
    started = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    shared, alone = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "cache.zarr", cache)
    )
    assert shared == alone
