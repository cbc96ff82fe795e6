"""What README, docs/ and the heads of configs/ tell a reader to type exists, is accepted, and works where it is light."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from offline_bkd import cli
from offline_bkd.cache import open_cache
from offline_bkd.pipeline import reproduce, schema
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.data import datasets

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
PROGRAMS = ("python", "make", "export", "torchrun", "pip")


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of `languages`."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [content for language, content in fenced if language in languages]


def commands(path: Path) -> list[list[str]]:
    """Every command of a page, in a block or in the text, or at the head of a configuration, as words."""
    text = path.read_text()
    if path.suffix == ".yaml":
        lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# python ")]
    else:
        typed = "\n".join(blocks(text, "", "sh")).replace("\\\n", " ").splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
        names = (*PROGRAMS, *cli.main.commands)
        lines = [line for line in (*typed, *inline) if line.split()[:1] and line.split()[0] in names and " " in line]
    return [shlex.split(line, comments=True) for line in lines]


ALL = {f"{path.relative_to(ROOT)}: {shlex.join(words)[:90]}": words for path in (*PAGES, *CONFIGS) for words in commands(path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to type commands in: with the configurations, and the README's own one of birds, and images of these."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "configs").symlink_to(ROOT / "configs")
    own, over = [yaml.safe_load(block) for block in blocks((ROOT / "README.md").read_text(), "yaml")]
    own["data"]["root"] = "birds"
    for name, values in ("birds", own), ("over", over):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    for part in "train", "test":
        for number, kind in enumerate(("owl", "wren")):
            (folder / "birds" / part / kind).mkdir(parents=True)
            for image in range(6):
                Image.new("RGB", (12, 12), (200 * number, 20 * image, 9)).save(folder / f"birds/{part}/{kind}/{image}.png")
    return folder


@pytest.fixture
def typing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OFFLINE_BKD_DATA", str(folder))
    return folder


def test_there_are_commands_to_check():
    assert len(ALL) > 100 and {words[0] for words in ALL.values()} >= {"python", "make", "torchrun", "inspect"}


@pytest.mark.parametrize("words", ALL.values(), ids=ALL)
def test_a_command_is_accepted_and_its_experiment_resolves(words, typing):
    program, *arguments = words
    if program == "make":
        assert re.search(f"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", arguments[1])[1]
        assert arguments[0] == "install" and f"\n{extra or 'dependencies'} = " in (ROOT / "pyproject.toml").read_text()
    elif program == "export" and arguments[0].isupper():  # of the shell
        assert arguments[0].startswith("OFFLINE_BKD_DATA=")
    elif program == "python" and arguments[0] != "cli.py":
        source = (ROOT / arguments[0]).read_text()
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
    elif program == "torchrun":
        assert arguments[2] == "cli.py" and arguments[3] in cli.main.commands
    elif program == "python":
        accept(arguments[1:])
    else:  # one spoken of, without all that it needs
        options = {option for parameter in cli.main.commands[program].params for option in parameter.opts}
        assert options >= {word for word in arguments if word.startswith("-")}


def accept(words: list[str]) -> None:
    """Raises where cli.py would not take these words, or the experiment or table that they name is wrong."""
    name, *arguments = words
    asked = cli.main.commands[name].make_context(name, arguments).params
    if "config_file" in asked:
        load_config(asked["config_file"], asked["overrides"], asked["seed"])
        cli.parse_seeds(asked.get("seeds"))
    if name == "reproduce":
        whole = reproduce.load_table(asked["table"])
        reproduce.select(whole, asked["rows"], asked["columns"], cli.parse_seeds(asked["seeds"]), asked["quick"])


def typed(command: str, *more: str) -> str:
    result = CliRunner().invoke(cli.main, [*shlex.split(command), *more])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_for_one_s_own_data_work(typing):
    _, first, *_ = blocks((ROOT / "README.md").read_text(), "")
    own = [shlex.split(line, comments=True) for line in first.splitlines()]
    assert [words[2] for words in own] == ["train-teacher", "train-teacher", "dump-logits", "train-student"]
    network = "{name: cifar_resnet, depth: 8, width: 2}"
    small = ["data.workers=0", f"teacher.model={network}", f"student.model={network}", "views.size=8", "views.count=2"]
    small += ["cache.encoding={name: probability}", "teacher.training.epochs=1", "student.training.epochs=1"]
    for words in own:
        typed(shlex.join(words[2:]), "--device", "cpu", *(part for override in small for part in ("-o", override)))
    assert (typing / "runs/student/summary.json").exists()
    assert load_config("over.yaml").student.method.name == "ldam"


def test_the_commands_that_look_at_runs_and_caches_work(typing, teacher_run, cache):
    shutil.copytree(teacher_run, "run")  # evaluate writes beside what it evaluates
    places = {"RUN": "run", "STORE.zarr": str(cache), "FILE.parquet": "answers.parquet", "FOLDER": "report"}
    looking = "evaluate", "inspect", "verify", "export", "report"
    told = [words for page, words in ALL.items() if page.startswith("README") and words[0] in looking]
    assert {words[0] for words in told} == set(looking)
    for words in told:
        device = ["--device", "cpu"] if "RUN" in words and words[0] in ("evaluate", "verify") else []
        typed(shlex.join(places.get(word, word) for word in words if word != "…"), *device)


def test_the_lines_for_pandas_work(cache):
    (lines,) = blocks((ROOT / "README.md").read_text(), "python")
    values: dict = {}
    exec(lines.replace("runs/digits/cache.zarr", str(cache)), values)
    assert len(values["table"]) == len(values["cache"]) == 464


def test_the_lines_that_set_a_test_part_aside_work(tmp_path):
    counts = {"owl": 100, "wren": 7, "dove": 1}
    for kind, count in counts.items():
        (tmp_path / "train" / kind).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "train" / kind / f"{number}.png")
    lines, *_ = blocks((ROOT / "docs" / "questions.md").read_text(), "python")
    exec(lines.replace("/data/birds", str(tmp_path)), {})
    found = {part: {kind: len(list((tmp_path / part / kind).iterdir())) for kind in counts} for part in ("train", "test")}
    assert found["test"] == {"owl": 20, "wren": 3, "dove": 0}
    assert {kind: found["train"][kind] + found["test"][kind] for kind in counts} == counts
    own = yaml.safe_load(blocks((ROOT / "README.md").read_text(), "yaml")[0])["data"] | {"root": str(tmp_path)}
    assert [len(part) for part in datasets.load(schema.ImageFolder(**own))[:2]] == [85, 23]


def test_the_lines_for_a_training_loop_work(cache):
    _, lines, _ = blocks((ROOT / "docs" / "questions.md").read_text(), "python")
    train, *_ = datasets.load(tiny.experiment().data)
    images = [(train.decode(row), int(train.label[row])) for row in range(len(train))]
    linear = torch.nn.Linear(3 * 8 * 8, 10)
    begun = linear.weight.detach().clone()
    values = {
        "images": images,
        "network": lambda image: linear(image.flatten(1)),
        "device": tiny.CPU,
        "optimiser": torch.optim.SGD(linear.parameters(), lr=0.1),
    }
    exec(lines.replace("runs/digits/cache.zarr", str(cache)), values)
    assert values["epoch"] == 2 and 0 < values["loss"].item() < 10 and not torch.equal(begun, linear.weight)


def test_the_lines_for_a_network_of_one_s_own_work(typing):
    *_, lines = blocks((ROOT / "docs" / "questions.md").read_text(), "python")

    class Brightness(torch.nn.Linear):
        def forward(self, image):
            return super().forward(image.float().mean((1, 2, 3))[:, None])

    exec(lines.replace("runs/cache.zarr", "brightness.zarr"), {"network": Brightness(1, 2)})
    assert open_cache("brightness.zarr").complete


def test_the_page_of_keys_is_what_the_schema_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import configuration

    page = configuration.page()
    assert (ROOT / "docs" / "configuration.md").read_text() == page, "run: python docs/configuration.py"
    assert [line for line in page.splitlines() if line.endswith("|  |")] == [], (
        "each key's line in the schema says its meaning"
    )


def test_the_page_of_methods_has_every_key_and_default():
    page = (ROOT / "docs" / "methods.md").read_text()
    said = {name: text for name, text in re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", page, re.DOTALL | re.MULTILINE)}
    methods = get_args(schema.Student.model_fields["method"].annotation)
    assert said.keys() == {get_args(method.model_fields["name"].annotation)[0] for method in methods}
    for method in methods:
        (name,) = get_args(method.model_fields["name"].annotation)
        for key, field in method.model_fields.items():
            if key != "name":
                value = json.dumps(field.default).strip('"')
                assert re.search(rf"`{key}`\s{re.escape(value)}\b", said[name]), f"{name}: {key} {value}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page):
    links = re.findall(r"\]\((?!\w+://)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
    named = re.findall(r"`((?:benchmarks|cache|configs|docs|pipeline|results|tests)/[\w./-]*\w)`", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_commands_of_make_demo_are_accepted(typing):
    planned = subprocess.run(["make", "-C", str(ROOT), "-n", "demo"], check=True, capture_output=True, text=True).stdout
    commands = [shlex.split(line) for line in planned.splitlines() if line.startswith(".venv/bin/python cli.py ")]
    assert [words[2] for words in commands] == ["train-teacher", "dump-logits", "train-student", "train-student", "report"]
    for words in commands:
        accept(words[2:])


def test_help_examples_are_accepted(typing):
    for command in cli.main.commands.values():
        example = re.search(r"Example: python cli\.py (.+)", command.help)[1]
        accept(shlex.split(example))
    for line in re.findall(r"^ *python cli\.py (.+)", cli.main.help, re.MULTILINE):
        accept(shlex.split(line))
