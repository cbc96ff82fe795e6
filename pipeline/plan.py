"""What a command would do: sizes, and an estimate of time from a few real steps. Writes nothing."""

import math
import time

import numpy as np
import torch

from cache.views import CropFlip
from pipeline import losses, show
from pipeline.config import Experiment, dump_config
from pipeline.data import datasets
from pipeline.models import build_model


def show_plan(config: Experiment, device: torch.device, stage: str) -> None:
    """Prints the resolved configuration, and what `stage` ("teacher", "dump" or "student") would need."""
    training_set, test_set = datasets.load(config.data)
    samples, classes, views = len(training_set), len(training_set.classes), config.views.count
    section = config.student if stage == "student" else config.teacher
    model = build_model(section.model, classes, config.data, config.seed).to(device)
    counts = training_set.class_counts
    encoding = config.cache.encoding
    width = classes * np.dtype(encoding.dtype).itemsize if encoding.name == "probability" else None
    store = f"{views * samples * width / 1e6:,.1f} MB ({width} bytes a view)" if width else "known once klt is fitted to the teacher"
    facts = {
        "training samples (N)": f"{samples:,}",
        "classes (C)": f"{classes:,}, of {counts.max():,} to {counts.min():,} samples",
        "test samples": f"{len(test_set):,}",
        "views": f"{views:,}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "store": store,
        "time": f"about {_seconds(config, model, training_set, len(test_set), device, stage):,.0f} s on {device.type}",
    }
    print(dump_config(config))
    show.facts(facts, f"{config.name}: {stage}, nothing written")


def _seconds(config: Experiment, model: torch.nn.Module, training_set, tests: int, device: torch.device, stage: str) -> float:
    """Extrapolated from a few steps on random pixels: decoding is not in it."""
    training = config.student.training if stage == "student" else config.teacher.training
    size = tuple(training_set.image_size[0]) if isinstance(config.views, CropFlip) else (config.views.size,) * 2
    batch = training.batch_size
    images = torch.randint(0, 256, (batch, *size, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    label = torch.zeros(batch, dtype=torch.int64, device=device)
    precision = config.cache.precision if stage == "dump" else training.precision

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return model(images)

    def step():
        losses.cross_entropy(forward(), label).mean().backward()

    @torch.inference_mode()
    def infer():
        forward()

    infer_seconds = _time(infer, device)
    if stage == "dump":
        return config.views.count * len(training_set) / batch * infer_seconds
    evaluations = math.ceil(training.epochs / training.evaluate_every)
    steps = training.epochs * math.ceil(len(training_set) / batch)
    return steps * _time(step, device) + evaluations * tests / batch * infer_seconds


def _time(work, device: torch.device) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))
