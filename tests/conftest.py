import os
from pathlib import Path

# Before torch is imported: runs of the suite do not fight over cores, and their bits do not depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest  # noqa: E402

import cli  # noqa: E402, F401  binds offline_bkd to this checkout, also where it is not installed


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` are skipped, and the summary says so, where there is no such device."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """The CPU, and a GPU where there is one, where the same work gives the same bits as in the commands."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """A killed process loses nothing that it has written; only a power cut would. The order of syncs is tested, and the
    processes that tests start do sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


@pytest.fixture(scope="session", autouse=True)
def no_pictures_of_runs():
    """To draw them takes longer than to train most runs of these tests; what looks at them asks for `pictures_of_runs`."""
    from offline_bkd.pipeline import reproduce, train

    with pytest.MonkeyPatch.context() as patch:
        for module in train, reproduce:
            patch.setattr(module, "draw_run", lambda run: None)
        yield


@pytest.fixture
def pictures_of_runs(monkeypatch):
    from offline_bkd.pipeline import reproduce, train
    from offline_bkd.pipeline.show import report

    for module in train, reproduce:
        monkeypatch.setattr(module, "draw_run", report.draw_run)


@pytest.fixture(scope="session")
def teacher_run(tmp_path_factory):
    """The folder of a tiny teacher's complete run."""
    import tiny

    from offline_bkd.pipeline.train import train_teacher

    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    train_teacher(tiny.experiment(), str(folder), tiny.CPU)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory, teacher_run):
    """The tiny teacher's cache, with float32 probabilities."""
    import tiny

    from offline_bkd.pipeline.dump import dump_logits

    path = tmp_path_factory.mktemp("tiny") / "cache.zarr"
    dump_logits(tiny.experiment(tiny.EXACT), [str(teacher_run)], str(path), tiny.CPU)
    return path


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """An environment for processes in which `offline_bkd` is this checkout, whatever is installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "offline_bkd").symlink_to(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.fixture
def two_blocks(monkeypatch):
    """Stores of cache_store.py have two blocks a view."""
    from offline_bkd.cache import format

    monkeypatch.setattr(format, "_CHUNK_BYTES", 180 * 5 * 4)
