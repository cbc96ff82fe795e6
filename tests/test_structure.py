"""Imports point one way: cli, then the recipes, then what they are made of, then the cache."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the bottom up; a module may import from lower layers and its own
LAYERS = [
    {"cache"},
    {"pipeline"},
    {"pipeline.schema", "pipeline.yaml_files"},
    {
        "pipeline.config",
        "pipeline.data.decoding",
        "pipeline.data.workers",
        "pipeline.metrics",
        "pipeline.show.progress",
        "pipeline.show.terminal",
        "pipeline.training.losses",
        "pipeline.training.samplers",
    },
    {"pipeline.data.dataset"},
    {"pipeline.data.folders", "pipeline.data.lists"},
    {"pipeline.data.parquet"},
    {
        "pipeline.data.datasets",
        "pipeline.data.color_jitter",
        "pipeline.models.cifar_resnet",
        "pipeline.models.image_classifier",
        "pipeline.models.oltr",
        "pipeline.models.weights",
        "pipeline.runs",
        "pipeline.runs.checksums",
        "pipeline.runs.files",
        "pipeline.runs.folder",
        "pipeline.runs.record",
        "pipeline.runs.start",
        "pipeline.runs.weights",
        "pipeline.training.targets",
    },
    {"pipeline.models.branches", "pipeline.models.heads"},
    {"pipeline.models.timm_models", "pipeline.models.torchvision_models"},
    {"pipeline.models.build"},
    {"pipeline.data.images", "pipeline.models", "pipeline.show.report"},
    {"pipeline.training.engine", "pipeline.evaluate", "pipeline.training.methods"},
    {"pipeline.dump", "pipeline.export_model", "pipeline.import_model", "pipeline.predict"},
    {"pipeline.recipe"},
    {"pipeline.teacher", "pipeline.student"},
    {"pipeline.dry_run", "pipeline.verify", "pipeline.reproduce.table", "pipeline.reproduce.execution"},
    {"pipeline.reproduce.plan"},
    {"pipeline.reproduce.results"},
    {"pipeline.reproduce"},
    {"cli"},
]
DOCUMENTED = {"", "pipeline.data", "pipeline.show", "pipeline.training"}  # packages that hold a docstring, or names, alone
FILES = sorted((*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("cache/*.py"), ROOT / "cli.py"))


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    modules = {name(other) for other in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("offline_bkd.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name(path).split(".")[: -node.level or None] if node.level else []
            if node.level and path.name == "__init__.py":
                above = name(path).split(".")[: len(name(path).split(".")) + 1 - node.level]
            module = ".".join([*above, *([node.module] if node.module else [])]).removeprefix("offline_bkd.")
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= {one for one in inner if one in modules} or {module}
    return found


def layer(module: str) -> int | None:
    module = "cache" if module.startswith("cache.") else module
    return next((number for number, members in enumerate(LAYERS) if module in members), None)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_downwards(path):
    own = layer(name(path))
    for module in imported(path):
        assert (layer(module) or 0) <= (own if own is not None else 0), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent == ROOT / "cache"], ids=name)
def test_the_cache_knows_neither_torch_nor_the_pipeline(path):
    assert not {module.split(".")[0] for module in imported(path)} & {"torch", "torchvision", "pipeline", "cli"}


def test_every_module_has_its_layer():
    known = {member for members in LAYERS for member in members}
    missing = {name(path) for path in FILES if not name(path).startswith("cache")} - known
    assert missing == DOCUMENTED - {""}
