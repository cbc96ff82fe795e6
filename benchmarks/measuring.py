"""What the benchmarks share: memory at its peak, and how figures are kept, beside what gave them.

Imported first: it makes offline_bkd this checkout, also where it is not installed.
"""

import ctypes
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent.parent))
import cli  # noqa: E402, F401  binds offline_bkd to this checkout


def save(path: Path, figures: dict, *libraries: str, device: str = "cpu", section: str | None = None) -> None:
    """Writes `figures` to `path`, as its only content or as one section of it, and prints them.

    `libraries`: distributions whose versions belong to the figures.
    """
    from offline_bkd.pipeline import runs  # late: it imports torch, whose memory is no part of what a benchmark measures

    found = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "commit": runs.commit(),
        "device": device,
        "processor": processor(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
        **figures,
    }
    if section:
        found = (json.loads(path.read_text()) if path.exists() else {}) | {section: found}
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(path, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


def memory(reset: bool = False) -> int:
    """The most memory that this process had since the last reset, bytes: Linux keeps count."""
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no memory to build on
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
