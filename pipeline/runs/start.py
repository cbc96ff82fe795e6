"""How a run begins or goes on: who may write into a folder, and with what."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from offline_bkd.cache.format import device_kind
from offline_bkd.cache.storage import PARTIAL, LocalStorage
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import dump_config
from offline_bkd.pipeline.runs.checksums import YAML_FILE, add_checksum
from offline_bkd.pipeline.runs.files import read_json, refuse_address, write_json, write_whole
from offline_bkd.pipeline.runs.folder import Run
from offline_bkd.pipeline.runs.record import Environment, difference, environment, settings
from offline_bkd.pipeline.schema import Experiment


def refuse_taken(folder: str | Path, resume: bool | None) -> None:
    """Raises UserError if `folder` cannot be a new run's, or with `resume` goes on with one. Writes nothing.

    `resume`: None of a command that never goes on.
    """
    refuse_address(folder)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    if begun(folder):
        if not resume:
            remedy = "" if resume is None else "add --resume to go on with the run in it, or "
            raise UserError(f"--out {folder} is not empty; {remedy}name another folder")
        if not (folder / "config.yaml").exists():
            raise UserError(f"--out {folder} holds no run to resume; name another folder")


@contextmanager
def start_run(
    folder: str | Path,
    config: Experiment,
    stage: str,
    device: torch.device,
    resume: bool | None,
    learns_from: str | None = None,
    data: dict[str, dict[str, str]] | None = None,
    label: str = "",
    silent: bool = False,
) -> Iterator[Run]:
    """A folder for `stage` ("teacher" or "student") of `config`: new, or the same run's with `resume`.

    A context: until it ends, no other command may write into the folder.

    `learns_from`: the digest of the cache, of the other run's network, or of the imported file that the run is made from.
    `data`: the fingerprints of the parts that it is trained and judged on. `silent`: it says nothing.

    Raises UserError if the folder is not empty and `resume` is not given, if it holds something else, or if another command
    is writing into it.
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
        except OSError as error:  # a file system may have no locks
            raise UserError(f"--out {folder} lies where nothing can be locked ({error.strerror}); name a folder elsewhere")
        refuse_taken(folder, resume)
        for name in LocalStorage(folder).partial():  # of a run that was killed
            with suppress(OSError):
                (folder / name).unlink()
        run, record = Run(folder, label, silent), environment(stage, device) | {"learns_from": learns_from, "data": data}
        if begun(folder):
            _refuse_other(run, config, record)
        else:  # config.yaml comes last: a folder that was left before it holds no run
            write_json(folder / "environment.json", record)
            write_whole(folder / "config.yaml", add_checksum(dump_config(config), YAML_FILE).encode())
        yield run
    finally:
        os.close(lock)  # which frees it, as the end of the process does


def begun(folder: Path) -> bool:
    """Whether there is anything in `folder` but what a run writes before it has begun."""
    return folder.is_dir() and not all(PARTIAL.fullmatch(path.name) or _is_environment(path) for path in folder.iterdir())


def _is_environment(path: Path) -> bool:
    """Whether it is a run's environment.json, not another program's."""
    if path.name != "environment.json":
        return False
    try:
        read_json(path, Environment)
        return True
    except (OSError, ValueError):
        return False


def _refuse_other(run: Run, config: Experiment, record: dict) -> None:
    found = run.environment()
    if run.has("summary.json"):
        run.summary()  # which says that the run is complete, so it must be whole
    if found["stage"] != record["stage"]:
        raise UserError(f"--out {run.folder} holds a {found['stage']}'s run, not a {record['stage']}'s; name another folder")
    old, new = (settings(one, record["stage"]) for one in (run.config(), config))
    if changed := difference(old, new):
        raise UserError(f"cannot resume {run.folder}: {changed}; use the same configuration or another folder")
    before, now = found.get("data") or {}, record["data"] or {}
    if others := [part for part in before if part in now and before[part] != now[part]]:
        raise UserError(
            f"cannot resume {run.folder}: its {' and '.join(others)} images are not those it began with; restore them"
        )
    if found["learns_from"] != record["learns_from"]:
        raise UserError(
            f"cannot resume {run.folder}: it began with another cache, backbone or import; name that, or another folder"
        )
    if device_kind(found["device"]) != device_kind(record["device"]):
        raise UserError(
            f"cannot resume {run.folder} on {record['device']}: it began on {found['device']}, which rounds differently; "
            "go on there, or name another folder"
        )
    for name, old, new in (
        ("torch", found["packages"]["torch"], record["packages"]["torch"]),
        ("threads", found["threads"], record["threads"]),
        ("commit", found.get("commit"), record["commit"]),
    ):
        if old != new:
            run.log(f"note: the run began with {name} {old} and goes on with {new}; results may differ in the last bits")
