"""From a YAML file, its bases and overrides to an experiment, checked as a whole before anything runs.

One rule: a file over its base, and all overrides together over the file, replace what they name; a section that is given
another `name` keeps the keys that its kinds all have (those of `Data`, of `Network`) and else starts from its own defaults. An
override that gives a section whole, in braces, stands in its place.
"""

import copy
import difflib
import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.yaml_files import LEVELS, parse_yaml, read_yaml

PACKAGE = Path(__file__).parent.parent


def load_config(path: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Experiment:
    """The experiment in the YAML file `path`, with `overrides` ("student.training.epochs=5") and `seed` applied.

    A file may name another as its `base`, by a path from its own folder, and then holds only what differs from that; an
    override "base=FILE" names another in its place. "configs/…" that is not in the current folder is what comes with the
    package. Raises UserError with every error in the experiment, one a line.
    """
    bases = [override for override in overrides if override.startswith("base=")]
    files = _read_with_bases(_shipped_or_own(Path(path)), bases[-1] if bases else None)
    changes = [_parse_override(override) for override in overrides if override not in bases]
    if seed is not None:
        changes.append(Layer(f"--seed {seed}", {"seed": seed}))
    if bases and _merge_all(files, changes) == _merge_all(files[-1:], changes):
        raise UserError(
            f"-o {bases[-1]} changes nothing: {path} says all of that itself; leave it out, or name another --config"
        )
    try:
        return Experiment.model_validate(_merge_all(files, changes))
    except ValidationError:
        raise UserError("\n".join(_errors_with_sources(files, changes))) from None


def dump_config(config: Experiment) -> str:
    """The resolved experiment as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def expand(path: str, folder: Path = Path()) -> Path:
    """`path`, from `folder`, with ~ and ${VARIABLES} replaced. Raises UserError for a variable that is not set."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"the environment variable {unset[1]} in {path!r} is not set; set it, or give another path")
    return (folder / expanded).resolve()


# What files and overrides say, in layers


class Layer(NamedTuple):
    source: str  # a file, "-o KEY=VALUE" or "--seed N", for messages
    values: dict


def _shipped_or_own(path: Path) -> Path:
    """`path`, or that of the configuration of this name that comes with the package, where there is but the latter."""
    shipped = PACKAGE / path
    return shipped if path.parts[:1] == ("configs",) and shipped.is_file() and not path.exists() else path


class WholeSection(dict):
    """A section that an override gives in one piece: in the place of the one below, not over it."""


def _read_with_bases(path: Path, base_override: str | None) -> list[Layer]:
    """The lowest base first, the file `path` last. `base_override` ("base=FILE") stands for the `base` of the latter."""
    layers: list[Layer] = []
    named_by = ""
    while True:
        try:
            values = read_yaml(path)
        except OSError as error:
            raise UserError(f"{named_by}cannot read the configuration {path}: {error.strerror}; name a YAML file")
        except UserError as error:
            raise UserError(f"{named_by}{error}")
        layers.insert(0, Layer(str(path), values))
        base = values.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise UserError(f"{path}: base: names a file; found {_shortened(repr(base))}")
        if base_override is not None:
            named_by, path = f"-o {base_override}: ", Path(os.path.expanduser(base_override.removeprefix("base=")))
            path, base_override = _shipped_or_own(path), None
        elif base is not None:
            named_by, path = f"{path}: base: ", path.parent / os.path.expanduser(base)
        else:
            return layers
        if path.resolve() in [Path(layer.source).resolve() for layer in layers]:
            raise UserError(f"{named_by}{path} leads back to itself; name a file that is complete without it")


def _parse_override(override: str) -> Layer:
    """ "student.training.epochs=5" as what a file would say: {"student": {"training": {"epochs": 5}}}."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    source = f"-o {_shortened(' '.join(override.split()))}"
    if not equals or not all(parts) or len(parts) > LEVELS:
        raise UserError(f"{source}: an override is key=value, such as -o student.training.epochs=5")
    try:
        value = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{source}: the value is not plain YAML ({error}); quote it")
    value = WholeSection(value) if isinstance(value, dict) else value
    for part in reversed(parts):
        value = {part: value}
    return Layer(source, value)


def _merge_all(files: Iterable[Layer], overrides: Iterable[Layer]) -> dict:
    """What an experiment comes to. Overrides come together first, so that a section's name may follow its other keys."""
    place = _place_of(Experiment)
    together: dict = {}
    for layer in overrides:
        together = _merge(together, layer.values, place)
    values = _default_sections(place)
    for layer in files:
        values = _merge(values, layer.values, place)
    return _merge(values, together, place)


def _merge(below: dict, above: dict, place: "Place") -> dict:
    """The section `below`, which stands at `place`, with what `above` names replaced."""
    merged = copy.copy(below)
    for key, value in above.items():
        before, there = merged.get(key), place.keys.get(key, Place())
        if isinstance(before, dict) and isinstance(value, dict) and not isinstance(value, WholeSection):
            if "name" in before and "name" in value and before["name"] != value["name"]:
                before = type(before)({shared: before[shared] for shared in there.keys if shared in before})
            value = _merge(before, value, there)
        merged[key] = value
    return merged


def _errors_with_sources(files: list[Layer], overrides: list[Layer]) -> list[str]:
    """Each error of the experiment, after the source of the layer since which it has been there, and where it stands."""
    sources: dict[tuple[str, str], str] = {}
    for count, layer in enumerate([*files, *overrides], start=1):
        try:
            Experiment.model_validate(_merge_all(files[:count], overrides[: max(0, count - len(files))]))
            sources = {}
        except ValidationError as error:
            sources = {problem: sources.get(problem, layer.source) for problem in explain(error, Experiment)}
    alike: dict[tuple[str, str], list[str]] = {}  # as in a section that two others repeat by an alias
    for (key, message), source in sources.items():
        alike.setdefault((source, message), []).append(key)
    return [f"{source}: {', '.join(keys)}: {message}" for (source, message), keys in alike.items()]


# What may stand where, and what is wrong with what does


@dataclass(frozen=True, kw_only=True)
class Place:
    """What may stand at a place of a configuration: a section of `keys`, one of several `kinds` by its name, or a value."""

    kinds: dict[str, "Place"] = field(default_factory=dict)
    keys: dict[str, "Place"] = field(default_factory=dict)  # of several kinds: those that all have
    others: "Place | None" = None  # where any key may stand: under each
    default: Any = None


@functools.cache
def _place_of(schema: type[BaseModel]) -> Place:
    whole = schema.model_json_schema()

    def place(node: dict) -> Place:
        if "$ref" in node:
            node = {**whole["$defs"][node["$ref"].rpartition("/")[2]], **node}
        tags = node.get("discriminator", {}).get("mapping", {})
        kinds = {name: place({"$ref": reference}) for name, reference in tags.items()}
        keys = {key: place(child) for key, child in node.get("properties", {}).items()}
        if kinds:
            first, *rest = kinds.values()
            keys = {key: child for key, child in first.keys.items() if all(key in kind.keys for kind in rest)}
        others = node.get("additionalProperties")
        return Place(kinds=kinds, keys=keys, others=place(others) if others else None, default=node.get("default"))

    return place(whole)


def _default_sections(place: Place) -> dict:
    """The sections that there are, of the kind that they are, where a file says nothing of them."""
    sections = {key: there.default or _default_sections(there) for key, there in place.keys.items() if there.keys}
    return {key: section for key, section in sections.items() if section}


def explain(error: ValidationError, schema: type[BaseModel]) -> list[tuple[str, str]]:
    """(the dotted key, what is wrong there) of each error in values for `schema`; unknown keys with a suggestion."""
    return [_explain(details, _place_of(schema)) for details in error.errors()]


def _explain(error: Any, place: Place) -> tuple[str, str]:
    keys: list[str] = []
    known: dict[str, Place] = place.keys
    for part in error["loc"]:
        if part in place.kinds:  # pydantic names the kind of a section, too
            place = place.kinds[part]
        else:
            keys.append(str(part) if str(part).isprintable() else repr(part))
            place = place.keys.get(part) or place.others or Place()
        known = place.kinds or place.keys or known
    key, found = ".".join(keys), _shortened(repr(error["input"]))
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return key, f"unknown key; {_nearest(keys[-1], known)}"
        case "union_tag_invalid":
            return f"{key}.name", f"{error['ctx']['tag']!r} is not known; {_nearest(error['ctx']['tag'], known)}"
        case "union_tag_not_found":
            return f"{key}.name", f"missing; one of {', '.join(known)} must be given"
        case "missing" | "missing_keyword_only_argument":
            return key, "missing; it must be given"
        case "model_type" | "model_attributes_type" | "dataclass_type" | "dict_type":
            return key, f"a section (key: value) is meant; found {found}"
        case "tuple_type":
            return key, f"a list, [first, second, …], is meant; found {found}"
        case "value_error":
            return key, _uncapitalised(error["msg"].removeprefix("Value error, "))
    return key, f"{_uncapitalised(error['msg'])}; found {found}"


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), known, 3, 0.5)
    alike = [one for one in near if _likeness(word, one) == _likeness(word, near[0])]
    return f"did you mean {' or '.join(map(repr, alike))}?" if near else f"known are {', '.join(known)}"


def _likeness(word: str, known: str) -> float:
    return difflib.SequenceMatcher(None, known, str(word)).ratio()


def _uncapitalised(message: str) -> str:
    return message[:1].lower() + message[1:]


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}…"
