"""A configuration is checked as a whole, before anything runs, and every error says what to do."""

import json
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
import tiny
import yaml

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.config import dump_config, load_config
from offline_bkd.pipeline.reproduce.table import load_table

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "tables")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_shipped_configuration_loads_and_opens_with_its_command(path):
    load_config(path)
    assert f"--config configs/{path.relative_to(FOLDER)} " in "".join(path.read_text().splitlines()[:3])


def head(path: Path) -> str:
    """The comment that a file opens with, on one line."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.removeprefix("# ") for line in lines)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_file_opens_with_the_time_that_it_takes_and_what_it_reached_or_says_that_it_has_not_been_run(path):
    assert re.search("[Nn]ot run yet", head(path)) or "minute" in head(path) and "Reached" in head(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_figures_that_a_recipe_opens_with_are_those_of_its_table_and_of_what_was_measured(path):
    named = re.search(r"cli.py (reproduce .*?) --out", head(path))
    words = shlex.split(named[1]) if named else []
    options = dict(zip(words[1::2], words[2::2]))
    if not options:
        return
    column = options.get("--column")
    published = yaml.safe_load((FOLDER / "tables" / f"{options['--table']}.yaml").read_text())["rows"][options["--row"]]
    figures = published.get("published", {})
    expected = figures.get(column) or next(iter(figures.values()), None)
    assert f"published {expected['all']:g}" in head(path) if expected else "published" not in head(path)
    if options["--table"] == "cifar":
        cells = json.loads((FOLDER.parent / "results" / "cifar-lt-table-quick-cpu.json").read_text())["cells"]
        (ours,) = [cell["last"]["all"] for cell in cells if (cell["column"], cell["row"]) == (column, options["--row"])]
        assert f"it reached {sum(ours) / len(ours):.1f} %" in head(path)


@pytest.mark.parametrize(
    ("name", "architecture", "weights", "batch_size"),
    [
        ("imagenet-lt", "resnet10", None, 512),
        ("places-lt", "resnet152", "IMAGENET1K_V1", 128),
        ("inaturalist2018", "resnet50", None, 256),
    ],
)
def test_the_recipes_for_large_sets_are_the_papers(name, architecture, weights, batch_size):
    config = load_config(FOLDER / f"{name}.yaml")
    assert config.student.training == config.teacher.training and config.student.model == config.teacher.model
    training, model = config.student.training, config.student.model
    assert (model.architecture, model.weights, training.batch_size) == (architecture, weights, batch_size)
    assert (training.epochs, training.learning_rate, training.schedule.name, training.momentum) == (90, 0.2, "cosine", 0.9)
    method = config.student.method
    assert (method.name, method.alpha, method.beta, method.reweight_from) == ("bkd", 1, 0.9999, 0)
    assert config.cache.temperature == 2 and config.views.size == 224


# learning rates of backbone, attention and projection; of the classifier; of the centroids: *_optim_param in
# config/{ImageNet_LT,Places_LT}/stage_2_meta_embedding.py of zhmiao/OpenLongTailRecognition-OLTR at f50e375
@pytest.mark.parametrize(("name", "rates"), [("imagenet-lt", (0.01, 0.1, 0.01)), ("places-lt", (0.0001, 0.01, 0.01))])
def test_oltrs_learning_rates_are_the_public_codes(name, rates):
    student = load_config(FOLDER / name / "oltr.yaml").student
    training, shares = student.training, (student.training.backbone_rate, 1, student.training.centroid_rate)
    assert [training.learning_rate * share for share in shares] == pytest.approx(rates)
    assert student.method.freeze_backbone == (name == "places-lt") and student.model.projection == 512


@pytest.mark.parametrize("name", ["imagenet-lt", "places-lt"])
def test_lfmes_experts_are_trained_as_in_the_public_code(name):
    """config/ImageNet_LT/{many,median,low}_shot.py of xiangly55/LFME at 0a18a06."""
    row = load_table(name).rows["LFME"]
    experts = [load_config(row.config, member.set).teacher for member in row.teachers]
    assert [expert.expert for expert in experts] == ["many", "medium", "few"]
    assert [expert.training.batch_size for expert in experts] == [128, 64, 32]
    for expert in experts:
        training = expert.training
        assert (training.epochs, training.learning_rate, training.schedule.name) == (120, 0.1, "cosine")
        assert expert.model.projection == 512


def test_what_is_compared_on_inaturalist_2018_has_its_authors_values():
    """tpu/run_inat2018.sh, richardaecn/class-balanced-loss, 1d78572; lib/core/combiner.py, megvii-research/BBN, 7992e90."""

    def student(row):
        return load_config(FOLDER / "inaturalist2018" / f"{row}.yaml").student

    method = student("cb-focal").method
    assert (method.beta, method.gamma) == (0.999, 0.5)
    bbn = student("bbn")
    training = bbn.training
    assert (training.epochs, training.schedule.milestones, training.nesterov) == (90, (59, 79), True)
    assert bbn.method.final_share == pytest.approx(1 - (90 / 100) ** 2), "of 100 epochs, 90 are run"


def test_a_resolved_configuration_reads_back_equal(tmp_path):
    config = tiny.experiment("student.method={name: bkd, reweight_from: 0.8}")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.method.alpa=1", r"student\.method\.alpa: unknown key; did you mean 'alpha'\?"),
        ("student.trainin.epochs=2", r"student\.trainin: unknown key; did you mean 'training'\?"),
        ("views.padd=2", r"views\.padd: unknown key; did you mean 'pad'\?"),
        ("cache.encoding={name: probability, dtyp: float32}", r"cache\.encoding\.dtyp: unknown key; did you mean 'dtype'\?"),
        (r'{"a\nb": 1}=1', r"^-o .*: \{\"a\\nb\": 1\}: unknown key; known are"),
        (r'data={name: digits, "a\nb": 1}', r"data\.'a\\nb': unknown key"),
        ("flavour=1", r"flavour: unknown key; known are name, seed, data"),
        (
            "student.method.name=bdk",
            r"student\.method\.name: 'bdk' is not known; did you mean 'cbd' or 'bkd'\?",
        ),
        ("student.method.name=bkdd", r"student\.method\.name: 'bkdd' is not known; did you mean 'bkd'\?"),
        ("student.method={alpha: 2}", r"student\.method\.name: missing; one of"),
        ("student.training.epochs=many", r"student\.training\.epochs: .*integer.*; found 'many'"),
        ("student.training.epochs=true", r"student\.training\.epochs: .*integer; found True"),
        ("student.training.epochs=0", r"student\.training\.epochs: .*greater than 0; found 0"),
        ("student.method.reweight_from=160", r"reweight_from: a share of the epochs.*epoch 160 of 200 is 0.8\); found 160"),
        ("data.imbalance_ratio=0.5", r"data\.imbalance_ratio: .*; found 0\.5"),
        ("teacher.model.depth=21", r"teacher\.model: depth is 6n \+ 2 .*; found 21"),
        ("views.pad=-1", r"views: pad is in pixels, from 0 to 64; found -1"),
        ("views={name: random_resized_crop, size: 4, count: 0}", r"views: size .* and count .* found 4, 0"),
        ("views={name: random_resized_crop, size: 4, count: 2, scale: [0, 1]}", r"scale is a range"),
        ("views={name: random_resized_crop, size: 4, count: 2, ratio: [2, 1]}", r"ratio is a range"),
        ("views={name: random_resized_crop, size: 4, count: 2, seed: -1}", r"seed is in \[0, 2\^64\); found -1"),
        ("data={name: parquet}", r"data\.train, data\.test: missing; it must be given"),
        ("data={name: inaturalist, train: a}", r"data\.test: missing; it must be given"),
        ("data={name: image_list, train: a, test: b, class: c}", r"data\.class: unknown key; did you mean 'classes'\?"),
        ("studnet.training.epochs=5", r"studnet: unknown key; did you mean 'student'\?"),
        ("a..b=1", r"an override is key=value"),
        ("data.mean.0=0.5", r"data\.mean: a list, \[first, second, …\], is meant; found \{'0': 0\.5\}"),
        ("data.mean=0.5", r"data\.mean: a list, \[first, second, …\], is meant; found 0\.5"),
        ("student=3", r"student: a section \(key: value\) is meant; found 3"),
        ("student.method=bkd", r"student\.method: a section \(key: value\) is meant; found 'bkd'"),
        ("views=3", r"views: a section \(key: value\) is meant; found 3"),
        ("data.std=[0, 1, 1]", r"data\.std\.0: .*greater than 0"),
        ("data.mean=[123.7, 116.3, 103.5]", r"data\.mean: of pixels in \[0, 1\], .*found \(123.7, .*; divide .* by 255"),
        ("data.std=[58, 57, 57]", r"data\.std: of pixels in \[0, 1\]"),
        ("data.mean=[-1, 0, 0]", r"data\.mean\.0: .*greater than or equal to 0"),
        ("data.mean=[.nan, 0, 0]", r"data\.mean\.0: .*finite"),
        ("student.training.learning_rate=.inf", r"learning_rate: .*finite"),
        ("epochs", r"an override is key=value"),
        ("student" + ".x" * 5000 + "=1", r"^-o student[.x]{93}…: an override is key=value"),
        ("name.first=1", r"name: .*valid string; found \{'first': 1\}"),
        ("name=[1", r"the value is not plain YAML \(.*\); quote it"),
        ("name=\x01", r"the value is not plain YAML \(special characters are not allowed\); quote it"),
        ("student.training={epochs: 5, epochs: 3}", r"the value is not plain YAML \(line 1: the key 'epochs' comes twice\)"),
        ("student.method.name=[1]", r"student\.method\.name: '\[1\]' is not known; known are .*bkd"),
        ("student.training={nesterov: true, momentum: 0}", r"nesterov needs momentum; set momentum, usually 0\.9"),
    ],
)
def test_an_error_names_the_place_what_was_found_and_the_nearest_right_name(override, message):
    with pytest.raises(UserError, match=message):
        tiny.experiment(override)


def test_all_errors_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        tiny.experiment("views.padd=2", "student.training.epochs=0", "seed=-1")
    assert len(str(caught.value).splitlines()) == 3


def test_what_is_wrong_in_a_section_that_an_alias_repeats_is_one_line(tmp_path):
    path = tmp_path / "own.yaml"
    repeated = "teacher: {training: &training {epoch: 3}}\nstudent: {training: *training}"
    path.write_text(f"base: {tiny.CONFIG}\n{repeated}")
    with pytest.raises(UserError) as caught:
        load_config(path)
    said = f"{path}: teacher.training.epoch, student.training.epoch: unknown key; did you mean 'epochs'?"
    assert str(caught.value) == said


def test_an_override_reaches_only_the_section_it_names_though_the_file_shares_it():
    config = tiny.experiment("student.training.epochs=7")
    assert (config.teacher.training.epochs, config.student.training.epochs) == (2, 7)


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("by", ["override", "file"])
def test_a_section_of_another_name_keeps_what_its_kinds_all_have_and_else_starts_from_defaults(by, tmp_path):
    def changed(section, name, *before):
        if by == "override":
            return tiny.experiment(*before, f"{section}.name={name}")
        (tmp_path / "whole.yaml").write_text(dump_config(tiny.experiment(*before)))
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": "whole.yaml", **nested(f"{section}.name", name)}))
        return load_config(tmp_path / "own.yaml")

    found = changed("teacher.training.schedule", "constant", "teacher.training.schedule={name: step, gamma: 0.5}")
    assert found.teacher.training.schedule.name == "constant"
    assert changed("cache.encoding", "klt").cache.encoding.max_error == 0.02
    data = changed("data", "cifar10").data
    assert (data.name, data.imbalance_ratio, data.mean) == ("cifar10", 20, (0.305, 0.305, 0.305)), "what every data set has"
    data = changed("data", "imagefolder", "data={name: parquet, train: a, test: b, max_per_class: 9}").data
    assert (data.max_per_class, data.train) == (9, "train"), "what some have"
    found = changed("student.method", "cb", "student.method={name: bkd, reweight_from: 0.8, beta: 0.9}").student.method
    assert (found.reweight_from, found.beta) == (0, 0.9999), "a method is as its own paper has it"


def test_overrides_may_stand_in_any_order():
    for overrides in (["alpha=3", "name=kd"], ["name=kd", "alpha=3"], ["name=cb", "name=kd", "alpha=2", "alpha=3"]):
        method = tiny.experiment(*[f"student.method.{override}" for override in overrides]).student.method
        assert (method.name, method.alpha) == ("kd", 3)


def test_what_a_file_does_not_name_is_of_its_default_kind_to_files_and_overrides(files):
    model = "{name: cifar_resnet, depth: 8}"
    bare = f"name: a\ndata: {{name: digits}}\nviews: {{name: crop_flip}}\nteacher: {{model: {model}}}"
    path = files(own="base: bare.yaml\nstudent: {method: {beta: 0.9}}", bare=f"{bare}\nstudent: {{model: {model}}}")
    config = load_config(path, ("student.method.alpha=3", "teacher.training.schedule.gamma=0.5"))
    assert (config.student.method.name, config.student.method.beta, config.student.method.alpha) == ("bkd", 0.9, 3)
    assert (config.teacher.training.schedule.name, config.teacher.training.schedule.gamma) == ("step", 0.5)


def test_an_override_may_replace_a_whole_section():
    schedule = (
        "teacher.training.schedule={name: step, gamma: 0.5}",
        "teacher.training.schedule={name: step, warmup_epochs: 1}",
    )
    schedule = tiny.experiment(*schedule, "teacher.training.schedule.milestones=[7]").teacher.training.schedule
    assert (schedule.gamma, schedule.warmup_epochs, schedule.milestones) == (0.01, 1, (7,))
    assert tiny.experiment("data={name: digits}").data.imbalance_ratio is None
    assert tiny.experiment("data={name: digits, root: a}", "data.name=cifar10").data.imbalance_ratio is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not plain YAML: line 1"),
        ("- 1", "holds no mapping"),
        (None, "cannot read the configuration"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


@pytest.fixture
def files(tmp_path):
    """A function that writes {name: text} into a folder and returns the path of the first."""

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{next(iter(texts))}.yaml"

    return write


WHOLE = dump_config(tiny.experiment("student.method.alpha=3"))


def test_a_file_over_its_base_holds_what_differs(files):
    path = files(own="base: whole.yaml\nseed: 5\nstudent: {model: {width: 6}, training: {epochs: 9}}", whole=WHOLE)
    expected = tiny.experiment("student.method.alpha=3", "student.model.width=6", "student.training.epochs=9", seed=5)
    assert load_config(path) == expected
    assert load_config(files(top="base: own.yaml\nseed: 6")) == expected.model_copy(update={"seed": 6})
    assert load_config(path, ("student.training.epochs=2",)).student.training.epochs == 2


def test_a_section_of_another_name_replaces_its_base_s(files):
    path = files(own="base: whole.yaml\nstudent: {method: {name: kd}}", whole=WHOLE)
    assert load_config(path).student.method.alpha == 1
    path = files(own="base: whole.yaml\nstudent: {method: {name: bkd, beta: 0.9}}")
    assert (load_config(path).student.method.alpha, load_config(path).student.method.beta) == (3, 0.9)


def test_another_base_can_be_named_from_the_folder_of_the_command(files, monkeypatch):
    path = files(own="base: missing.yaml\nstudent: {method: {name: ce}}", whole=WHOLE)
    with pytest.raises(UserError, match="own.yaml: base: cannot read the configuration .*missing.yaml"):
        load_config(path)
    monkeypatch.chdir(path.parent)
    config = load_config(path, ("student.training.epochs=4", "base=whole.yaml"))
    assert (config.student.method.name, config.student.training.epochs, config.data.name) == ("ce", 4, "digits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: no.yaml", "cannot read the configuration .*no.yaml"),
        ("base: 3", "base: names a file; found 3"),
        ("base: /dev/zero", "own.yaml: base: /dev/zero is no regular file; name a file"),
        ("base: .", "own.yaml: base: .* is a folder; name a file"),
        ("base: own.yaml", "base: .*own.yaml leads back to itself; name a file that is complete without it"),
        ("base: other.yaml", "base: .*own.yaml leads back to itself"),
        ("base: whole.yaml\nstudent: {method: {alpa: 1}}", r"student\.method\.alpa: unknown key; did you mean 'alpha'"),
        ("base: whole.yaml\nstudent: 3", r"student: a section \(key: value\) is meant; found 3"),
    ],
)
def test_what_is_wrong_with_a_base_is_named(files, text, message):
    with pytest.raises(UserError, match=message):
        load_config(files(own=text, other="base: own.yaml", whole=WHOLE))


def test_an_error_is_blamed_on_who_made_it(files):
    path = files(
        own="base: middle.yaml\nstudent: {training: {epochs: 0}}",
        middle="base: whole.yaml\ndata: {rooot: here}",
        whole=WHOLE.replace("pad: 1", "pad: -1"),
    )

    def blamed(*overrides, seed=None):
        with pytest.raises(UserError) as caught:
            load_config(path, overrides, seed)
        lines = [line.removeprefix(f"{path.parent}/").split(": ") for line in str(caught.value).splitlines()]
        return {key: who for who, where, *_ in lines for key in where.split(", ")}

    files_alone = {"student.training.epochs": "own.yaml", "data.rooot": "middle.yaml", "views": "whole.yaml"}
    assert blamed() == files_alone
    for override, where in {
        "student.method.alpa=1": "student.method.alpa",
        "studnt.training.epochs=1": "studnt",
        "student.training.epochs=-1": "student.training.epochs",
        "views.pad=-2": "views",  # what is said of a whole section
        "data.name=parquet": "data.test",  # what is missing now
    }.items():
        assert blamed(override)[where] == f"-o {override}"
        assert blamed("cache.temperature=3", override, "student.model.width=6")[where] == f"-o {override}"
    assert blamed(seed=-1) == {**files_alone, "seed": "--seed -1"}
    path = files(own="base: right.yaml", right=WHOLE)
    assert blamed("student.method.name=cbd", "student.training.epochs=3") == {"student": "-o student.method.name=cbd"}
    with pytest.raises(UserError, match="-o base=nowhere.yaml: cannot read the configuration nowhere.yaml"):
        load_config(path, ("base=nowhere.yaml",))


def test_a_base_that_changes_nothing_is_refused(files):
    path = files(own=dump_config(load_config(files(whole=WHOLE))), other=WHOLE.replace("pad: 1", "pad: 2"))
    override = f"base={path.parent / 'other.yaml'}"
    with pytest.raises(UserError, match="base=.*other.yaml changes nothing: .*own.yaml says all of that itself; leave it out"):
        load_config(path, (override,))
    assert load_config(files(own="base: missing.yaml"), (override,)).views.pad == 2
