"""What a run says of itself: where it ran, what it reached, and what tells it from other runs."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, FiniteFloat, NonNegativeInt, model_validator

from offline_bkd.pipeline import schema
from offline_bkd.pipeline.device import device_name
from offline_bkd.pipeline.schema import Experiment

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torchvision", "timm", "numpy", "zarr", "numcodecs", "pandas", "pyarrow", "safetensors", "pillow", "offline-bkd")


class Scores(BaseModel):
    """Of the test part, in percent."""

    top1: FiniteFloat
    many: FiniteFloat | None
    medium: FiniteFloat | None
    few: FiniteFloat | None
    per_class: list[FiniteFloat | None]


class ScoresOfEpoch(Scores):
    epoch: int
    validation: Scores | None = None  # beside the test's, of the epoch that was chosen by it


class Epoch(BaseModel):
    """What other commands read of a line of metrics.jsonl."""

    epoch: int
    loss: FiniteFloat
    seconds: FiniteFloat
    data_share: FiniteFloat
    test: Scores | None = None  # not every epoch is evaluated
    validation: Scores | None = None


class Summary(BaseModel):
    """What other commands read of summary.json."""

    method: str
    seed: int
    classes: list[str]
    class_counts: list[NonNegativeInt]
    dataset: dict
    test_dataset: dict
    teacher: dict | None
    digest: str
    last: ScoresOfEpoch
    best: ScoresOfEpoch
    best_by: Literal["validation", "test"] = "test"  # which part's accuracy the best epoch was the best of

    @model_validator(mode="after")
    def _of_every_class(self):
        if any(len(part) != len(self.classes) for part in (self.class_counts, self.last.per_class, self.best.per_class)):
            raise ValueError(f"class_counts and per_class are not of {len(self.classes)} classes")
        return self


class Environment(BaseModel):
    """What other commands read of environment.json."""

    command: str
    commit: str | None = None  # runs of earlier versions do not say it
    stage: Literal["teacher", "student"]
    device: str
    packages: dict[str, str]
    threads: int
    learns_from: str | None
    data: dict[str, dict[str, str]] | None = None  # fingerprints of its parts; runs of earlier versions do not say them


def environment(stage: str, device: torch.device) -> dict:
    """What a run ran on, for its record."""
    versions = {"torch": torch.__version__}  # with its build, which the package's metadata leave out
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "stage": stage,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def commit() -> str | None:
    """Of the checkout that runs, with -dirty where a file of it was changed; None of an installed package."""
    if not (ROOT / ".git").exists():  # git would look above, where another project may be
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None


def settings(config: Experiment, stage: str) -> dict:
    """What a configuration says that tells a run of `stage` from others.

    Which images and which cache it had stands in environment.json, under data and learns_from.
    """
    return config.model_dump(mode="json", include={"seed", "data", "views", stage}, exclude={"data": schema.PLACE})


def difference(old, new, key: str = "") -> str | None:
    """The first difference between two nested dictionaries in words, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if changed := difference(old.get(name), new.get(name), f"{key}.{name}" if key else name):
                return changed
        return None
    return None if old == new else f"{key} was {old!r} and is now {new!r}"
