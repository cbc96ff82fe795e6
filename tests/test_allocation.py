"""Memory that is freed and asked for again costs no page faults once it is kept."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

SCRIPT = """
import resource
from offline_bkd.pipeline.allocation import keep_freed_memory
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
