"""Experiment trackers, which show runs while they train: TensorBoard, Weights & Biases. A run is whole without them."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import yaml

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import dump_config
from offline_bkd.pipeline.runs import Run
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.show.terminal import COLUMNS

SPEED = ("images_per_second", "data_share", "seconds", "evaluation_seconds")
PROJECT = "offline-bkd"


class Tracker(Protocol):
    """What a tracker's own class adds to `follow`."""

    shown_at: str  # where a person looks
    first: int  # the first epoch that the tracker lacks

    def log(self, values: dict[str, float], epoch: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder. What a run that was interrupted wrote there is replaced."""

    def __init__(self, run: Run, config: Experiment):
        from torch.utils.tensorboard import SummaryWriter

        self.shown_at, self.first = f"tensorboard --logdir {run.folder}", 1
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=1)
        self.writer.add_text("configuration", f"```\n{dump_config(config)}```")

    def log(self, values: dict[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the service's, the same one after --resume. With WANDB_MODE=offline it stays in the run's folder."""

    def __init__(self, run: Run, config: Experiment):
        import wandb

        began = (run.folder / "config.yaml").stat().st_mtime_ns  # a run that takes the place of another is another
        self.run = wandb.init(
            project=PROJECT,
            name=run.folder.resolve().name,
            id=hashlib.sha256(f"{run.folder.resolve()} {began}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run.folder),
            config=yaml.safe_load(dump_config(config)),
            settings=wandb.Settings(silent=True),
        )
        online = None if self.run.offline else self.run.url  # asked offline, it warns
        self.shown_at, self.first = online or f"wandb sync {Path(self.run.dir).parent}", max(1, self.run.starting_step)

    def log(self, values: dict[str, float], epoch: int) -> None:
        self.run.log(values, step=epoch)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Run, Experiment], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def refuse_missing(name: str | None) -> None:
    """Raises UserError for a tracker that is not installed."""
    spec = name and importlib.util.find_spec(name)
    if name and not (spec and spec.origin):  # a folder of that name, such as the one that wandb writes, is no package
        raise UserError(f'--track {name}: {name} is not installed; pip install ".[{name}]", or leave out --track')


@contextmanager
def follow(name: str | None, run: Run, config: Experiment) -> Iterator[Callable[[dict], None]]:
    """A context, whose function sends the record of an epoch that `run` has just kept to the tracker `name`; None: nowhere.

    With the first record go those before that the tracker lacks. A tracker that fails while the run trains is left with a
    note. Raises UserError for one that cannot begin.
    """
    if name is None or run.has("summary.json"):
        yield lambda record: None
        return
    try:
        tracker: Tracker | None = TRACKERS[name](run, config)
    except Exception as error:
        raise UserError(f"--track {name} cannot begin: {_line(error)}; put it right and add --resume, or leave it out")
    assert tracker
    run.log(f"followed by {name}: {tracker.shown_at}")
    lacking: int | None = tracker.first

    def send(record: dict) -> None:
        nonlocal tracker, lacking
        if tracker is None:
            return
        try:
            for kept in [record] if lacking is None else run.metrics()[lacking - 1 :]:
                tracker.log(values_of(kept), kept["epoch"])
            lacking = None
        except Exception as error:
            run.log(f"note: {name} no longer follows this run: {_line(error)}; training goes on")
            tracker = None

    try:
        yield send
    finally:
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:
                run.log(f"note: {name} has not closed this run: {_line(error)}")


def values_of(record: dict) -> dict[str, float]:
    """The numbers of an epoch's record by the part they are of: train/loss, test/few (percent), speed/images_per_second."""
    values: dict[str, float] = {}
    for key, value in record.items():
        if key in ("test", "validation"):
            values |= {f"{key}/{name}": value[score] for name, score in COLUMNS.items() if value[score] is not None}
        elif key in SPEED:
            values[f"speed/{key}"] = value
        elif key != "epoch" and isinstance(value, int | float):
            values[f"train/{'all' if key == 'train_top1' else key}"] = value
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
