"""An open run folder: what is read from it and written into it."""

import hashlib
import json
import re
import time
from pathlib import Path

import torch
from pydantic import BaseModel

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.runs import record, weights
from offline_bkd.pipeline.runs.checksums import JSON_LINE, YAML_FILE, add_checksum, refuse_changed
from offline_bkd.pipeline.runs.files import append, checked_json, read, read_json, reason, write_json, write_whole
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.show.terminal import printable


class Run:
    """An open run folder. What it reads raises UserError if it is missing, damaged, or not as it was written."""

    def __init__(self, folder: Path, label: str = "", silent: bool = False):
        """`silent`: `log` says nothing, as of a process beside the one that writes the run."""
        self.folder, self.label, self.silent = folder, label, silent

    def log(self, line: str) -> None:
        """Prints `line`, after the run's label, and keeps it in log.txt with the time until the run is complete."""
        if self.silent:
            return
        line = printable(line)
        print(f"{self.label}{line}", flush=True)
        if not self.has("summary.json"):  # a complete run may lie where nothing can be written
            append(self.folder / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def append_metrics(self, record: dict) -> None:
        """Adds an epoch's record; it is on the disk before the state that says that the epoch is over."""
        append(self.folder / "metrics.jsonl", add_checksum(json.dumps(record), JSON_LINE), sync=True)

    def metrics(self, epochs: int | None = None) -> list[dict]:
        """One dictionary an epoch, oldest first: of all, or of the first `epochs`."""
        path = self.folder / "metrics.jsonl"
        try:
            lines = _lines(path)[:epochs]
            records = [checked_json(line, record.Epoch, JSON_LINE) for line in lines]
            if [values["epoch"] for values in records] != [*range(1, (len(lines) if epochs is None else epochs) + 1)]:
                raise ValueError("not every epoch is there once")
            return records
        except (OSError, ValueError) as error:
            raise _damaged(path, error)

    def rewind_metrics(self, epochs: int) -> None:
        """Forgets what was recorded after the first `epochs` epochs. Raises UserError if those are not there."""
        path = self.folder / "metrics.jsonl"
        if epochs:
            self.metrics(epochs)
        lines = _lines(path)[:epochs] if epochs else []
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())

    def save_tensors(self, name: str, tensors: dict[str, torch.Tensor], **metadata) -> None:
        """Writes name.safetensors with `metadata` (JSON values) in its header."""
        write_whole(self.folder / f"{name}.safetensors", weights.to_safetensors(tensors, metadata))

    def load_tensors(self, name: str) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors, on the CPU, and the metadata of name.safetensors."""
        path = self.folder / f"{name}.safetensors"
        try:
            return weights.from_safetensors(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the checkpoint {path}: {reason(error)}; restore it or train again")

    @property
    def stage(self) -> str:
        """ "teacher" or "student"."""
        return self.environment()["stage"]

    def has(self, file: str) -> bool:
        return (self.folder / file).exists()

    def write_summary(self, summary: dict) -> None:
        """Writes summary.json, with the digest of the best epoch's weights, and so completes the run."""
        best, _ = self.load_tensors("best")
        write_json(self.folder / "summary.json", {**summary, "best_digest": weights.digest(best)})
        (self.folder / "state.safetensors").unlink(missing_ok=True)

    def summary(self) -> dict:
        return self._json("summary.json", record.Summary)

    def environment(self) -> dict:
        return self._json("environment.json", record.Environment)

    def config(self, overrides: tuple[str, ...] = ()) -> Experiment:
        path = self.folder / "config.yaml"
        try:
            refuse_changed(read(path).decode(), YAML_FILE)
        except (OSError, ValueError) as error:
            raise _damaged(path, error)
        return load_config(path, overrides)

    def _json(self, file: str, schema: type[BaseModel]) -> dict:
        path = self.folder / file
        try:
            return read_json(path, schema)
        except (OSError, ValueError) as error:
            raise _damaged(path, error)


def open_run(folder: str | Path) -> Run:
    """A complete run's folder. Raises UserError for anything else."""
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the --out of a training command")
    if not run.has("config.yaml"):
        raise UserError(f"{folder} is not a run's folder (it has no config.yaml); name the --out of a training command")
    if not run.has("summary.json"):
        raise UserError(f"the run in {folder} is not complete; go on with it by --resume")
    return run


def experiment_of(run: Run) -> dict[str, str]:
    """What tells apart the experiments that runs were made by, whatever their seeds: the method, and a digest of the rest.

    To the rest belongs what was learned from: a cache or an imported file by its own digest, a backbone by its experiment,
    whatever its seed.
    """
    summary, settings = run.summary(), record.settings(run.config(), run.stage)
    del settings["seed"]
    text = json.dumps([settings, summary.get("backbone") or run.environment()["learns_from"]])
    return {"method": summary["method"], "settings": hashlib.sha256(text.encode()).hexdigest()[:12]}


def _lines(path: Path) -> list[str]:
    """The lines of a file that ended; one that was being written when its command was killed has no end."""
    return re.findall(r"([^\n]*)\n", read(path).decode())


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is missing or damaged ({reason(error)}); restore it or train again")
