"""A run's folder: what it holds, how it is made, read and resumed.

    config.yaml            the resolved experiment
    environment.json       versions, device, threads, command
    log.txt                what was printed
    metrics.jsonl          one object an epoch
    summary.json           scores of the last and the best epoch; its presence says that the run is complete
    last.safetensors       weights after the last epoch that ended
    best.safetensors       weights of the best evaluated epoch by test accuracy (reported as best, chosen by nothing)
    state.safetensors      what resuming needs beside: optimiser, epoch; removed when the run is complete
    *.png                  curves, accuracy by class

Every file is written under another name, synchronised and renamed, so it is whole or absent.
"""

import fcntl
import hashlib
import json
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from offline_bkd.cache.storage import LocalStorage
from offline_bkd.cache.views import to_json
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import dump_config, load_config
from offline_bkd.pipeline.schema import Experiment

PACKAGES = ("torchvision", "numpy", "zarr", "numcodecs", "pandas", "pyarrow", "safetensors", "pillow", "offline-bkd")


class _Scores(BaseModel):
    epoch: int
    top1: float
    many: float | None
    medium: float | None
    few: float | None
    per_class: list[float | None]


class _Summary(BaseModel):
    """What other commands read of summary.json."""

    method: str
    seed: int
    classes: list[str]
    class_counts: list[NonNegativeInt]
    dataset: dict
    test_dataset: dict
    teacher: dict | None
    digest: str
    last: _Scores
    best: _Scores

    @model_validator(mode="after")
    def _of_every_class(self):
        if any(len(part) != len(self.classes) for part in (self.class_counts, self.last.per_class, self.best.per_class)):
            raise ValueError(f"class_counts and per_class are not of {len(self.classes)} classes")
        return self


class _Environment(BaseModel):
    """What other commands read of environment.json."""

    stage: Literal["teacher", "student"]
    device: str
    packages: dict[str, str]
    threads: int
    learns_from: str | None


class Run:
    """An open run folder."""

    def __init__(self, folder: Path, label: str = ""):
        self.folder, self.label = folder, label

    def log(self, line: str) -> None:
        """Prints `line`, after the run's label, and keeps it in log.txt with the time."""
        print(f"{self.label}{line}", flush=True)
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def append_metrics(self, record: dict) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the state that says that the epoch is over

    def metrics(self, epochs: int | None = None) -> list[dict]:
        """One dictionary an epoch, oldest first: of all, or of the first `epochs`. Raises UserError if one is not there."""
        path = self.folder / "metrics.jsonl"
        try:
            records = [json.loads(line) for line in path.read_text().splitlines()[:epochs]]
            if [record["epoch"] for record in records] != [*range(1, (len(records) if epochs is None else epochs) + 1)]:
                raise ValueError("not every epoch is there once")
            return records
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); restore it or train again")

    def rewind_metrics(self, epochs: int) -> None:
        """Forgets what was recorded after the first `epochs` epochs. Raises UserError if those are not there."""
        path = self.folder / "metrics.jsonl"
        if epochs:
            self.metrics(epochs)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        write_whole(path, "".join(lines[:epochs]).encode())

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor], **metadata) -> None:
        """Writes name.safetensors with `metadata` (JSON values) in its header."""
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        header = {key: json.dumps(value) for key, value in metadata.items()}
        write_whole(self.folder / f"{name}.safetensors", save(tensors, metadata=header))

    def load_tensors(self, name: str) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors, on the CPU, and the metadata of name.safetensors."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                return {key: file.get_tensor(key) for key in file.keys()}, metadata
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read the checkpoint {path}: {str(error).splitlines()[0]}")

    @property
    def stage(self) -> str:
        """ "teacher" or "student"."""
        return self.environment()["stage"]

    def _json(self, file: str, schema: type[BaseModel]) -> dict:
        try:
            values = json.loads((self.folder / file).read_text())
            schema.model_validate(values)
            return values
        except ValidationError as error:
            first = error.errors()[0]
            found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (OSError, ValueError) as error:
            found = error
        raise UserError(f"{self.folder / file} is missing or damaged ({found}); restore it or train again")

    def has(self, file: str) -> bool:
        return (self.folder / file).exists()

    def write_summary(self, summary: dict) -> None:
        write_whole(self.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
        (self.folder / "state.safetensors").unlink(missing_ok=True)

    def summary(self) -> dict:
        return self._json("summary.json", _Summary)

    def environment(self) -> dict:
        return self._json("environment.json", _Environment)

    def config(self, overrides: tuple[str, ...] = ()) -> Experiment:
        return load_config(self.folder / "config.yaml", overrides)


def refuse_taken(folder: str | Path, resume: bool) -> None:
    """Raises UserError if `folder` cannot be a new run's, or with `resume` goes on with one. Writes nothing."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    if begun(folder):
        if not resume:
            raise UserError(f"--out {folder} is not empty; add --resume to go on with the run in it, or name another folder")
        if not (folder / "config.yaml").exists():
            raise UserError(f"--out {folder} holds no run to resume; name another folder")


@contextmanager
def start_run(
    folder: str | Path,
    config: Experiment,
    stage: str,
    device: torch.device,
    resume: bool,
    learns_from: str | None = None,
    label: str = "",
) -> Iterator[Run]:
    """A folder for `stage` ("teacher" or "student") of `config`: new, or the same run's with `resume`.

    A context: until it ends, no other command may write into the folder.

    `learns_from`: the digest of the cache, or of the other run's network, that the run learns from. Raises UserError if
    the folder is not empty and `resume` is not given, if it holds something else, or if another command is writing into it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}; name another folder")
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another command is writing into {folder}; wait for it, or name another folder")
        refuse_taken(folder, resume)
        run, record = Run(folder, label), environment(stage, device) | {"learns_from": learns_from}
        if begun(folder):
            _refuse_other(run, config, record)
        else:  # config.yaml comes last: a folder that was left before it holds no run
            write_whole(folder / "environment.json", (json.dumps(record, indent=1) + "\n").encode())
            write_whole(folder / "config.yaml", dump_config(config).encode())
        yield run
    finally:
        os.close(lock)  # which frees it, as the end of the process does


def open_run(folder: str | Path) -> Run:
    """A complete run's folder. Raises UserError for anything else."""
    run = Run(Path(folder))
    if not run.has("config.yaml"):
        raise UserError(f"{folder} is not a run's folder (it has no config.yaml); name the --out of a training command")
    if not run.has("summary.json"):
        raise UserError(f"the run in {folder} is not complete; go on with it by --resume")
    return run


def experiment_of(run: Run) -> dict[str, str]:
    """What tells apart the experiments that runs were made by, whatever their seeds: the method, and a digest of the rest."""
    config = run.config()
    data = config.data.model_copy(update={"root": "", "workers": 0})  # where it lies and who reads it change no result
    parts = data, getattr(config, run.stage), config.cache
    text = json.dumps([run.stage, *[part.model_dump(mode="json") for part in parts], to_json(config.views)])
    return {"method": run.summary()["method"], "settings": hashlib.sha256(text.encode()).hexdigest()[:12]}


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
        "device": device_name(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({os.cpu_count()} cores)"


def peak_memory(device: torch.device) -> int:
    """The most bytes of the device's memory that this process has used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def digest(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of a model's tensors."""
    total = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous()
        total.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        total.update(np.ascontiguousarray(array.view(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash at any moment `path` is the old file or the new one."""
    LocalStorage(path.parent).write(path.name, data)


def begun(folder: Path) -> bool:
    """Whether there is anything in `folder` but what a run writes before it has begun."""
    return folder.is_dir() and any(path.name != "environment.json" and path.suffix != ".partial" for path in folder.iterdir())


def _refuse_other(run: Run, config: Experiment, record: dict) -> None:
    found = run.environment()
    if found["stage"] != record["stage"]:
        raise UserError(f"--out {run.folder} holds a {found['stage']}'s run, not a {record['stage']}'s; name another folder")
    old, new = (_settings(one, record["stage"]) for one in (run.config(), config))
    if changed := difference(old, new):
        raise UserError(f"cannot resume {run.folder}: {changed}; use the same configuration or another folder")
    if found["learns_from"] != record["learns_from"]:
        raise UserError(f"cannot resume {run.folder}: it began with another cache or backbone; name that, or another folder")
    if found["device"] != record["device"]:
        raise UserError(
            f"cannot resume {run.folder} on {record['device']}: it began on {found['device']}, which rounds differently; "
            "go on there, or name another folder"
        )
    for name, old, new in (
        ("torch", found["packages"]["torch"], record["packages"]["torch"]),
        ("threads", found["threads"], record["threads"]),
    ):
        if old != new:
            run.log(f"note: the run began with {name} {old} and goes on with {new}; results may differ in the last bits")


def _settings(config: Experiment, stage: str) -> dict:
    """What tells a run of `stage` from others: what it looks at. What its cache is stands in learns_from."""
    values = config.model_dump(mode="json", include={"seed", "data", "views", stage})
    del values["data"]["workers"]  # who reads the images changes no result
    return values


def difference(old, new, key: str = "") -> str | None:
    """The first difference between two nested dictionaries in words, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if found := difference(old.get(name), new.get(name), f"{key}.{name}" if key else name):
                return found
        return None
    return None if old == new else f"{key} was {old!r} and is now {new!r}"
