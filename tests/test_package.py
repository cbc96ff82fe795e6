"""A source distribution and a wheel hold all that a user needs, also far from a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(*command, cwd, **environment) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that was built from the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    for part in "cache", "configs", "docs", "pipeline", "tests":
        shutil.copytree(ROOT / part, folder / "checkout" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"):
        shutil.copy(file, folder / "checkout")
    run("-c", BUILD, "sdist", folder, cwd=folder / "checkout")
    (source,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(source, folder / "source", filter="data")
    (unpacked,) = (folder / "source").iterdir()
    run("-c", BUILD, "wheel", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_a_wheel_has_every_module_and_every_configuration(wheel):
    with zipfile.ZipFile(wheel) as file:
        packed = {name.removeprefix("offline_bkd/") for name in file.namelist() if name.startswith("offline_bkd/")}
    modules = {str(path.relative_to(ROOT)) for part in ("cache", "pipeline") for path in (ROOT / part).rglob("*.py")}
    configurations = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert packed == modules | configurations | {"__init__.py", "cli.py", "py.typed", "pipeline/show/page.html"}


def test_a_wheel_works_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    lines = "from offline_bkd.pipeline import config; print(config.__file__, config.load_config('configs/digits.yaml').name)"
    found = run("-c", lines, cwd=elsewhere, PYTHONPATH=str(site))
    assert found.split() == [str(site / "offline_bkd" / "pipeline" / "config.py"), "digits-lt"]
    table = ["reproduce", "--table", "cifar", "--row", "KD", "--column", "CIFAR-10-LT 10", "--out", "table", "--dry-run"]
    script = site / "offline_bkd" / "cli.py"  # as reproduce runs it
    assert "5 commands; nothing written" in run(script, *table, cwd=elsewhere)
    assert not list(elsewhere.iterdir())


def test_the_command_that_a_wheel_installs_says_what_it_is(wheel, tmp_path):
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel, cwd=tmp_path)

    def typed(*words) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(
            [site / "bin" / "offline-bkd", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    from offline_bkd.pipeline import __version__

    version, short, long, nothing = typed("--version"), typed("-h"), typed("--help"), typed()
    assert (version.returncode, version.stdout, version.stderr) == (0, f"offline-bkd, version {__version__}\n", "")
    assert (short.returncode, short.stdout) == (0, long.stdout) and "\n  train-teacher  Train the teacher" in short.stdout
    assert (nothing.returncode, nothing.stdout) == (2, "") and nothing.stderr.startswith(
        "Usage: offline-bkd [OPTIONS] COMMAND"
    )


def test_the_version_is_one():
    from offline_bkd.pipeline import __version__

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
