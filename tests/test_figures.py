"""Figures of the full recipes that pages and configurations show are those of results/full-recipe.json."""

import json
import re
import statistics
from pathlib import Path
from typing import get_args

import pytest

from offline_bkd.pipeline import schema

ROOT = Path(__file__).parent.parent
RUNS = json.loads((ROOT / "results" / "full-recipe.json").read_text())
TABLES = {
    "README.md": re.compile(r"^## What it gives$.*?^(\| method .*?)\n\n", re.DOTALL | re.MULTILINE),
    "docs/results.md": re.compile(r"^## The papers' full recipes$.*?^(\| method .*?)\n\n", re.DOTALL | re.MULTILINE),
}
METHODS = {
    get_args(method.model_fields["name"].annotation)[0]: method.title or method.__name__
    for method in get_args(schema.Student.model_fields["method"].annotation)
}
TITLES = {title: name for name, title in METHODS.items()} | {
    "teacher": "teacher",
    "CE": "teacher",  # who is trained by cross-entropy here is the teacher
    "logit adjustment": "logit_adjustment",
}
SETTING = re.compile(r"`(\w+): (\w+)`")


def rows(page: str) -> list[dict[str, str]]:
    """Of the page's table of full recipes, by heading."""
    heading, _, *lines = TABLES[page].search((ROOT / page).read_text())[1].splitlines()
    split = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in (heading, *lines)]
    return [dict(zip(split[0], cells, strict=True)) for cells in split[1:]]


ROWS = [(page, row) for page in TABLES for row in rows(page)]
SETTINGS = {found for _, row in ROWS for found in SETTING.findall(row["method"])}  # by which some rows differ from others


def method_of(text: str) -> str:
    """The method that a text begins with."""
    return TITLES[max((title for title in TITLES if re.match(rf"{re.escape(title)}\b", text)), key=len)]


def kind(run: dict) -> tuple:
    """What runs of one row have in common."""
    settings = {(key, value) for key, value in SETTINGS if f"student.method.{key}={value} " in run["command"]}
    return run["data"], run["method"], run["precision"], frozenset(settings)


def runs_of(label: str) -> list[dict]:
    """Those that a row's label speaks of, one a seed."""
    data = "cifar10-lt" if "CIFAR-10-LT" in label else "cifar100-lt"
    precision = "bfloat16" if "bfloat16" in label else "float32"
    return [run for run in RUNS if kind(run) == (data, method_of(label), precision, frozenset(SETTING.findall(label)))]


def shown(values: list[float | None], spread: bool) -> str:
    if None in values:  # there are no such classes
        return "–"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if spread and len(values) > 1 else mean


@pytest.mark.parametrize(("page", "row"), ROWS, ids=[f"{page}: {row['method']}" for page, row in ROWS])
def test_a_row_is_the_mean_of_its_runs(page, row):
    found = runs_of(row["method"])
    assert found, "no run in results/full-recipe.json is of this row"
    assert int(row["seeds"]) == len(found) == len({run["seed"] for run in found})
    spread = page == "docs/results.md"
    for column in "all", "many", "medium", "few":
        assert row[column] == shown([run["last"][column] for run in found], spread), column
    best = row["best epoch's all"]
    assert best == "–" or best == shown([run["best"]["all"] for run in found], spread)


def test_every_run_is_in_a_row_of_the_page_of_results():
    told = [run["command"] for row in rows("docs/results.md") for run in runs_of(row["method"])]
    assert sorted(told) == sorted(run["command"] for run in RUNS)


HEADS = {
    path.relative_to(ROOT / "configs").as_posix(): " ".join(re.findall(r"^# (.*)", path.read_text(), re.MULTILINE))
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
}
END = r"(?=By reproduce|Published|\(docs/results.md\))"
REACHED = {name: re.search(rf"Reached\b.*?{END}", head) for name, head in HEADS.items()}
REACHED = {name: found[0] for name, found in REACHED.items() if found and re.search(r"\d\d\.\d\d\b", found[0])}


@pytest.mark.parametrize("name", REACHED)
def test_what_a_configuration_says_was_reached_is_the_mean_of_such_runs(name):
    """With two digits after the point; what has one is of shorter training."""
    stem = re.sub(r"[-_]", "", Path(name).stem)
    (method,) = [one for one in METHODS if one.replace("_", "") == stem] or [None]  # or each figure stands behind its method
    place = 0
    for figure in re.finditer(r"\d\d\.\d\d\b", REACHED[name]):
        before = REACHED[name][place : figure.start()]
        place = figure.end()
        titles = re.findall(rf"\b(?:{'|'.join(map(re.escape, TITLES))})\b", before)
        of = method or TITLES[titles[-1]]
        data = "cifar10-lt" if name.startswith("cifar10-lt") else "cifar100-lt"
        kinds = {kind(run) for run in RUNS if (run["data"], run["method"]) == (data, of)}
        means = {shown([run["last"]["all"] for run in RUNS if kind(run) == one], spread=False) for one in kinds}
        assert figure[0] in means, f"{of}: {figure[0]}"


def test_there_are_such_configurations():
    assert {"cifar100-lt.yaml", "cifar/kd.yaml", "cifar/crt.yaml"} <= REACHED.keys()
