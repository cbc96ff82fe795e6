"""What a command would do: sizes, and estimates of time and memory from a few real steps. Writes nothing."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from offline_bkd.cache import Cache, encodings
from offline_bkd.cache.planes import row_format
from offline_bkd.cache.views import CropFlip
from offline_bkd.cache.writer import refuse_taken
from offline_bkd.pipeline import runs
from offline_bkd.pipeline.config import dump_config
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.dump import cache_paths, load_teachers, notes_on_teachers
from offline_bkd.pipeline.evaluate import infer
from offline_bkd.pipeline.models import build_model, refuse_unknown_weights
from offline_bkd.pipeline.recipe import notes_on_training, refuse_device, refuse_unfit, take_backbone
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.show import terminal
from offline_bkd.pipeline.student import open_matching_cache, refuse_sources
from offline_bkd.pipeline.training import engine, losses
from offline_bkd.pipeline.training.methods import refuse_width


def show_plan(
    config: Experiment,
    device: torch.device,
    stage: str,
    out: str,
    resume: bool = False,
    teachers: Sequence[str] = (),
    apart: bool = False,
    cache: str | None = None,
    backbone: str | None = None,
) -> None:
    """Prints the resolved configuration, and what `stage` ("teacher", "dump" or "student") would need.

    Downloads nothing. Refuses what the command would, but for teachers, a cache or a backbone that are yet to be made.
    """
    section = config.student if stage == "student" else config.teacher
    if stage == "dump":
        for path in cache_paths(teachers, out, apart):
            refuse_taken(path, resume)
    else:
        runs.refuse_taken(out, resume)
        refuse_device(section.training, stage, device)
    if stage == "student":
        refuse_sources(section.method, cache, backbone)
    training_set, test_set = datasets.load(config.data, config.expert(stage), download=False)
    notes = []
    if teachers and all(map(_there, teachers)):
        _, identities = load_teachers(teachers, training_set)
        notes += notes_on_teachers(teachers, identities, training_set)
    found = open_matching_cache(cache, config, training_set) if cache and _there(cache) else None
    samples, classes, views = len(training_set), len(training_set.classes), config.views.count
    images = [open_images(part, config.views, device, config.data.workers) for part in (training_set, test_set)]
    network = section.model
    if stage == "dump" or network.downloads:
        network = network.without_weights()  # no size or time depends on them
    model = build_model(
        network, classes, config.data, config.seed, images[0].crop_size, channels_last=section.training.channels_last
    ).to(device)
    if stage != "dump" and section.model.downloads:
        refuse_unknown_weights(section.model)
    if backbone and _there(backbone):
        take_backbone(model, section.model, runs.open_run(backbone), training_set)
    if found and config.student.method.learns_from == "features":
        refuse_width(model, found.features.values())
    if stage != "dump":
        refuse_unfit(model, images[0], samples, section.training.batch_size)
    seconds = _seconds(config, model, images, device, stage) * (len(teachers) if stage == "dump" else 1)
    counts, row = training_set.class_counts, _row_bytes(config, classes, found)
    from_cache = stage == "student" and config.student.method.learns_from not in (None, "backbone")
    held = samples * row * (views if isinstance(config.views, CropFlip) else 2) if from_cache and row else 0
    stored = f"{views * samples * row / 1e6:,.1f} MB in memory" if row else "known once klt is fitted to the teacher"
    if apart:
        stored += f", each of {len(teachers)}"
    facts = {
        "training samples (N)": f"{samples:,}",
        "classes (C)": f"{classes:,}, of {counts.max():,} to {counts[counts > 0].min():,} samples",
        "test samples": f"{len(test_set):,}",
        "views": f"{views:,}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        **({"store": stored} if from_cache or stage != "student" else {}),
        "memory": f"about {(runs.peak_memory(device) + held) / 1e6:,.0f} MB on {device.type}",
        "time": f"about {seconds:,.0f} s on {device.type}",
    }
    if stage != "dump":
        notes += notes_on_training(section.method if stage == "student" else None, section.training, found)
    print(dump_config(config))
    for note in notes:
        print(f"note: {note}")
    terminal.facts(facts, f"{config.name}: {stage}, nothing written")


def _there(place: str) -> bool:
    """Whether there is something at a path; of an address elsewhere only opening it tells."""
    return "://" in place or Path(place).exists()


def _row_bytes(config: Experiment, classes: int, cache: Cache | None) -> int | None:
    """Bytes that one sample's answer to one view takes in memory; None where only the teacher's answers can say."""
    features = config.student.method.learns_from == "features"
    if cache:
        width, dtype = row_format(cache, features)
        return width * dtype.itemsize
    encoding = encodings.from_json(config.cache.encoding.model_dump())
    return classes * np.dtype(encoding.dtype).itemsize if encoding.plain else None


def _seconds(config: Experiment, model: torch.nn.Module, images: list, device: torch.device, stage: str) -> float:
    """Extrapolated from a few steps."""
    section = config.student if stage == "student" else config.teacher
    training, (train, test) = section.training, images
    samples, tests = len(train.label) * section.model.branches, len(test.label)  # an epoch visits as many for each branch
    if stage == "dump":
        batch, precision = config.cache.batch_size, config.cache.precision
    else:
        batch, precision = training.batch_size, training.precision
    rows = np.arange(min(batch, samples)) % len(train.label)
    views = np.zeros(len(rows), np.int64)
    if stage == "dump":
        seconds = _time(lambda: infer(model, train, rows, views, batch, precision), device)
        return config.views.count * samples / len(rows) * seconds
    optimiser = engine.build_optimiser(model, training)

    def step(size: int):
        (found,) = train.batches(rows[:size], views[:size], size)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(found.images)
        optimiser.zero_grad(set_to_none=True)
        losses.cross_entropy(logits, found.label).mean().backward()
        optimiser.step()

    steps = training.epochs * math.ceil(samples / batch)
    evaluations = math.ceil(training.epochs / training.evaluate_every)
    some = np.arange(min(tests, 2000))
    judging = evaluations * tests / len(some) * _time(lambda: infer(model, test, some, precision=precision), device)
    step(samples % batch or len(rows))  # an epoch's last batch, whose other size takes memory of its own
    return steps * _time(lambda: step(len(rows)), device) + judging


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
