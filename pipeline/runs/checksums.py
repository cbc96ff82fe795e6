"""Files that carry their own checksum, so that nothing that was changed since it was written is believed.

    name.json            "checksum": "sha256:…" as the last entry, of the text before the comma that it follows
    metrics.jsonl        the same in every line
    config.yaml          # checksum sha256:… as the last line, of the lines before it
    name.safetensors     checksum in the header's metadata, of the tensors' digest and the other metadata (weights.py)

They stay plain JSON, YAML and safetensors. Files that were written before there were checksums have none and are read
all the same.
"""

import hashlib
import json
from dataclasses import dataclass

CHANGED = "it was changed after it was written"
HASH = "sha256:"


@dataclass(frozen=True)
class Form:
    """How a text carries its checksum: after `mark`, before `tail`, which takes the place of `end`."""

    mark: str
    tail: str
    end: str


JSON_FILE = Form(mark=f',\n "checksum": "{HASH}', tail='"\n}\n', end="\n}\n")
JSON_LINE = Form(mark=f', "checksum": "{HASH}', tail='"}', end="}")
YAML_FILE = Form(mark=f"# checksum {HASH}", tail="\n", end="")


def add_checksum(text: str, form: Form) -> str:
    """`text`, which ends with the form's `end`, with its checksum."""
    body = text.removesuffix(form.end)
    return f"{body}{form.mark}{_sha256(body)}{form.tail}"


def refuse_changed(text: str, form: Form) -> None:
    """Raises ValueError if `text` has a checksum, or remains of one, that does not fit."""
    body, mark, rest = text.rpartition(form.mark)
    if mark and rest == f"{_sha256(body)}{form.tail}":
        return
    if mark or HASH in text or '"checksum":' in text or "# checksum" in text:  # a flipped bit may be in the mark itself
        raise ValueError(CHANGED)


def parse_json(text: str):
    """The value of a JSON text. Raises ValueError for what is none, NaN and endless nesting among it."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON's")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
