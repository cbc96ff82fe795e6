"""Trackers show what a run keeps, each epoch once, and never end it."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from offline_bkd import cli
from offline_bkd.pipeline import runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import ResidentImages
from offline_bkd.pipeline.show import trackers
from offline_bkd.pipeline.train import train_teacher
from offline_bkd.pipeline.training import engine
from offline_bkd.pipeline.training.methods.contract import StepLoss
from offline_bkd.pipeline.training.optimisation import Optimisation

ONE = "teacher.training.epochs=1"


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads of a run: by name, the value of each step; a step that is there twice is an error."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = reading.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    found = {}
    for name in read.Tags()["scalars"]:
        events = read.Scalars(name)
        found[name] = {event.step: event.value for event in events}
        assert len(found[name]) == len(events)
    return found


def test_tensorboard_shows_every_epoch_once_also_of_a_run_that_was_interrupted(tmp_path):
    pytest.importorskip("tensorboard")
    config, folder = tiny.experiment("teacher.training.epochs=3"), tmp_path / "run"
    with tiny.interrupted_after(1):
        train_teacher(config, str(folder), tiny.CPU, tracker="tensorboard")
    assert set(scalars(folder)["train/loss"]) == {1}
    train_teacher(config, str(folder), tiny.CPU, resume=True, tracker="tensorboard")
    shown, records = scalars(folder), runs.Run(folder).metrics()
    for name, of in {
        "train/loss": lambda record: record["loss"],
        "train/all": lambda record: record["train_top1"],
        "train/learning_rate": lambda record: record["learning_rate"],
        "test/all": lambda record: record["test"]["top1"],
        "test/few": lambda record: record["test"]["few"],
        "speed/images_per_second": lambda record: record["images_per_second"],
    }.items():
        assert shown[name] == {record["epoch"]: np.float32(of(record)) for record in records}, name
    assert not any(name.startswith("validation/") for name in shown)


def test_a_run_that_began_without_a_tracker_shows_its_first_epochs_too(tmp_path):
    pytest.importorskip("tensorboard")
    config, folder = tiny.experiment(), tmp_path / "run"
    with tiny.interrupted_after(1):
        train_teacher(config, str(folder), tiny.CPU)
    train_teacher(config, str(folder), tiny.CPU, resume=True, tracker="tensorboard")
    assert set(scalars(folder)["test/all"]) == {1, 2}


class Service:
    """As much of wandb as is called."""

    def __init__(self):
        self.inits, self.logged, self.last, self.finished = [], [], {}, 0

    def init(self, **values):
        self.inits.append(values)
        start = self.last.get(values["id"], 0)
        return types.SimpleNamespace(
            offline=True,
            dir=f"{values['dir']}/wandb/offline-run/files",
            starting_step=start,
            log=lambda row, step: self._log(values["id"], row, step),
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )

    def _log(self, run, row, step):
        self.logged.append((step, row))
        self.last[run] = step + 1


def with_wandb(monkeypatch, service) -> None:
    module = types.ModuleType("wandb")
    module.init, module.Settings = service.init, dict
    module.__spec__ = types.SimpleNamespace(origin="wandb/__init__.py")
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_resumed_run_is_the_same_one_of_wandbs_and_sends_no_epoch_twice(tmp_path, monkeypatch):
    with_wandb(monkeypatch, service := Service())
    config, folder = tiny.experiment("teacher.training.epochs=3"), tmp_path / "run"
    with tiny.interrupted_after(1):
        train_teacher(config, str(folder), tiny.CPU, tracker="wandb")
    train_teacher(config, str(folder), tiny.CPU, resume=True, tracker="wandb")
    first, second = service.inits
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["name"] == "run"
    assert first["config"]["teacher"]["training"]["epochs"] == 3
    assert [step for step, _ in service.logged] == [1, 2, 3] and service.finished == 2
    assert service.logged[-1][1]["test/all"] == runs.Run(folder).metrics()[-1]["test"]["top1"]
    train_teacher(tiny.experiment(ONE), str(tmp_path / "other"), tiny.CPU, tracker="wandb")
    assert service.inits[-1]["id"] != first["id"]


def test_a_tracker_that_fails_leaves_a_note_and_the_same_weights(tmp_path, monkeypatch, teacher_run):
    service = Service()
    service._log = lambda *_: (_ for _ in ()).throw(OSError("no space\nleft"))
    with_wandb(monkeypatch, service)
    train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU, tracker="wandb")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("note: wandb no longer follows this run: no space left; training goes on") == 1
    assert runs.open_run(tmp_path / "run").summary()["digest"] == runs.open_run(teacher_run).summary()["digest"]


def test_a_tracker_that_is_missing_or_cannot_begin_is_one_line_before_training(tmp_path, monkeypatch):
    def command(out):
        words = ["train-teacher", *tiny.options(), "--out", str(tmp_path / out), "--track", "wandb"]
        return CliRunner().invoke(cli.main, words)

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    result = command("none")
    assert result.exit_code == 2 and 'pip install ".[wandb]"' in result.output and not (tmp_path / "none").exists()
    monkeypatch.undo()
    with_wandb(monkeypatch, service := Service())
    service.init = lambda **_: (_ for _ in ()).throw(RuntimeError("no key"))
    sys.modules["wandb"].init = service.init
    result = command("refused")
    assert result.exit_code == 2 and "--track wandb cannot begin: no key; put it right and add --resume" in result.output
    assert not (tmp_path / "refused" / "metrics.jsonl").exists()


def test_a_folder_named_as_a_tracker_is_not_taken_for_it(tmp_path):
    (tmp_path / "wandb").mkdir()
    words = f"import sys; sys.path.insert(0, {str(Path(cli.__file__).parent)!r}); import cli\n"
    words += "from offline_bkd.pipeline.show import trackers\n"
    words += "sys.modules.pop('wandb', None); sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + ['.']\n"
    words += "trackers.refuse_missing('wandb')"
    ended = subprocess.run([sys.executable, "-c", words], cwd=tmp_path, capture_output=True, text=True)
    assert "wandb is not installed" in ended.stderr


def test_the_rate_of_a_commands_first_epoch_leaves_out_its_first_steps(monkeypatch):
    """With a clock that a step moves by one second, the first five by a hundred."""
    config, now, steps = tiny.experiment("teacher.training.batch_size=20"), [0.0], [0]
    training_set = datasets.load(config.data).training
    images = ResidentImages(training_set, config.views, tiny.CPU)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 10))

    class Rows:
        rows = staticmethod(lambda epoch: np.arange(len(training_set)))

        @staticmethod
        def loss(output, batch, epoch):
            now[0] += 100 if steps[0] < engine.WARM_UP else 1
            steps[0] += 1
            correct = (output.argmax(1) == batch.label).float()
            loss = torch.nn.functional.cross_entropy(output, batch.label, reduction="none")
            return StepLoss(loss=loss, correct=correct)

    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    task = engine.Task(
        model=model,
        network=model,
        method=Rows(),
        images=images,
        sample_id=training_set.sample_id,
        views=config.views,
        targets=None,
        evaluate=None,
        validate=None,
        training=config.teacher.training,
        seed=0,
    )
    forward, optimisation = lambda images: model(images / 255), Optimisation(model, model, config.teacher.training)
    record = engine.train_epoch(task, forward, optimisation, 0, first=0)
    batches = -(-len(training_set) // 20)
    assert record["seconds"] == 500 + batches - 5
    assert record["images_per_second"] == pytest.approx((len(training_set) - 100) / (batches - 5))
    steps[0] = 0
    later = engine.train_epoch(task, forward, optimisation, 1, first=0)
    assert later["images_per_second"] == pytest.approx(len(training_set) / (500 + batches - 5))
