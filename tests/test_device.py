"""Which device a process takes, that work on it repeats its bits, and what memory there is and stays."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offline_bkd.pipeline import UserError, device

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

SCRIPT = """
import resource
from offline_bkd.pipeline.device import keep_freed_memory
kept = keep_freed_memory() if {keep} else None
import torch
def work():
    for _ in range(20):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="huge pages hide the faults")
def test_blocks_that_are_asked_for_again_are_there():
    kept, faults = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(keep=True)], check=True, capture_output=True, text=True
    ).stdout.split()
    if kept == "False":
        pytest.skip("the C library has no mallopt")
    assert int(faults) < 1000
    plain = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=False)], check=True, capture_output=True, text=True)
    assert int(plain.stdout.split()[1]) > 10 * int(faults) + 1000, "which shows that this measures something"


def test_the_memory_there_is_is_that_of_the_job_and_of_each_process(tmp_path, monkeypatch):
    (tmp_path / "slurm" / "job_1" / "step_0").mkdir(parents=True)
    (tmp_path / "slurm" / "memory.max").write_text("max\n")
    (tmp_path / "slurm" / "job_1" / "memory.max").write_text("400000\n")
    (tmp_path / "groups").write_text("9:name=systemd:/\n4:memory:/docker\n0::/slurm/job_1/step_0\n")
    found = [str(path.relative_to(tmp_path)) for path in device._limits(tmp_path / "groups", tmp_path)]
    assert found == [
        "memory/docker/memory.limit_in_bytes", "memory/memory.limit_in_bytes",
        "slurm/job_1/step_0/memory.max", "slurm/job_1/memory.max", "slurm/memory.max", "memory.max",
    ]  # fmt: skip
    limits = device._limits
    monkeypatch.setattr(device, "_limits", lambda: limits(tmp_path / "groups", tmp_path))
    assert device.memory_limit() == 400000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.memory_limit() == 100000


def test_each_process_of_torchrun_takes_a_device_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert device.choose_device("auto") == torch.device("cuda", 1) and taken == [torch.device("cuda", 1)]
    assert torch.backends.cudnn.deterministic
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 of this machine finds no GPU of its own, of 2; start 2 at most"):
        device.choose_device("auto")


def test_work_that_is_to_repeat_leaves_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    with pytest.raises(KeyboardInterrupt), device.repeatable():
        assert torch.backends.cudnn.deterministic
        raise KeyboardInterrupt
    assert not torch.backends.cudnn.deterministic
