"""A run's folder: what is believed of it, what is refused, and that it may lie where nothing can be written."""

import errno
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_folders import folder_of_images

from offline_bkd.cache.storage import LocalStorage
from offline_bkd.cli import main
from offline_bkd.pipeline import UserError, runs, train
from offline_bkd.pipeline.evaluate import ask_run, evaluate
from offline_bkd.pipeline.train import train_teacher

READERS = {
    "config.yaml": lambda run: run.config(),
    "environment.json": lambda run: run.environment(),
    "metrics.jsonl": lambda run: run.metrics(2),
    "summary.json": lambda run: run.summary(),
    "last.safetensors": lambda run: run.load_tensors("last"),
    "best.safetensors": lambda run: run.load_tensors("best"),
    "state.safetensors": lambda run: run.load_tensors("state"),
}


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """A run of four epochs that was interrupted after the second."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with tiny.interrupted_after(2):
        train_teacher(tiny.experiment("teacher.training.epochs=4"), str(folder), tiny.CPU)
    return folder


@pytest.fixture
def run(tmp_path, teacher_run):
    """A complete run that may be damaged."""
    shutil.copytree(teacher_run, tmp_path / "run")
    return runs.open_run(tmp_path / "run")


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("file", READERS)
def test_a_flipped_bit_anywhere_is_refused_and_the_file_is_named(tmp_path, teacher_run, cut_run, file):
    source = (cut_run if file.startswith("state") else teacher_run) / file
    damaged, data = runs.Run(tmp_path), source.read_bytes()
    (tmp_path / file).write_bytes(data)
    READERS[file](damaged)
    generator, bits = np.random.default_rng(0), 8 * len(data)
    # anywhere; and where names, shapes and the checksum itself stand: at the beginning and at the end
    for bit in (*generator.integers(0, bits, 24), *generator.integers(0, 8 * 600, 24), *range(bits - 8 * 90, bits, 31)):
        (tmp_path / file).write_bytes(flipped(data, int(bit)))
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / file))}"):
            READERS[file](damaged)


def test_a_run_without_checksums_as_earlier_versions_wrote_it_is_read_and_resumed(tmp_path, cut_run, teacher_run):
    def without_checksums(folder):
        for path in folder.glob("*.json*"):
            text = re.sub(r',\s*"(checksum|best_digest)": "(sha256:)?[0-9a-f]{64}"', "", path.read_text())
            path.write_text(text)
        path = folder / "config.yaml"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                metadata = {key: value for key, value in file.metadata().items() if key != "checksum"}
            save_file(load_file(path), path, metadata)

    for name, source in (("old", teacher_run), ("cut", cut_run)):
        shutil.copytree(source, tmp_path / name)
        without_checksums(tmp_path / name)
    scores = ask_run(str(tmp_path / "old"), "best", (), tiny.CPU).scores
    assert scores["top1"] == runs.open_run(tmp_path / "old").summary()["best"]["top1"]
    train_teacher(tiny.experiment("teacher.training.epochs=4"), str(tmp_path / "cut"), tiny.CPU, resume=True)
    assert [record["epoch"] for record in runs.open_run(tmp_path / "cut").metrics()] == [1, 2, 3, 4]


def test_files_with_checksums_stay_plain(teacher_run):
    summary = json.loads((teacher_run / "summary.json").read_text())
    assert len(summary["digest"]) == 64 and summary["checksum"].startswith("sha256:")
    assert yaml.safe_load((teacher_run / "config.yaml").read_text())["name"] == "digits-lt"
    assert [json.loads(line)["epoch"] for line in (teacher_run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    ours, _ = runs.open_run(teacher_run).load_tensors("last")
    assert all(torch.equal(value, ours[name]) for name, value in load_file(teacher_run / "last.safetensors").items())


def test_the_best_checkpoint_of_another_run_is_refused(run, cut_run):
    shutil.copy(cut_run / "best.safetensors", run.folder)
    with pytest.raises(UserError, match="best.safetensors in .* is not the checkpoint its summary.json describes"):
        ask_run(str(run.folder), "best", (), tiny.CPU)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("summary.json", "[" * 100_000, "nested too deeply"),
        ("summary.json", '{"a":' * 100_000, "nested too deeply"),
        ("environment.json", "[" * 100_000, "nested too deeply"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "nested too deeply"),
        ("summary.json", "{}", "method: Field required"),
        ("metrics.jsonl", '{"epoch": 1}\n', "loss: Field required"),
        ("metrics.jsonl", "5\n", "valid dictionary"),
        ("metrics.jsonl", '{"epoch": 1, "loss": NaN, "seconds": 1, "data_share": 0}\n', "NaN is no number of JSON's"),
        ("metrics.jsonl", '{"epoch": 1, "loss": 1e999, "seconds": 1, "data_share": 0}\n', "loss: Input should be a finite"),
        ("config.yaml", b"\xff\xfe", "can't decode byte"),
    ],
)
def test_what_is_no_record_of_a_run_is_named(run, file, text, reason):
    (run.folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"{file} is missing or damaged .*{reason}.*; restore it or train again"):
        READERS[file](run)


def test_a_number_that_is_none_is_no_score(run):
    path = run.folder / "summary.json"
    path.write_text(re.sub(r'"top1": [0-9.]+', '"top1": NaN', path.read_text()))
    with pytest.raises(UserError, match="summary.json is missing or damaged .NaN is no number of JSON's."):
        run.summary()


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused_and_nothing_waits_for_it(run, file, kind):
    path = run.folder / file
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    found = "Is a directory" if kind == "folder" else "it is no regular file"
    with pytest.raises(UserError, match=f"{file}.*{found}"):
        READERS[file](run)


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "log.txt")
    with pytest.raises(OSError, match="No such device or address|no regular file"):
        runs.Run(tmp_path).log("a line")


def test_a_full_disk_is_reported_with_the_file_that_has_no_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*summary.json"):
        runs.write_whole(tmp_path / "summary.json", b"")
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        runs.Run(tmp_path).append_metrics({"epoch": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_run_may_lie_where_nothing_can_be_written(run, monkeypatch):
    before = {path: path.read_bytes() for path in run.folder.iterdir()}

    def refuse(path, *_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(LocalStorage, "write", refuse)
    monkeypatch.setattr(runs.folder, "append", refuse)
    train_teacher(tiny.experiment(), str(run.folder), tiny.CPU, resume=True)
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before


def test_what_a_run_says_never_reaches_the_terminal_as_commands(tmp_path, capsys):
    run = runs.Run(tmp_path, label="seed 1: ")
    run.log("class \x1b[2Jcat\nerror: \u202egnp")
    assert capsys.readouterr().out == "seed 1: class \\x1b[2Jcat\\nerror: \\u202egnp\n"
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


def test_a_run_cannot_lie_at_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://bucket/teacher is an address, where only caches may lie; name a folder"):
        train_teacher(tiny.experiment(), "s3://bucket/teacher", tiny.CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_nor_can_what_is_shown_of_runs(tmp_path, monkeypatch, teacher_run, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("offline_bkd.pipeline.evaluate.infer", lambda *_, **__: pytest.fail("it was asked before"))
    result = CliRunner().invoke(main, [command, str(teacher_run), "--out", "s3://bucket/shown"])
    assert result.exit_code == 2
    assert "--out s3:/bucket/shown is an address, where only caches may lie; name a folder" in result.output
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_its_images_wherever_they_lie_and_with_no_others(tmp_path):
    folder_of_images(tmp_path / "here")
    there, views = tmp_path / "there", "views={name: random_resized_crop, size: 8, count: 3}"
    values, run = "data={name: imagefolder, root: %s, workers: 0}", str(tmp_path / "run")
    train_teacher(tiny.experiment(values % (tmp_path / "here"), views), run, tiny.CPU)
    (tmp_path / "here").rename(there)
    train_teacher(tiny.experiment(values % there, views), run, tiny.CPU, resume=True)
    next((there / "train").rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"cannot resume .*/run: its training images are not those it began with; restore"):
        train_teacher(tiny.experiment(values % there, views), run, tiny.CPU, resume=True)


def test_how_images_are_read_does_not_tell_runs_apart():
    values = "data={name: parquet, train: a, test: b, root: ., copies: %s, workers: %d}"
    first, second = (tiny.experiment(values % one) for one in (("here", 2), ("there", 3)))
    assert runs.record.settings(first, "teacher") == runs.record.settings(second, "teacher")
    other = tiny.experiment("data={name: parquet, train: a, test: c, root: ., copies: here}")
    assert runs.record.settings(first, "teacher") != runs.record.settings(other, "teacher")


def test_the_best_epoch_is_whole_where_a_run_ended_before_its_file(tmp_path, monkeypatch):
    config, save, scores = (
        tiny.experiment("teacher.training.epochs=3"),
        runs.Run.save_tensors,
        itertools.cycle([1.0, 5.0, 3.0]),
    )
    monkeypatch.setattr(train, "evaluate", lambda *args, **options: {**evaluate(*args, **options), "top1": next(scores)})
    train_teacher(config, str(tmp_path / "whole"), tiny.CPU)
    assert runs.open_run(tmp_path / "whole").summary()["best"]["epoch"] == 2

    def stop(self, name, tensors, **metadata):
        if name == "best" and metadata["epoch"] == 2:
            raise KeyboardInterrupt
        save(self, name, tensors, **metadata)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Run, "save_tensors", stop)
        train_teacher(config, str(tmp_path / "cut"), tiny.CPU)
    assert runs.Run(tmp_path / "cut").load_tensors("best")[1]["epoch"] == 1
    train_teacher(config, str(tmp_path / "cut"), tiny.CPU, resume=True)
    (cut, said), (whole, expected) = (runs.open_run(tmp_path / name).load_tensors("best") for name in ("cut", "whole"))
    assert said == expected and runs.digest(cut) == runs.digest(whole)


@pytest.mark.parametrize("command", ["reproduce", "predict", "evaluate", "import-model", "report", "inspect"])
def test_commands_of_one_process_are_refused_under_torchrun(monkeypatch, capsys, command):
    from offline_bkd import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "x"])
    assert stop.value.code == 2 and f"{command} runs in one process, but torchrun started 2 of it" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "x"])
    assert stop.value.code == 2 and "WORLD_SIZE is 'x', where torchrun sets a number" in capsys.readouterr().err


def test_what_a_killed_run_left_half_written_is_taken_away(tmp_path, cut_run):
    folder = shutil.copytree(cut_run, tmp_path / "cut")
    for name in "last.safetensors.0123456789abcdef.partial", "summary.json.aaaaaaaaaaaaaaaa.partial":
        (folder / name).write_text("half")
    with runs.start_run(folder, runs.Run(folder).config(), "teacher", tiny.CPU, resume=True):
        assert not list(folder.glob("*.partial"))
