"""Writes docs/configuration.md: every key of an experiment with its type, default and meaning, from pipeline/schema/.

The meaning of a key is the comment at its line, or above it. Run it as `python docs/configuration.py` after a change.
"""

import functools
import inspect
import json
import re
from pathlib import Path

from offline_bkd.cache import views
from offline_bkd.pipeline import schema

PAGE = Path(__file__).with_name("configuration.md")
CLASSES = {**vars(views), **vars(schema)}
WHOLE = schema.Experiment.model_json_schema()
INTRODUCTION = """# Configuration

An experiment is one YAML file. It is checked as a whole before anything runs; a key that does not exist is refused with the
nearest one that does. `configs/` has examples, of which `configs/digits.yaml` is a short complete one. This page is written
from the schema by `python docs/configuration.py`.

`-o KEY=VALUE` overrides one key, `-o student.training.epochs=20`. A section in braces, `-o "views={name: crop_flip, pad: 2}"`,
stands in the place of the whole section: keys that it leaves out have their defaults. A file that has a `base`, a path from
its own folder, holds only what differs from that file; `-o base=FILE`, a path from the current folder, puts another in the
base's place. One rule is for both:

> Values in a file replace those of its base, and overrides of single keys those of the file. A section that is given another
> `name` keeps the keys that every kind of that section has; all others begin with the new kind's defaults.

So `-o data.name=cifar100` keeps `imbalance_ratio`, `mean`, `std` and the other keys that every data set has, to be given anew
where they should change; and `-o student.method.name=kd` begins with the values of `kd`'s own paper, since no key is common
to all methods; an `alpha` of `bkd` is not taken over.
"""


def page() -> str:
    return "\n".join([INTRODUCTION, *(text(kinds) for kinds in places())])


@functools.cache
def places() -> dict[tuple[str, ...], list[str]]:
    """Where each section stands: by the classes of which one may stand there, the dotted keys, in the order of the page."""
    found: dict[tuple[str, ...], list[str]] = {}

    def collect(path: str, kinds: tuple[str, ...]) -> None:
        found.setdefault(kinds, []).append(path)
        for kind in kinds:
            for key, node in properties(kind).items():
                if inner := sections(node):
                    collect(f"{path}.{key}".lstrip("."), inner)

    collect("", ("Experiment",))
    return found


def title(kinds: tuple[str, ...]) -> str:
    return ", ".join(f"`{path}`" for path in places()[kinds]) if kinds != ("Experiment",) else "The file"


def text(kinds: tuple[str, ...]) -> str:
    """The part of the page about one section, of one class or one of several."""
    if len(kinds) == 1:
        return f"## {title(kinds)}\n\n{described(kinds[0])}\n\n{table(kinds[0], properties(kinds[0]))}\n"
    shared = [key for key in properties(kinds[0]) if all(key in properties(kind) for kind in kinds)]
    parts = [f"## {title(kinds)}\n", f"One of several kinds, by `name`: {', '.join(names(kind) for kind in kinds)}.\n"]
    if shared != ["name"]:
        common = {key: node for key, node in properties(kinds[0]).items() if key in shared and key != "name"}
        parts.append(f"All have\n\n{table(kinds[0], common)}\n")
    for kind in kinds:
        own = {key: node for key, node in properties(kind).items() if key not in shared}
        parts.append(f"### {names(kind)}\n\n{described(kind)}\n" + (f"\n{table(kind, own)}\n" if own else ""))
    return "\n".join(parts)


def table(kind: str, keys: dict[str, dict]) -> str:
    meaning = comments(CLASSES[kind])
    rows = [f"| `{key}` | {values(node)} | {default(node)} | {meaning.get(key, '')} |" for key, node in keys.items()]
    return "\n".join(["| key | values | default | meaning |", "| --- | --- | --- | --- |", *rows])


def values(node: dict) -> str:
    """What may be given for a key."""
    if "anyOf" in node:
        return " or ".join(values(option) for option in node["anyOf"])
    if "const" in node or "enum" in node:
        return ", ".join(f"`{json.dumps(value)}`".replace('"', "") for value in node.get("enum", [node.get("const")]))
    if kinds := sections(node):
        return f"[a section](#{re.sub('[^a-z_ -]', '', title(kinds)).replace(' ', '-')})"
    if node["type"] == "array":
        inner = node.get("prefixItems") or [node["items"]]
        return f"{len(inner)} numbers" if "prefixItems" in node else f"a list: {values(inner[0])}"
    word = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
    bounds = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
    given = [wording.format(f"{node[bound]:g}") for bound, wording in bounds.items() if bound in node and node[bound] < 2**31]
    return " ".join([word[node["type"]], *given])


def default(node: dict) -> str:
    if "default" not in node:
        return "must be given"
    value = node["default"]
    if isinstance(value, dict):
        return f"`{{name: {value['name']}}}`" if "name" in value else "its defaults"
    return f"`{json.dumps(value)}`".replace('"', "")


def definition(kind: str) -> dict:
    return WHOLE["$defs"].get(kind, WHOLE)


def properties(kind: str) -> dict[str, dict]:
    return definition(kind)["properties"]


def sections(node: dict) -> tuple[str, ...]:
    """The classes of which one stands at a key; none where it holds a value."""
    options = node.get("oneOf", [node])
    return tuple(option["$ref"].rpartition("/")[2] for option in options if "$ref" in option)


def names(kind: str) -> str:
    name = properties(kind)["name"]
    return ", ".join(f"`{value}`" for value in name.get("enum", [name.get("const")]))


def described(kind: str) -> str:
    own = CLASSES[kind].__dict__.get("__doc__")  # not that of what it extends
    return inspect.cleandoc(own).replace("\n\n", "\n") if own else ""


def comments(kind: type) -> dict[str, str]:
    """What the source of a class, and of those that it extends, says of each key: above its line or at its end."""
    found: dict[str, str] = {}
    for base in kind.__mro__[:-1]:
        if base.__module__.startswith("offline_bkd."):
            above: list[str] = []
            for line in inspect.getsource(base).splitlines():
                if line.startswith("    # "):
                    above.append(line.removeprefix("    # "))
                    continue
                if (field := re.match(r"    (\w+): ", line)) and field[1] not in found:
                    said = " ".join([*above, *line.partition("  # ")[2:]])
                    found[field[1]] = said.strip().replace("|", "\\|")
                above = []
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
