"""YAML from anyone: plain values, or one line that says what is wrong; never much memory or time."""

import os

import pytest
import tiny

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.yaml_files import parse_yaml, read_text, read_yaml


def doubled(value: str, by: str) -> str:
    """Sections of which each holds the one before ten times, down to `value`."""
    lines = [f"a0: &a0 {value}"]
    for number in range(1, 12):
        repeated = ", ".join([f"*a{number - 1}"] * 10)
        lines.append(f"a{number}: &a{number} {by % repeated}")
    return "\n".join(lines)


DEEP_BY_ALIASES = "a: &a {deep}1{end}\nb: &b {deep}*a{end}".format(deep="[" * 40, end="]" * 40)
REFUSED = {
    "an alias bomb": (doubled("[x]", "[%s]"), "line 5: more than 20,000 values, as aliases repeat them"),
    "a bomb of merged sections": (doubled("{x: 1}", "{<<: [%s]}"), "line 5: more than 20,000 values, as aliases repeat them"),
    "many values": ("a: [" + "x," * 20_001 + "]", r"line 1: more than 20,000 values($|\))"),
    "deep sections": ("{a: " * 5000, "line 1: more than 50 levels of nesting"),
    "deep lists": ("[" * 5000, "line 1: more than 50 levels of nesting"),
    "deep by aliases": (DEEP_BY_ALIASES, "line 2: more than 50 levels of nesting, aliases followed"),
    "an alias in itself": ("a: &a [*a]", r"line 1: the alias \*a lies within what it stands for"),
    "a long value": ("x" * 5000, "line 1: a value of more than 4,096 characters"),
    "a long number": ("1" * 5000, "line 1: a value of more than 4,096 characters"),
    "no number": ("0x_", "invalid literal"),
    "a Python object": ("a: !!python/object/apply:os.getpid []", "line 1: a tag .* is not read; write the value alone"),
    "a list as a key": ("[a]: 1", "line 1: .*unhashable key"),
    "a key twice": ("a: 1\nb: {c: 1, c: 2}", "line 2: the key 'c' comes twice"),
    "a control character": ("a: \x01", "special characters are not allowed"),
    "an escaped one": (r'a: "\0"', "line 1: special characters are not allowed"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_fill_memory_or_is_not_plain_is_refused_in_a_file_and_in_an_override(text, message, tmp_path):
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} is not plain YAML: {message}") as of_file:
        read_yaml(path)
    with pytest.raises(UserError, match=message) as of_override:
        tiny.experiment(f"name={text}")
    for said in str(of_file.value), str(of_override.value):
        assert "\n" not in said and len(said) < 300


def test_a_variable_within_braces_is_to_be_quoted():
    with pytest.raises(UserError, match=r"^line 2: .*; within braces, quote what holds \$\{…\}$"):
        parse_yaml("name: birds\ndata: {root: ${DATA}/birds, train: train}")
    assert parse_yaml("data: {root: '${DATA}/birds'}\nroot: ${DATA}/birds")["root"] == "${DATA}/birds"


def test_aliases_merges_and_dates_are_plain():
    text = "base: &base {x: 0, y: 0}\nown: &own {<<: *base, x: 1}\ntop: {<<: *own, z: 2}\nsame: *own\ndate: 2020-13-41"
    values = parse_yaml(text)
    assert values["own"] == values["same"] == {"x": 1, "y": 0}
    assert values["top"] == {"x": 1, "y": 0, "z": 2}, "merged from what was merged"
    assert values["date"] == "2020-13-41"


def test_a_long_value_is_shown_in_part(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"base: {tiny.CONFIG}\nseed: {list(range(2000))}")
    for load in (lambda: load_config(path), lambda: tiny.experiment(f"seed={list(range(2000))}")):
        with pytest.raises(UserError, match=r"seed: .*; found \[0, 1, .*…$") as caught:
            load()
        assert len(str(caught.value)) < 300


def test_only_regular_files_of_a_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for place, kind in (("pipe", "no regular file"), ("link", "no regular file"), (".", "a folder")):
        with pytest.raises(UserError, match=f"is {kind}; name a file"):
            read_text(tmp_path / place)
        with pytest.raises(UserError, match=f"is {kind}; name a file"):
            load_config(tmp_path / place)
    with pytest.raises(UserError, match="/dev/zero is no regular file; name a file"):
        load_config("/dev/zero")
    (tmp_path / "large").write_bytes(b"a" * 1001)
    with pytest.raises(UserError, match="large holds more than 1,000 bytes; is it the right file?"):
        read_text(tmp_path / "large", limit=1000)
    (tmp_path / "latin.yaml").write_bytes("name: fêlin".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml is not UTF-8 \(byte 7: .*\); save it as UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "marked.yaml").write_bytes("name: fêlin".encode("utf-8-sig"))
    assert read_yaml(tmp_path / "marked.yaml") == {"name": "fêlin"}
