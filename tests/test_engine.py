"""The training loop: the published schedule, the same bits after an interruption, a stop where the loss diverges."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from offline_bkd.pipeline import NotFinite, UserError, evaluate, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import ResidentImages, open_images
from offline_bkd.pipeline.dry_run import show_training_plan
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.schema import Cosine, OneCycle, Training
from offline_bkd.pipeline.train import train_student, train_teacher
from offline_bkd.pipeline.training import engine
from offline_bkd.pipeline.training.methods import StepLoss
from offline_bkd.pipeline.training.optimisation import build_optimiser, learning_rate
from offline_bkd.pipeline.training.samplers import instance_balanced

ROOT = Path(__file__).parent.parent


def rates(training: Training, steps_per_epoch: int) -> list[float]:
    total = training.epochs * steps_per_epoch
    return [learning_rate(training, step, steps_per_epoch) for step in range(total)]


def test_the_step_schedule_is_the_papers():
    by_epoch = rates(Training(), 3)[::3]
    np.testing.assert_allclose(by_epoch[:6], [0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    np.testing.assert_allclose(by_epoch[159:161], [0.1, 0.001])
    np.testing.assert_allclose(by_epoch[179:181], [0.001, 0.00001])


def test_a_warm_up_may_begin_above_zero_as_bbns_does():
    schedule = {"name": "step", "warmup_epochs": 5, "warmup_from": 1 / 3, "milestones": [119, 159]}
    by_epoch = rates(Training(schedule=schedule), 2)[::2]
    np.testing.assert_allclose(by_epoch[:6], [0.0466667, 0.06, 0.0733333, 0.0866667, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose([by_epoch[118], by_epoch[119], by_epoch[159]], [0.1, 0.001, 0.00001])


def test_a_backbone_may_learn_at_a_share_of_the_rate_or_not_at_all(tmp_path, teacher_run):
    moved = {}
    for share in (1, 0.1, 0):
        settings = "student.method={name: ce}", "student.training.epochs=1", "student.training.batch_size=464"
        config = tiny.experiment(*settings, f"student.training.backbone_rate={share}", "student.training.momentum=0")
        train_student(config, None, str(tmp_path / f"{share}"), tiny.CPU)
        start = build_model(config.student.model, 10, config.data, 0).state_dict()
        end = tensors(tmp_path / f"{share}")
        moved[share] = {name: end[name] - start[name] for name in ("network.conv1.weight", "network.fc.weight")}
    np.testing.assert_allclose(moved[0.1]["network.conv1.weight"], 0.1 * moved[1]["network.conv1.weight"], atol=1e-6)
    assert not moved[0]["network.conv1.weight"].any() and moved[1]["network.conv1.weight"].any()
    for share in (0.1, 0):
        np.testing.assert_allclose(moved[share]["network.fc.weight"], moved[1]["network.fc.weight"], atol=1e-6)


def test_the_cosine_schedule_rises_first_where_asked():
    found = rates(Training(epochs=10, schedule=Cosine(name="cosine", warmup_epochs=2)), 4)
    np.testing.assert_allclose(found[:8], 0.1 * np.arange(1, 9) / 8)
    np.testing.assert_allclose(found[8:], rates(Training(epochs=8, schedule=Cosine(name="cosine")), 4))


def test_the_cosine_schedule_is_torchs():
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 40)
    expected = []
    for _ in range(40):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        oracle.step()
    np.testing.assert_allclose(rates(Training(epochs=10, learning_rate=0.2, schedule=Cosine(name="cosine")), 4), expected)


def test_the_one_cycle_schedule_rises_and_falls_in_straight_lines():
    found = rates(Training(epochs=4, schedule=OneCycle(name="one_cycle", warmup=0.25)), 10)
    assert max(found) == pytest.approx(0.1) and np.argmax(found) == 10
    assert np.allclose(np.diff(found[:11]), found[0]) and np.allclose(np.diff(found[10:]), -found[-1])


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    ids = np.arange(100) * 3
    orders = [instance_balanced(7, epoch, ids) for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(instance_balanced(7, 1, ids), orders[1])
    assert not np.array_equal(instance_balanced(8, 1, ids), orders[1])


def tensors(folder, name="last"):
    return runs.Run(Path(folder)).load_tensors(name)[0]


TIMES = {"seconds", "evaluation_seconds", "data_share", "images_per_second"}


def equal_runs(first, second) -> bool:
    same = [torch.equal(value, tensors(second)[name]) for name, value in tensors(first).items()]
    strip = [[{k: v for k, v in r.items() if k not in TIMES} for r in runs.Run(Path(f)).metrics()] for f in (first, second)]
    return all(same) and strip[0] == strip[1]


def test_the_same_configuration_gives_the_same_bits_and_another_seed_others(tmp_path, teacher_run):
    train_teacher(tiny.experiment(), str(tmp_path / "again"), tiny.CPU)
    train_teacher(tiny.experiment(seed=1), str(tmp_path / "other"), tiny.CPU)
    assert equal_runs(teacher_run, tmp_path / "again")
    assert not equal_runs(teacher_run, tmp_path / "other")


class Stop(Exception):
    pass


def best_epochs(folder) -> list[int]:
    """The epochs that were the best so far when they ended."""
    accuracy = [record["test"]["top1"] for record in runs.Run(Path(folder)).metrics()]
    return [epoch for epoch in range(1, len(accuracy) + 1) if accuracy[epoch - 1] > max(accuracy[: epoch - 1], default=-1)]


@pytest.mark.parametrize("file", ["best.safetensors", "last.safetensors", "state.safetensors", "summary.json"])
def test_interrupted_and_resumed_is_uninterrupted_wherever_it_stopped(tmp_path, cache, file, monkeypatch):
    config = tiny.experiment("student.training.epochs=4")
    train_student(config, str(cache), str(tmp_path / "whole"), tiny.CPU)
    writes = {"best.safetensors": 2, "summary.json": 1}.get(file, 3)
    written, write = [], runs.folder.write_whole

    def stop_before(path, data):
        written.append(path.name)
        if written.count(file) == writes:
            raise Stop
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        for module in (runs.folder, runs.files):
            patch.setattr(module, "write_whole", stop_before)
        train_student(config, str(cache), str(tmp_path / "cut"), tiny.CPU)
    with tiny.epochs_trained() as again:
        train_student(config, str(cache), str(tmp_path / "cut"), tiny.CPU, resume=True)
    begun = {"best.safetensors": best_epochs(tmp_path / "whole")[1] + 1, "summary.json": 5}.get(file, 3)
    assert again == [*range(begun, 5)], "it goes on after the last epoch whose state is there"
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert runs.Run(tmp_path / "whole").summary()["best"] == runs.Run(tmp_path / "cut").summary()["best"]
    assert not (tmp_path / "cut" / "state.safetensors").exists()


def test_twenty_interruptions_at_random_steps_change_no_bit(tmp_path, monkeypatch):
    from offline_bkd.pipeline.training import losses

    config = tiny.experiment("teacher.training.epochs=16")
    train_teacher(config, str(tmp_path / "whole"), tiny.CPU)
    generator, left = np.random.default_rng(0), [0]

    def stop_at_some_step(logits, label, *smoothing):
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        return cross_entropy(logits, label)

    cross_entropy = losses.cross_entropy
    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(losses, "cross_entropy", stop_at_some_step)
        while stops < 20:
            left[0] = int(generator.integers(1, 14))  # eight steps an epoch
            with pytest.raises(Stop):
                train_teacher(config, str(tmp_path / "cut"), tiny.CPU, resume=True)
            stops += 1
    train_teacher(config, str(tmp_path / "cut"), tiny.CPU, resume=True)
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    epochs = "teacher.training.epochs=8"
    train_teacher(tiny.experiment(epochs), str(tmp_path / "whole"), tiny.CPU)
    command = [sys.executable, str(ROOT / "cli.py"), "train-teacher", *tiny.options(epochs), "--out", str(tmp_path / "cut")]
    for attempt in range(2):
        process = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f"epoch {2 * attempt + 1}/"):
                break
        time.sleep(0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was at work"
    assert not (tmp_path / "cut" / "summary.json").exists()
    left = runs.Run(tmp_path / "cut").load_tensors("state")[1]["epoch"]
    with tiny.epochs_trained() as again:
        train_teacher(tiny.experiment(epochs), str(tmp_path / "cut"), tiny.CPU, resume=True)
    assert again == [*range(left + 1, 9)] and left > 2
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("metrics.jsonl", lambda text: text[:-9], "metrics.jsonl is missing or damaged"),
        ("metrics.jsonl", lambda text: text.partition("\n")[2], "metrics.jsonl is .* damaged .not every epoch is there once"),
        ("metrics.jsonl", lambda text: "", "metrics.jsonl is .* damaged .not every epoch is there once"),
        ("metrics.jsonl", None, "metrics.jsonl is missing or damaged"),
        ("state.safetensors", None, "has lost state.safetensors, which --resume needs; restore it, or name another folder"),
    ],
)
def test_a_run_that_lost_something_is_not_resumed(tmp_path, file, damage, message):
    config, path = tiny.experiment("teacher.training.epochs=4"), tmp_path / "run" / file
    with tiny.interrupted_after(2):
        train_teacher(config, str(tmp_path / "run"), tiny.CPU)
    damaged = damage and damage(path.read_text())
    path.write_text(damaged) if damage else path.unlink()
    last = (tmp_path / "run" / "last.safetensors").read_bytes()
    with pytest.raises(UserError, match=message):
        train_teacher(config, str(tmp_path / "run"), tiny.CPU, resume=True)
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == last


def test_a_line_that_was_being_written_when_the_run_was_killed_is_forgotten(tmp_path):
    config = tiny.experiment("teacher.training.epochs=4")
    train_teacher(config, str(tmp_path / "whole"), tiny.CPU)
    with tiny.interrupted_after(2):
        train_teacher(config, str(tmp_path / "cut"), tiny.CPU)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    train_teacher(config, str(tmp_path / "cut"), tiny.CPU, resume=True)
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny.experiment("teacher.training.learning_rate=1e30", "teacher.training.schedule={name: constant}")
    with pytest.raises(NotFinite, match=r"epoch 1, step \d+, learning rate 1e\+30; no epoch was finished; .* samples \d+, "):
        train_teacher(config, str(tmp_path / "run"), tiny.CPU)
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_the_step_that_diverged_is_the_one_named(tmp_path, monkeypatch):
    from offline_bkd.pipeline.training import losses

    calls, cross_entropy = [], losses.cross_entropy

    def poisoned(logits, label, *smoothing):
        calls.append(len(label))
        return cross_entropy(logits, label) * (float("nan") if len(calls) == 11 else 1)

    monkeypatch.setattr(losses, "cross_entropy", poisoned)
    with pytest.raises(NotFinite, match=r"epoch 2, step 10, .*the checkpoint of epoch 1 is kept"):
        train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU)  # 8 steps an epoch
    state, metadata = runs.Run(tmp_path / "run").load_tensors("last")
    assert metadata["epoch"] == 1 and all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("method", ["ce", "cb"])
def test_the_loss_that_is_recorded_is_the_one_that_is_minimised(tmp_path, monkeypatch, method):
    minimised, mean = [], StepLoss.mean
    monkeypatch.setattr(StepLoss, "mean", lambda terms: minimised.append(mean(terms)) or minimised[-1])
    whole = f"teacher.method={{name: {method}}}", "teacher.training.batch_size=464"  # a step an epoch
    train_teacher(tiny.experiment(*whole), str(tmp_path / "run"), tiny.CPU)
    recorded = [record["loss"] for record in runs.Run(tmp_path / "run").metrics()]
    assert recorded == pytest.approx([float(loss.detach()) for loss in minimised], rel=1e-5)


def test_answers_that_are_not_finite_stop_the_run_before_they_are_written(tmp_path, monkeypatch):
    calls, real = [], evaluate.infer

    def overflowed(*given, **named):
        calls.append(1)
        return real(*given, **named) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(evaluate, "infer", overflowed)
    with pytest.raises(NotFinite, match="epoch 2: the network's answers are not .*; the checkpoint of epoch 1 is kept"):
        train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU)
    run = runs.Run(tmp_path / "run")
    assert [record["epoch"] for record in run.metrics()] == [1] and run.load_tensors("state")[1]["epoch"] == 1


def test_a_run_keeps_the_last_and_the_best_epoch_and_names_them_so(tmp_path, pictures_of_runs):
    train_teacher(tiny.experiment("teacher.training.epochs=4"), str(tmp_path / "run"), tiny.CPU)
    run = runs.open_run(tmp_path / "run")
    summary, records = run.summary(), run.metrics()
    accuracies = [record["test"]["top1"] for record in records]
    assert summary["last"]["epoch"] == 4 and summary["last"]["top1"] == accuracies[-1]
    assert summary["best"]["top1"] == max(accuracies)
    assert summary["best"]["epoch"] == 1 + accuracies.index(max(accuracies))
    assert run.load_tensors("best")[1]["epoch"] == summary["best"]["epoch"]
    assert len(summary["last"]["per_class"]) == 10
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and "cpu" in environment["device"]
    assert {"config.yaml", "log.txt", "curves.png", "accuracy_by_class.png"} <= {p.name for p in run.folder.iterdir()}


def test_what_a_run_does_not_look_at_may_change_before_it_is_resumed(tmp_path, teacher_run):
    with tiny.interrupted_after(1):
        train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU)
    for changed in ("teacher.model.width=6", "views.pad=2", "data.imbalance_ratio=10", "teacher.training.momentum=0.8"):
        with pytest.raises(UserError, match=f"cannot resume .*{changed.split('=')[0]} was"):
            train_teacher(tiny.experiment(changed), str(tmp_path / "run"), tiny.CPU, resume=True)
    others = tiny.experiment("student.model.width=6", "cache.temperature=3", "data.workers=0", "name=another")
    train_teacher(others, str(tmp_path / "run"), tiny.CPU, resume=True)
    assert equal_runs(teacher_run, tmp_path / "run")


def test_a_run_goes_on_on_its_kind_of_device_alone_whatever_its_threads_and_as_earlier_versions_called_it(tmp_path, capsys):
    with tiny.interrupted_after(1):
        train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU)
    record = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert record["device"] == f"cpu ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"
    runs.write_json(tmp_path / "run" / "environment.json", record | {"device": "NVIDIA L4"})
    with pytest.raises(
        UserError, match="it began on NVIDIA L4, which rounds differently; go on there, or name another folder"
    ):
        train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU, resume=True)
    runs.write_json(tmp_path / "run" / "environment.json", record | {"device": "cpu (64 cores)"})
    train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU, resume=True)
    assert runs.open_run(tmp_path / "run").summary()["last"]["epoch"] == 2


def test_evaluations_may_be_fewer_but_the_last_epoch_has_one(tmp_path):
    config = tiny.experiment("teacher.training.epochs=5", "teacher.training.evaluate_every=2")
    train_teacher(config, str(tmp_path / "run"), tiny.CPU)
    assert [record["epoch"] for record in runs.Run(tmp_path / "run").metrics() if "test" in record] == [2, 4, 5]


def test_a_last_step_that_ruins_the_weights_is_noticed(tmp_path):
    config = tiny.experiment(
        "teacher.training.epochs=1", "teacher.training.batch_size=1000", "teacher.training.learning_rate=1e30",
        "teacher.training.weight_decay=1e30",
    )  # fmt: skip
    with pytest.raises(NotFinite, match="step 0"):
        train_teacher(config, str(tmp_path / "run"), tiny.CPU)


class Dropping(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return torch.nn.functional.dropout(self.inner(images), 0.3, self.training)


@pytest.fixture
def dropping(monkeypatch):
    """Networks that draw random numbers themselves."""
    from offline_bkd.pipeline import train

    build = train.build_model
    monkeypatch.setattr(train, "build_model", lambda *arguments: Dropping(build(*arguments)))


def test_dropout_follows_the_seed_and_survives_an_interruption(tmp_path, dropping, monkeypatch):
    from offline_bkd.pipeline.training import losses

    config = tiny.experiment("teacher.training.epochs=3")
    train_teacher(config, str(tmp_path / "whole"), tiny.CPU)
    cross_entropy, calls = losses.cross_entropy, []

    def stop(logits, label, *smoothing):
        calls.append(1)
        if len(calls) == 12:
            raise Stop
        return cross_entropy(logits, label)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(losses, "cross_entropy", stop)
        train_teacher(config, str(tmp_path / "cut"), tiny.CPU)
    torch.rand(3)
    train_teacher(config, str(tmp_path / "cut"), tiny.CPU, resume=True)
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_what_a_network_draws_itself_is_another_in_every_epoch_and_of_every_seed(tmp_path, monkeypatch):
    begun_with, draw = [], engine._draw
    monkeypatch.setattr(engine, "_draw", lambda *of: begun_with.append(torch.initial_seed()) or draw(*of))
    for seed in (0, 1):
        train_teacher(tiny.experiment("teacher.training.epochs=3", seed=seed), str(tmp_path / str(seed)), tiny.CPU)
    assert len(begun_with) == len({*begun_with}) == 6


def test_students_of_several_seeds_are_those_trained_alone_even_after_an_interruption(
    tmp_path, cache, dropping, monkeypatch, capsys
):
    for seed in (0, 1, 2):
        train_student(tiny.experiment(seed=seed), str(cache), str(tmp_path / f"alone-{seed}"), tiny.CPU)
    written, write = [], runs.folder.write_whole

    def stop_before(path, data):
        written.append(path.name)
        if written.count("last.safetensors") == 2:
            raise Stop
        write(path, data)

    at_once = tiny.experiment(), str(cache), str(tmp_path / "at-once"), tiny.CPU
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(runs.folder, "write_whole", stop_before)
        train_student(*at_once, seeds=(0, 1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(runs.record, "commit", lambda: "of another day")
        train_student(*at_once, seeds=(0, 1, 2), resume=True)
    notes = re.findall("(.*)note: the run began with commit", capsys.readouterr().out)
    assert notes == ["seed 0: "], "once, of the one that had begun"
    assert all(equal_runs(tmp_path / f"alone-{seed}", tmp_path / f"at-once-{seed}") for seed in (0, 1, 2))


def test_teachers_of_several_seeds_are_those_trained_alone(tmp_path, teacher_run):
    train_teacher(tiny.experiment(), str(tmp_path / "t"), tiny.CPU, seeds=(0,))
    assert equal_runs(teacher_run, tmp_path / "t-0")


def test_of_several_students_none_begins_where_one_is_refused(tmp_path, cache):
    train_student(tiny.experiment("student.training.epochs=1"), str(cache), str(tmp_path / "s"), tiny.CPU, seeds=(1,))
    with pytest.raises(UserError, match="s-1: student.training.epochs was 1 and is now 2"):
        train_student(tiny.experiment(), str(cache), str(tmp_path / "s"), tiny.CPU, seeds=(0, 1), resume=True)
    assert not (tmp_path / "s-0").exists()
    with pytest.raises(UserError, match="--out '' is no name that seeds can be added to"):
        train_student(tiny.experiment(), str(cache), "", tiny.CPU, seeds=(0, 1))


def test_a_student_that_diverges_leaves_the_others_to_their_ends(tmp_path, cache, monkeypatch):
    from offline_bkd.pipeline.training import losses

    calls, distillation = [], losses.distillation

    def poisoned(*arguments):
        calls.append(1)
        return distillation(*arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(losses, "distillation", poisoned)
    with pytest.raises(NotFinite, match="seed 1: training diverged .not finite. at epoch 1, step 2"):
        train_student(tiny.experiment(), str(cache), str(tmp_path / "s"), tiny.CPU, seeds=(1, 0))
    assert runs.open_run(tmp_path / "s-0").summary()["last"]["epoch"] == 2


@pytest.mark.cuda
def test_training_on_a_cuda_device_follows_the_cpu(tmp_path, teacher_run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as the commands do
    train_teacher(tiny.experiment(), str(tmp_path / "cuda"), torch.device("cuda"))
    cpu, cuda = (runs.Run(Path(folder)).metrics() for folder in (teacher_run, tmp_path / "cuda"))
    assert cuda[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.02)
    train_teacher(tiny.experiment(), str(tmp_path / "again"), torch.device("cuda"))
    first, again = (runs.open_run(tmp_path / name).summary()["digest"] for name in ("cuda", "again"))
    assert first == again, "one seed, one device, other bits"


def test_the_share_of_time_spent_waiting_for_data_is_reported(tmp_path, monkeypatch):
    batches = ResidentImages.batches

    def slow(self, rows, views, batch_size):
        for batch in batches(self, rows, views, batch_size):
            time.sleep(0.2)
            yield batch

    train_teacher(tiny.experiment(), str(tmp_path / "fast"), tiny.CPU)
    monkeypatch.setattr(ResidentImages, "batches", slow)
    train_teacher(tiny.experiment(), str(tmp_path / "slow"), tiny.CPU)
    fast, late = (runs.open_run(tmp_path / name).summary() for name in ("fast", "slow"))
    assert fast["data_share"] < 0.5 < late["data_share"] < 1
    assert fast["peak_memory"] > 1e8, "bytes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.color_jitter=strong", "holds no answers to jittered images; leave out color_jitter"),
        ("teacher.method.name=bkd", "which stage one has not written yet; train it as a student"),
        ("teacher={expert: few, method: {name: cb}, model: {name: cifar_resnet}}", "trained by method ce; found cb"),
    ],
)
def test_what_would_teach_wrongly_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        tiny.experiment(override)


def test_what_is_asked_of_sgd_reaches_it():
    (group,) = build_optimiser(torch.nn.Linear(2, 2), Training(nesterov=True, momentum=0.8, weight_decay=0.3)).param_groups
    assert (group["nesterov"], group["momentum"], group["weight_decay"]) == (True, 0.8, 0.3)


def test_compilation_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="teacher.training.compile needs a C.. compiler, and there is none; install g.."):
        train_teacher(tiny.experiment("teacher.training.compile=true"), str(tmp_path / "t"), tiny.CPU)


def test_cuda_graphs_are_refused_where_there_is_no_cuda(tmp_path):
    with pytest.raises(UserError, match="teacher.training.compile: cuda_graphs needs a CUDA device, found cpu"):
        train_teacher(tiny.experiment("teacher.training.compile=cuda_graphs"), str(tmp_path / "t"), tiny.CPU)
    assert not (tmp_path / "t").exists()


@contextmanager
def recorded_steps():
    """A context that gives what every step in it is given, by which means it is made, and what comes of it."""
    seen, train_epoch = [], engine.train_epoch

    class Watched:
        def __init__(self, task, optimisation):
            self.method, self.optimisation, self.rows = task.method, optimisation, task.method.rows

        def loss(self, output, batch, epoch):
            terms = self.method.loss(output, batch, epoch)
            seen[-1] |= {"rows": batch.rows, "views": batch.views, "label": batch.label, "loss": terms.mean().item()}
            return terms

    def watched(task, forward, optimisation, epoch, first):
        weight = next(parameter for parameter in task.model.parameters() if parameter.dim() == 4)
        means = type(forward), weight.is_contiguous(), optimisation.optimiser.defaults["fused"]
        step = type(optimisation).step

        def look(images):
            seen.append({"images": images.clone(), "means": means})
            return forward(images)

        def note(self, loss, rate):
            seen[-1]["learning rate"] = torch.tensor(rate, dtype=torch.float64)
            step(self, loss, rate)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(optimisation), "step", note)
            return train_epoch(replace(task, method=Watched(task, optimisation)), look, optimisation, epoch, first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_epoch", watched)
        yield seen


def train_slowly(cache, folder, device, *overrides):
    """The steps and the weights of a student that learns at so low a rate that a difference of rounding does not grow."""
    config = tiny.experiment("student.training.epochs=3", "student.training.learning_rate=0.001", *overrides)
    with recorded_steps() as steps:
        train_student(config, str(cache), str(folder), torch.device(device))
    return steps, tensors(folder)


@pytest.fixture(scope="module")
def plain_steps(tmp_path_factory, cache):
    """A function of a device: those of the student as it is without a switch."""
    return functools.cache(lambda device: train_slowly(cache, tmp_path_factory.mktemp("plain") / "run", device))


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler; there is none here"
)


# Float32 that is not compiled ends such steps 3e-6 from float64, compiled 5e-7: the two may be so far apart. Bfloat16 rounds
# each activation by up to 2^-9, which comes to 1e-3.
@pytest.mark.parametrize(
    ("device", "switch", "rounding"),
    [
        ("cpu", "channels_last=false", 2e-6),
        ("cpu", "fused=false", 2e-6),
        ("cpu", "precision=bfloat16", 4e-3),
        pytest.param("cpu", "compile=true", 4e-6, marks=needs_compiler),
        pytest.param("cuda", "compile=cuda_graphs", 1e-3, marks=[pytest.mark.cuda, needs_compiler]),
    ],
)
def test_what_makes_steps_fast_leaves_the_recipe_as_it_is(tmp_path, cache, plain_steps, device, switch, rounding):
    plain, weights = plain_steps(device)
    fast, others = train_slowly(cache, tmp_path / "fast", device, f"student.training.{switch}")
    assert [len(step["rows"]) for step in plain] == 3 * [*7 * [64], 16], "464 samples: the last batch is smaller, and kept"
    assert len({float(step["learning rate"]) for step in plain}) > 20, "it changes with every step"
    done = [[(step["means"], step["loss"]) for step in run] for run in (plain, fast)]
    assert done[0] != done[1], "the switch does something, if only to the last bits"
    for expected, step in zip(plain, fast, strict=True):
        for given in ("rows", "views", "label", "images", "learning rate"):
            assert torch.equal(step[given], expected[given]), given
        assert step["loss"] == pytest.approx(expected["loss"], rel=rounding)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=rounding, atol=rounding)


def test_compiled_full_batches_run_one_graph_whatever_came_between(tmp_path, monkeypatch):
    """So that a resumed run, or a student of another seed before it, goes on with the same arithmetic."""
    ran, real = [], torch.compile

    def compile(network, mode, **options):
        made = []

        def backend(graph, inputs):
            number = len(made)
            made.append(graph)
            return lambda *given: (
                ran.append((number, next(len(one) for one in given if getattr(one, "dtype", None) == torch.uint8)))
                or graph(*given)
            )

        return real(network, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile)
    asked = tiny.experiment("teacher.training.compile=true", "teacher.training.batch_size=180")
    train_teacher(asked, str(tmp_path / "run"), tiny.CPU)
    assert ran == 2 * [(0, 180), (0, 180), (1, 104)]


@pytest.mark.parametrize(
    "settings",
    [
        ("channels_last=false", "fused=false"),
        ("optimizer=adamw", "learning_rate=0.001", "gradient_clip=1"),
        ("ema=0.9", "backbone_rate=0.1"),
        pytest.param(("compile=true", "precision=bfloat16"), marks=needs_compiler),
    ],
)
def test_an_interruption_changes_no_bit_whatever_the_memory_format_and_the_optimiser(tmp_path, cache, settings, device):
    config = tiny.experiment(*(f"student.training.{setting}" for setting in settings))
    train_student(config, str(cache), str(tmp_path / "whole"), device)
    with tiny.interrupted_after(1):
        train_student(config, str(cache), str(tmp_path / "cut"), device)
    train_student(config, str(cache), str(tmp_path / "cut"), device, resume=True)
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_what_is_evaluated_and_saved_is_the_moving_average(tmp_path, monkeypatch):
    from offline_bkd.pipeline.training.optimisation import Optimisation

    weights, step = [], Optimisation.step

    def record(self, loss, rate):
        if not weights:
            weights.append(self.model.network.fc.weight.detach().clone())
        step(self, loss, rate)
        weights.append(self.model.network.fc.weight.detach().clone())

    monkeypatch.setattr(Optimisation, "step", record)
    config = tiny.experiment("teacher.training.ema=0.75", "teacher.training.epochs=1")
    train_teacher(config, str(tmp_path / "run"), tiny.CPU)
    expected = weights[1]  # an average begins with the weights after the first step
    for later in weights[2:]:
        expected = 0.75 * expected + 0.25 * later
    torch.testing.assert_close(tensors(tmp_path / "run")["network.fc.weight"], expected)
    found = evaluate.ask_run(str(tmp_path / "run"), "last", (), tiny.CPU)
    assert {"epoch": 1, **found.scores} == runs.open_run(tmp_path / "run").summary()["last"]


def test_gradients_are_clipped_to_a_norm_of_all_together():
    from offline_bkd.pipeline.training.optimisation import Optimisation

    model = torch.nn.Linear(3, 2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    training = Training(gradient_clip=0.5, momentum=0, weight_decay=0)
    Optimisation(model, model, training).step(1e3 * model(torch.ones(1, 3)).sum(), 1.0)
    moved = torch.cat([(old - new).flatten() for old, new in zip(before, model.parameters())])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_adamw_decays_neither_biases_nor_scales():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    groups = build_optimiser(model, Training(optimizer="adamw", weight_decay=0.05, momentum=0.8)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.05), (3, 0.0)]
    assert all(group["betas"] == (0.8, 0.999) for group in groups)


def test_with_a_validation_part_the_best_epoch_is_its_best_and_nothing_else_chooses(tmp_path):
    config = tiny.experiment("data.validation=0.2", "teacher.training.epochs=5", "teacher.training.evaluate_every=2")
    train_teacher(config, str(tmp_path / "whole"), tiny.CPU)
    run = runs.open_run(tmp_path / "whole")
    summary, judged = run.summary(), [record for record in run.metrics() if "test" in record]
    assert [record["epoch"] for record in judged] == [2, 4, 5]
    best = max(judged, key=lambda record: (record["validation"]["top1"], -record["epoch"]))
    assert summary["best_by"] == "validation" and summary["best"]["epoch"] == best["epoch"]
    assert summary["best"]["top1"] == best["test"]["top1"] and summary["best"]["validation"] == best["validation"]
    assert sum(summary["class_counts"]) < 400, "held out of 464 images"
    held_out = open_images(datasets.load(config.data).validation, config.views, tiny.CPU, 0)
    scores = evaluate.evaluate(evaluate.load_model(run, "last", config, 10), held_out, np.array(summary["class_counts"]))
    assert judged[-1]["validation"] == scores != judged[-1]["test"]
    with tiny.interrupted_after(4):
        train_teacher(config, str(tmp_path / "cut"), tiny.CPU)
    train_teacher(config, str(tmp_path / "cut"), tiny.CPU, resume=True)
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert runs.open_run(tmp_path / "cut").summary()["best"] == summary["best"]


def test_test_images_of_another_size_are_refused_before_anything_is_written(tmp_path):
    from PIL import Image

    for part, side in (("train", 8), ("test", 16)):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (side, side), (number * 80, 0, 0)).save(tmp_path / part / name / f"{number}.png")
    config = tiny.experiment(f"data={{name: imagefolder, root: {tmp_path}, workers: 0}}")
    with pytest.raises(UserError, match="has images of 16 x 16 pixels, the training part of 8 x 8; make them one size"):
        train_teacher(config, str(tmp_path / "run"), tiny.CPU)
    with pytest.raises(UserError, match="has images of 16 x 16 pixels"):
        show_training_plan(config, tiny.CPU, "teacher", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
