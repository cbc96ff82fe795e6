"""Imports point one way: cli, then the recipes, then what they are made of, then the cache."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# from the bottom up; a module may import from lower layers and its own; a folder stands for what lies in it
LAYERS = [
    {"cache"},
    {"pipeline"},
    {"pipeline.schema", "pipeline.torchrun", "pipeline.yaml_files"},
    {"pipeline.config", "pipeline.metrics", "pipeline.show.progress", "pipeline.show.terminal"},
    {"pipeline.device", "pipeline.guard"},
    {"pipeline.training.losses", "pipeline.training.samplers"},
    {"pipeline.data", "pipeline.models", "pipeline.runs", "pipeline.training.targets"},
    {"pipeline.training.methods", "pipeline.training.optimisation", "pipeline.training.ranks"},
    {"pipeline.show.pictures", "pipeline.show.seeds", "pipeline.show.tables"},
    {"pipeline.training.engine", "pipeline.evaluate", "pipeline.show.trackers"},
    {"pipeline.show.evaluation", "pipeline.show.inspection", "pipeline.show.page", "pipeline.show.report"},
    {"pipeline.backbone", "pipeline.teachers", "pipeline.export_model", "pipeline.import_model", "pipeline.predict"},
    {"pipeline.requirements", "pipeline.dump"},
    {"pipeline.cached_targets", "pipeline.train", "pipeline.dry_run", "pipeline.verify", "pipeline.reproduce"},
    {"cli"},
]
NAMES_ALONE = {"pipeline.show", "pipeline.training"}  # packages that hold a docstring alone
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
    """That of the module, or of the folder that it lies in."""
    while module:
        for number, members in enumerate(LAYERS):
            if module in members:
                return number
        module = module.rpartition(".")[0] if module.count(".") > 1 or module.startswith("cache.") else ""
    return None


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_downwards(path):
    own = layer(name(path))
    for module in imported(path):
        assert (layer(module) or 0) <= (own if own is not None else 0), f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent == ROOT / "cache"], ids=name)
def test_the_cache_knows_neither_torch_nor_the_pipeline(path):
    assert not {module.split(".")[0] for module in imported(path)} & {"torch", "torchvision", "pipeline", "cli"}


def test_every_module_has_its_layer():
    assert {name(path) for path in FILES if layer(name(path)) is None} == NAMES_ALONE


def test_training_and_dumping_from_image_files_need_none_of_the_larger_libraries(checkout):
    """So that they run on a machine that has little more than torch."""
    script = (
        "import sys\n"
        "for name in 'pyarrow', 'duckdb', 'moto', 'fsspec', 'obstore', 'timm', 'onnx', 'lightning': sys.modules[name] = None\n"
        "from offline_bkd.pipeline import cached_targets, dry_run, dump, evaluate, import_model, train\n"
        "from offline_bkd.pipeline.show import report\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=checkout)


def test_processes_that_tests_start_import_this_checkout(checkout, tmp_path):
    script = "from offline_bkd.pipeline import config; print(config.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, env=checkout, cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).resolve() == ROOT / "pipeline" / "config.py"
