"""A tiny experiment on real images: handwritten digits made long-tailed, a small network, two epochs."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import cli  # noqa: F401  binds offline_bkd to this checkout, also in processes that tests start
from offline_bkd.pipeline import runs
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.training import engine

CONFIG = Path(__file__).parent / "digits.yaml"
CPU = torch.device("cpu")
EXACT = "cache.encoding={name: probability, dtype: float32}"
SMALL = (
    "teacher.model={name: cifar_resnet, depth: 8, width: 4}",
    "student.model={name: cifar_resnet, depth: 8, width: 4}",
    "teacher.training.epochs=2",
    "student.training.epochs=2",
)


def experiment(*overrides: str, seed: int | None = None) -> Experiment:
    return load_config(CONFIG, (*SMALL, *overrides), seed)


def options(*overrides: str) -> list[str]:
    """The same for a command line."""
    found = ["--config", str(CONFIG), "--device", "cpu"]
    for override in (*SMALL, *overrides):
        found += ["-o", override]
    return found


class Stop(Exception):
    pass


@contextmanager
def epochs_trained():
    """A context that gives the list of the epochs that training does in it, counted from 1."""
    done, train_epoch = [], engine.train_epoch

    def note(task, forward, optimisation, epoch, *first):
        done.append(epoch + 1)
        return train_epoch(task, forward, optimisation, epoch, *first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_epoch", note)
        yield done


@contextmanager
def interrupted_after(epochs: int):
    """A context that training leaves when it would record the epoch after so many."""
    append = runs.Run.append_metrics

    def stop(run, record):
        if record["epoch"] == epochs + 1:
            raise Stop
        append(run, record)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(runs.Run, "append_metrics", stop)
        yield
