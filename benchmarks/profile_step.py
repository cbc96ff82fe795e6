"""Where a step's time goes on a CPU: by operation, beside what the arithmetic allows, and what memory costs that the kernel
has to give again.

    python benchmarks/profile_step.py --out results

ResNet-32 on CIFAR's image size: a training step of 128 images, and the forward pass of a dump in batches of 512 and 128.
A step's rate stands beside that of one large matrix product on the same threads, and that of the same step compiled
(training.compile), in turns with it, the median of several each. System time and
page faults are the process's own, with freed memory given back to the kernel and kept (--keep).
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from measuring import save
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from offline_bkd.pipeline import schema
from offline_bkd.pipeline.device import device_name, keep_freed_memory
from offline_bkd.pipeline.models import build_model

IMAGES = 3072  # a measurement


def usage() -> tuple[float, float, int]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime, used.ru_minflt


def measured(work, batch: int) -> dict:
    """User and system milliseconds, and page faults, an image."""
    for _ in range(2):
        work()
    before, count = usage(), max(1, IMAGES // batch)
    for _ in range(count):
        work()
    user, system, faults = (after - first for after, first in zip(usage(), before))
    images = count * batch
    return {"user, ms": 1e3 * user / images, "system, ms": 1e3 * system / images, "page faults": faults / images}


def steps(precision: str = "float32", compiled: bool = False) -> dict:
    """A name for each piece of work, with its batch."""
    model = build_model(schema.CifarResNet(name="cifar_resnet", depth=32), 100, schema.Digits(name="digits"), 0)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    network = torch.compile(model, dynamic=False) if compiled else model
    images, label = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 100, (512,))

    def train():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network.train()(images[:128])
        optimiser.zero_grad(set_to_none=True)
        functional.cross_entropy(logits.float(), label[:128]).backward()
        optimiser.step()

    def answer(batch):
        with torch.inference_mode():
            model.eval()(images[:batch])

    return {
        "training step, batch 128": (train, 128),
        "dump's forward pass, batch 512": (lambda: answer(512), 512),
        "dump's forward pass, batch 128": (lambda: answer(128), 128),
    }


def seconds(*work, repeats: int = 10) -> list[float]:
    """A median of each piece of work, in turns; the first turn does not count."""
    found = [[] for _ in work]
    for _ in range(repeats):
        for function, times in zip(work, found):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in found]


def profiled(precision: str) -> dict:
    """Of a training step: milliseconds an image, billions of operations a second beside a matrix product's, and shares."""
    train, batch = steps(precision)["training step, batch 128"]
    compiled, _ = steps(precision, compiled=True)["training step, batch 128"]
    train()
    with FlopCounterMode(display=False) as counter:
        train()
    square = torch.randn(4096, 4096, dtype=getattr(torch, precision))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            train()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    took, took_compiled = seconds(train, compiled)
    (product,) = seconds(lambda: square @ square)
    return {
        "ms an image": 1e3 * took / batch,
        "ms an image, compiled": 1e3 * took_compiled / batch,
        "not compiled / compiled": took / took_compiled,
        "GFLOP/s": counter.get_total_flops() / took / 1e9,
        "GFLOP/s of a matrix product": 2 * 4096**3 / product / 1e9,
        "shares": {key: round(spent[key] / sum(spent.values()), 4) for key in sorted(spent, key=spent.get, reverse=True)[:12]},
    }


@click.command()
@click.option("--out", default="results", show_default=True, help="Folder for profile-cpu.json.")
@click.option("--keep/--both", default=None, hidden=True)
def main(out, keep):
    if keep is not None:  # a process of its own for each way, since it cannot be undone
        if keep:
            keep_freed_memory()
        return click.echo(json.dumps({name: measured(*work) for name, work in steps().items()}))
    ways = {}
    for way, option in ("given back", "--both"), ("kept", "--keep"):
        command = [sys.executable, __file__, option]
        ways[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    keep_freed_memory()
    figures = {"an image, freed memory": ways, "threads": torch.get_num_threads()}
    figures["a training step"] = {precision: profiled(precision) for precision in ("float32", "bfloat16")}
    save(Path(out) / "profile-cpu.json", figures, "torch", device=device_name(torch.device("cpu")))


if __name__ == "__main__":
    main()
