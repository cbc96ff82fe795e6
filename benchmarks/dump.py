"""What writing a cache costs beside the teacher's forward pass, which it overlaps.

    python benchmarks/dump.py --out results

The loop of dump-logits, from images to committed blocks, against the forward pass alone over the same batches, in turns;
figures are medians and their ratios. Random weights and pixels take as long as any. The answers are simulated, for random
weights answer the same to everything, which would be cheap to encode. Left out is what comes once a dump, whatever the
number of views: making the store and fitting `klt` to the teacher.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from measuring import save

from offline_bkd.cache import CropFlip, create_cache
from offline_bkd.pipeline import schema, teachers
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import ResidentImages
from offline_bkd.pipeline.device import device_name
from offline_bkd.pipeline.dump import writing
from offline_bkd.pipeline.models import build_model

VIEWS, CLASSES = CropFlip(pad=1, flip=False), 100
SAMPLES = 10_847  # of CIFAR-100-LT
# teacher, side of its images in pixels, samples where there is no GPU
TEACHERS = [
    (schema.CifarResNet(name="cifar_resnet", depth=20), 32, 2048),
    (schema.TorchvisionModel(name="torchvision", architecture="resnet18"), 64, 128),
]
ENCODINGS = [{"name": "probability", "dtype": "float16"}, {"name": "klt", "max_error": 0.02}]


class Simulated(torch.nn.Module):
    """A network whose answers are some of 16,384 drawn ones, with the spectrum of a ResNet-20's on CIFAR-100-LT."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        feature = torch.randn(16_384, 64, generator=generator) * 6 * torch.exp(-torch.arange(64) / 9)
        head, _ = torch.linalg.qr(torch.randn(CLASSES, 64, generator=generator))
        self.network = network
        self.register_buffer("logits", feature @ head.T)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = torch.randint(len(self.logits), (len(images),), device=images.device)
        return self.logits[rows].add_(self.network(images), alpha=0)


def measure(network, side: int, samples: int, repeats: int, device: torch.device, scratch: str | None) -> dict[str, float]:
    """Seconds of all forward passes alone, and of the dump by encoding: medians."""
    training_set = datasets.Dataset(
        name="random",
        classes=tuple(map(str, range(CLASSES))),
        sample_id=np.arange(samples),
        label=np.arange(samples) % CLASSES,
        images=np.random.default_rng(0).integers(0, 256, (samples, side, side, 3), dtype=np.uint8),
    )
    images, section = ResidentImages(training_set, VIEWS, device), schema.CacheSection()
    model = Simulated(build_model(network, CLASSES, schema.Digits(name="digits"), seed=0))
    teacher = teachers.Teachers([model], features=False).eval().to(device)

    def store(folder, encoding):
        return create_cache(
            folder,
            identity=teachers.identity(training_set, section.temperature, VIEWS, {"digest": "benchmark"}),
            sample_id=training_set.sample_id,
            label=training_set.label,
            image_size=np.full((samples, 2), side),
            encoding=encoding,
            fit=lambda views: torch.softmax(model.logits.cpu() / section.temperature, 1).unflatten(0, (len(views), -1)),
        )

    def answers(rows, views):
        (view,) = views
        probability, _ = teachers.tempered(teacher, images, rows, np.full(len(rows), view), section)
        return [writing.Predictions(probability[None, :, 0].cpu().numpy(), {})]

    @torch.inference_mode()
    def forward(writer):
        for view, block in writer.pending():
            rows = training_set.sample_id[writer.rows(block)]
            for batch in images.batches(rows, np.full(len(rows), view), section.batch_size):
                teacher(batch.images)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def dumping(writer):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            writing.write_pending([writer], answers, VIEWS.count, images.decodes)

    work = {"forward": (forward, ENCODINGS[0])} | {each["name"]: (dumping, each) for each in ENCODINGS}
    seconds = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, (run, encoding) in work.items():
            with tempfile.TemporaryDirectory(dir=scratch) as folder, store(folder, encoding) as writer:
                start = time.perf_counter()
                run(writer)
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


@click.command()
@click.option("--out", default="results", show_default=True, help="Folder for dump-<device>.json.")
@click.option("--repeats", default=5, show_default=True, help="Turns that count.")
@click.option("--scratch", help="A folder to write the stores in.")
def main(out, repeats, scratch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for network, side, few in TEACHERS:
        samples = SAMPLES if device.type == "cuda" else few
        seconds = measure(network, side, samples, repeats, device, scratch)
        ratios = {name: seconds[name] / seconds["forward"] for name in seconds if name != "forward"}
        row = {"teacher": network.model_dump(), "side": side, "samples": samples, "views": VIEWS.count}
        found.append(row | {"seconds": seconds, "dump / forward": ratios})
        click.echo(json.dumps(found[-1]))
    path, figures = Path(out) / f"dump-{device.type}.json", {"classes": CLASSES, "teachers": found}
    save(path, figures, "torch", "zarr", device=device_name(device))


if __name__ == "__main__":
    main()
