"""From a YAML file, its bases and overrides to an experiment, checked as a whole before anything runs."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.schema import Experiment, Section


def load_config(path: str | Path, overrides: tuple[str, ...] = (), seed: int | None = None) -> Experiment:
    """The experiment in the YAML file `path`, with `overrides` ("student.training.epochs=5") and `seed` applied.

    A file may name another as its `base`, by a path from its own folder, and then holds only what differs from that; an
    override "base=FILE" names another in its place. Raises UserError with every error in it, one a line.
    """
    *_, (_, values) = _stages(path, overrides, seed)
    try:
        return Experiment.model_validate(values)
    except ValidationError:
        raise UserError("\n".join(_blame(_stages(path, overrides, seed)))) from None


def dump_config(config: Experiment) -> str:
    """The resolved experiment as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def expand(path: str) -> Path:
    """`path` with ~ and ${VARIABLES} replaced. Raises UserError for a variable that is not set."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"the environment variable {unset[1]} in {path!r} is not set; set it, or give -o data.root=FOLDER")
    return Path(expanded).resolve()


class _Loader(yaml.SafeLoader):
    """Refuses one key twice, of which the parser would take the last."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The mapping in the file `path`. Raises OSError where it cannot be read, UserError where it holds something else."""
    try:
        values = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of keys to values; see configs/ for examples")
    return values


def _stages(path: str | Path, overrides: tuple[str, ...], seed: int | None) -> Iterator[tuple[str, dict]]:
    """The values that an experiment comes to, from its lowest base upwards: after each step, and who made it."""
    bases = [override for override in overrides if override.startswith("base=")]
    values: dict = {}
    for file, above in reversed(_read(Path(path), bases[-1] if bases else None)):
        values = _over(values, above)
        yield str(file), values
    for number, override in enumerate(overrides):
        if override not in bases:
            _override(values, override, overrides[:number])
            yield f"-o {override}", values
    if seed is not None:
        values["seed"] = seed
        yield f"--seed {seed}", values


def _blame(stages: Iterable[tuple[str, dict]]) -> list[str]:
    """The errors that are left at the end, each after who made the step since which it has been there."""
    made: dict[tuple[str, str], str] = {}
    for who, values in stages:
        try:
            Experiment.model_validate(values)
            made = {}
        except ValidationError as error:
            made = {found: made.get(found, who) for found in explain(error, Experiment)}
    return [f"{who}: {where}: {what}" for (where, what), who in made.items()]


def _read(path: Path, base: str | None = None) -> list[tuple[Path, dict]]:
    """The file `path`, its base, or that of the override `base` in its place, and so on down: each with its own values."""
    files: list[tuple[Path, dict]] = []
    below, who = path, ""
    while True:
        try:
            values = read_yaml(below)
        except OSError as error:
            raise UserError(f"{who}cannot read the configuration {below}: {error.strerror}; name a YAML file")
        files.append((below, values))
        own = values.pop("base", None)
        if own is not None and not isinstance(own, str):
            raise UserError(f"{below}: base: names a file; found {own!r}")
        if base is not None:
            below, who, base = Path(os.path.expanduser(base.removeprefix("base="))), f"-o {base}: ", None
        elif own is not None:
            below, who = below.parent / os.path.expanduser(own), f"{below}: base: "
        else:
            return files
        if below.resolve() in [file.resolve() for file, _ in files]:
            raise UserError(f"{who}{below} leads back to itself; name a file that is complete without it")


def _over(below: dict, above: dict, *place: str) -> dict:
    """`below` with what `above` says otherwise, of the section at `place`."""
    merged = dict(below)
    if above.get("name", below.get("name")) != below.get("name"):
        merged = _taken_over(place, below, above["name"])
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _over(merged[key], value, *place, key) if both else value
    return merged


def _taken_over(place: tuple[str, ...], values: dict, name) -> dict:
    """What of a section's `values` one of another kind, `name`, keeps: what both know and have the same default for.

    A method keeps nothing: its own paper's values are what its name stands for.
    """
    if not place:
        return dict(values)  # an experiment's name is no kind
    if place[-1] == "method" or not isinstance(name, str):
        return {}
    was, now = (_place((*place, kind), Experiment)[1] for kind in (values.get("name"), name))
    if "name" not in now:
        return dict(values)  # there is no such kind, which will be said
    return {
        key: value
        for key, value in values.items()
        if key in now and now[key].get("default") == was.get(key, {}).get("default")
    }


def _override(values: dict, override: str, earlier: tuple[str, ...]) -> None:
    """Changes `values` as `override` says; `earlier` ones have done so before."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"-o {override}: an override is key=value, such as -o student.training.epochs=5")
    *parents, last = key.split(".")
    default = Experiment
    for parent in parents:
        default = _default(default, parent)
        if parent not in values:  # what is overridden is the default
            values[parent] = default.model_dump(mode="json") if isinstance(default, Section) else {}
        if not isinstance(values[parent], dict):
            raise UserError(f"-o {override}: {parent!r} holds a value, not a section")
        # YAML anchors share one dictionary between sections: an override must reach only the one it names
        values[parent] = dict(values[parent])
        values = values[parent]
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error.reason  # the latter of a character that YAML does not have
        raise UserError(f"-o {override}: the value is not YAML ({problem}); quote it")
    if last == "name" and parents and value != values.get("name"):
        kept, section = _taken_over(tuple(parents), values, value), ".".join(parents)
        for lost in [key for key in values if key not in kept and key != "name"]:
            if any(other.startswith(f"{section}.{lost}=") for other in earlier):
                raise UserError(
                    f"-o {override}: another {section} would not keep {lost}, given before it; give the name first"
                )
            del values[lost]
    values[last] = value


def _default(section, key: str):
    """What the schema has at `key` of a section or a kind of section: a section, a kind of section, or None."""
    kind = section if isinstance(section, type) else type(section)
    field = getattr(kind, "model_fields", {}).get(key)
    if field is None or isinstance(field.default, Section):
        return field and field.default
    return field.annotation if isinstance(field.annotation, type) else None


def explain(error: ValidationError, schema: type[BaseModel]) -> list[tuple[str, str]]:
    """(the dotted key, what is wrong there) of each error of a section of kind `schema`; unknown keys with a suggestion."""
    return [_explain(item, schema) for item in error.errors()]


def _explain(error: dict, schema: type[BaseModel]) -> tuple[str, str]:
    where, known = _place(error["loc"], schema)
    found, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return where, f"unknown key; {_nearest(error['loc'][-1], known)}"
    if kind == "union_tag_invalid":
        return f"{where}.name", f"{context['tag']!r} is not known; {_nearest(context['tag'], known)}"
    if kind == "union_tag_not_found":
        return f"{where}.name", f"missing; one of {', '.join(known)} must be given"
    if kind in ("missing", "missing_keyword_only_argument"):
        return where, "missing; it must be given"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return where, message if isinstance(found, dict) or kind == "value_error" else f"{message}; found {found!r}"


def _place(loc: tuple, kind: type[BaseModel]) -> tuple[str, dict[str, dict]]:
    """(the dotted key, what is known there by its name) of a place in pydantic's terms, which hold the tags of unions too."""
    schema = kind.model_json_schema()
    section, keys, known = schema, [], schema["properties"]
    for part in loc:
        properties, tags = section.get("properties", {}), section.get("discriminator", {}).get("mapping", {})
        if part in tags:
            section = {"$ref": tags[part]}
        else:
            keys.append(str(part))
            section = properties.get(part, section.get("additionalProperties") or {})
        if "$ref" in section:
            section = schema["$defs"][section["$ref"].rpartition("/")[2]]
        known = section.get("properties", section.get("discriminator", {}).get("mapping", known))
    return ".".join(keys), known


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
