"""Several processes train one network as one process does: the same rows, the same gradients, one writer."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from train_in_ranks import trained

from offline_bkd.pipeline import UserError, runs, schema, train
from offline_bkd.pipeline.evaluate import ask_run
from offline_bkd.pipeline.train import train_student
from offline_bkd.pipeline.training.ranks import Ranks, refuse_shares, synchronised

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("samples", [1, 2, 3, 127, 128, 129, 130, 131, 257, 464])
@pytest.mark.parametrize(("world", "batch_size"), [(2, 64), (2, 6), (4, 64), (4, 128), (3, 63)])
def test_the_shares_of_all_ranks_are_the_epoch_batch_by_batch(samples, world, batch_size):
    rows, views = np.random.default_rng(0).permutation(samples), np.arange(samples) % 9
    shares = [Ranks(rank, world).share(rows, views, batch_size) for rank in range(world)]
    steps = -(-samples // batch_size)
    assert all(-(-len(share.rows) // share.batch_size) == steps for share in shares), "every rank takes part in every step"
    for step in range(steps):
        whole = rows[step * batch_size : (step + 1) * batch_size]
        counting = [share for share in shares if share.idle_step != step]
        parts = [share.rows[step * share.batch_size : (step + 1) * share.batch_size] for share in counting]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    for share in shares:
        np.testing.assert_array_equal(share.views, views[np.argsort(rows)[share.rows]])


def test_batch_statistics_of_all_ranks_keep_what_timm_s_layers_do_after_them():
    timm = pytest.importorskip("timm")
    model, images = timm.create_model("mobilenetv3_small_050", num_classes=3).eval(), torch.rand(2, 3, 64, 64)
    expected = model(images)
    converted = synchronised(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    torch.testing.assert_close(converted(images), expected)


def launch(world: int, *arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, **options)


@pytest.fixture(scope="module")
def in_two_ranks(tmp_path_factory):
    """What two ranks trained, and the folder of a run that they wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    assert launch(2, ROOT / "tests" / "train_in_ranks.py", folder / "found", folder / "run").wait() == 0
    return torch.load(folder / "found", weights_only=True), folder / "run"


def test_losses_and_weights_of_an_epoch_are_those_of_one_process(in_two_ranks):
    every = np.arange(257)
    assert [Ranks(rank, 2).share(every, every, 64).idle_step for rank in (0, 1)] == [4, None], "one idles in the last step"
    (found, _), alone = in_two_ranks, trained()
    for method, values in alone.items():
        for name, value in values.items():
            torch.testing.assert_close(found[method][name], value, rtol=1e-9, atol=1e-12, msg=f"{method} {name}")


def test_the_network_that_all_ranks_score_is_the_one_that_is_saved(in_two_ranks):
    """On CPUs each rank has batch statistics of its own: the scores would be of two networks."""
    _, folder = in_two_ranks
    scored = runs.open_run(folder).summary()["last"]
    assert scored.pop("epoch") == 1
    for name, value in ask_run(str(folder), "last", (), tiny.CPU).scores.items():
        assert scored.pop(name) == pytest.approx(value, rel=1e-5), name
    assert not scored


def test_a_killed_rank_ends_all_and_any_number_goes_on(tmp_path):
    options = [ROOT / "cli.py", "train-student", *tiny.options("student.method={name: ce}", "student.training.epochs=12")]
    tracked = ["--track", "tensorboard"] if importlib.util.find_spec("tensorboard") else []
    command = [*options, "--out", tmp_path / "run", "--resume", *tracked]
    process = launch(2, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if line.startswith("epoch 2/"):
            break
    os.kill(int(workers[-1]), signal.SIGKILL)
    start = time.monotonic()
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.monotonic() - start < 60
    assert rest.count("epoch 12/12") == 0 and not (tmp_path / "run" / "summary.json").exists()
    assert 2 <= len(runs.Run(tmp_path / "run").metrics()) < 12, "one process writes"
    assert len(list((tmp_path / "run").glob("tensorboard/*"))) == len(tracked) / 2, "and is followed"
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["epoch"] for record in runs.open_run(tmp_path / "run").metrics()] == [*range(1, 13)]


class BesideOneThatSeesNothing(Ranks):
    """This process, among ranks of which another has found no run to go on with."""

    def least(self, value):
        return value.clamp(max=0)


def test_ranks_that_see_different_folders_are_refused(tmp_path, monkeypatch):
    """As on machines where the folder is a disk of each one's own."""
    asked = tiny.experiment("student.method={name: ce}"), None, str(tmp_path / "run"), tiny.CPU
    with tiny.interrupted_after(1):
        train_student(*asked)
    with monkeypatch.context() as patch:
        patch.setattr(train, "join", lambda device: BesideOneThatSeesNothing())
        with pytest.raises(UserError, match="do not see the same run in .*/run; put it where all of them can read it"):
            train_student(*asked, resume=True)
    assert len(runs.Run(tmp_path / "run").metrics()) == 1 and not (tmp_path / "run" / "summary.json").exists()


def test_batches_that_cannot_be_shared_are_refused():
    refuse_shares(schema.LFME(name="lfme"), 127, 0, 1)
    refuse_shares(schema.BBN(name="bbn"), 128, 4, 4)
    for method, batch_size, judged, world, message in (
        ("ce", 128, 3, 4, "4 processes cannot share 3 test or validation images; start fewer processes"),
        ("ce", 128, 3, 3, "3 processes cannot have equal shares of training.batch_size 128; change one or the other"),
        ("bbn", 126, 9, 2, "2 processes cannot have an even share of training.batch_size 126"),
        ("lfme", 128, 9, 2, "method lfme learns from whole batches; train it in one process, without torchrun"),
        ("oltr", 128, 9, 2, "method oltr learns from whole batches"),
    ):
        with pytest.raises(UserError, match=message):
            refuse_shares(schema.METHODS[method](name=method), batch_size, judged, world)
