"""Files of a run: whole or absent, never anything but regular files, and every failure says which file it is about."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from offline_bkd.cache.storage import LocalStorage, open_regular
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.runs.checksums import JSON_FILE, Form, add_checksum, parse_json, refuse_changed


def make_folder(folder: Path, files: Sequence[str] = ()) -> None:
    """Makes a folder for what is shown of runs, in `files`, the first of which says that the others there are of its kind.

    Raises UserError if it cannot be made, is an address or a run's own, or holds some of `files` but not the first.
    """
    refuse_address(folder)
    if (folder / "config.yaml").exists():
        raise UserError(f"--out {folder} is a run's folder; name another one")
    found = [name for name in files if os.path.lexists(folder / name)]
    if found and files[0] not in found:
        raise UserError(
            f"--out {folder} holds a {found[0]} that would be replaced, but no {files[0]}, so it is not this command's; "
            "move it away, or name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}; name another folder")


def refuse_address(folder: str | Path) -> None:
    """Raises UserError for one of an object store, which would become a local folder of that name."""
    if re.match(r"\w+:/", str(folder)):  # of the two slashes a Path keeps one
        raise UserError(f"--out {folder} is an address, where only caches may lie; name a folder")


def write_json(path: Path, values: dict) -> None:
    """Writes `values` and their checksum, whole or not at all."""
    write_whole(path, add_checksum(json.dumps(values, indent=1) + "\n", JSON_FILE).encode())


def read_json(path: Path, schema: type[BaseModel]) -> dict:
    """The dictionary in the file `path`. Raises OSError or ValueError for what `schema` refuses or was changed."""
    return checked_json(read(path).decode(), schema, JSON_FILE)


def checked_json(text: str, schema: type[BaseModel], form: Form) -> dict:
    """The same of a text."""
    values = parse_json(text)
    schema.model_validate(values)
    refuse_changed(text, form)
    values.pop("checksum", None)
    return values


def reason(error: Exception) -> str:
    """What was wrong with a file, in words, of an OSError or a ValueError."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(getattr(error, "strerror", None) or error)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash at any moment `path` is the old file or the new one."""
    LocalStorage(path.parent).write(path.name, data)


def append(path: Path, line: str, sync: bool = False) -> None:
    """Adds a line to a file; with `sync` it is on the disk when this returns."""
    try:
        with open_regular(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say which file


def read(path: Path) -> bytes:
    """The regular file's bytes. Raises OSError."""
    with open_regular(path) as file:
        return file.read()
