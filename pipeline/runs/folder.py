"""An open run folder: what is read from it and written into it."""

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from offline_bkd.cache.storage import LocalStorage
from offline_bkd.cache.views import to_json
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.runs import record
from offline_bkd.pipeline.schema import Experiment


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
        return self._json("summary.json", record.Summary)

    def environment(self) -> dict:
        return self._json("environment.json", record.Environment)

    def config(self, overrides: tuple[str, ...] = ()) -> Experiment:
        return load_config(self.folder / "config.yaml", overrides)


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


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash at any moment `path` is the old file or the new one."""
    LocalStorage(path.parent).write(path.name, data)
