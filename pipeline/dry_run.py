"""What a command would do: sizes, and estimates of time and memory from a few real steps. Writes nothing."""

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from offline_bkd.cache import Cache, encodings
from offline_bkd.cache.parts import VIEWS_TOGETHER
from offline_bkd.cache.views import CropFlip
from offline_bkd.pipeline import runs, torchrun
from offline_bkd.pipeline.backbone import take_backbone
from offline_bkd.pipeline.config import dump_config
from offline_bkd.pipeline.data.dataset import Dataset
from offline_bkd.pipeline.data.images import Batch, ImageSource
from offline_bkd.pipeline.device import peak_memory
from offline_bkd.pipeline.dump import prepare_dump
from offline_bkd.pipeline.evaluate import infer
from offline_bkd.pipeline.models import build_model, classifier, refuse_unknown_weights
from offline_bkd.pipeline.requirements import is_there, notes_on_training, refuse_unfit
from offline_bkd.pipeline.schema import Experiment, TrainedNetwork
from offline_bkd.pipeline.show import terminal
from offline_bkd.pipeline.show.trackers import refuse_missing
from offline_bkd.pipeline.train import Role, read_inputs
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods import freeze
from offline_bkd.pipeline.training.methods.distillation import refuse_width
from offline_bkd.pipeline.training.optimisation import Optimisation
from offline_bkd.pipeline.training.ranks import batch_sizes
from offline_bkd.pipeline.training.targets import room

TRIED = 512  # images that are read, and on which steps are timed
READ = 24  # of them, on which reading is timed
SECONDS = 4.0  # about as long may the timed steps take; a batch that is slower is timed in part


def show_training_plan(
    config: Experiment,
    device: torch.device,
    role: Role,
    out: str,
    resume: bool = False,
    cache: str | None = None,
    backbone: str | None = None,
    tracker: str | None = None,
) -> None:
    """Prints the resolved configuration, and what training the network of `role` ("teacher" or "student") would need.

    Downloads nothing. Refuses what the command would, but for a cache or a backbone that is yet to be made.
    """
    if torchrun.rank():
        return  # the first process speaks for all
    section = config.network(role)
    refuse_missing(tracker)
    runs.refuse_taken(out, resume)
    inputs = read_inputs(config, role, device, cache, backbone, TRIED)
    training_set, images, test_images, store = inputs.training_set, inputs.images, inputs.test_images, inputs.cache
    model = _build(config, section, training_set, images)
    if inputs.backbone:
        take_backbone(model, section.model, inputs.backbone, training_set)
    if store and section.method.learns_from == "features":
        refuse_width(model, store.features.values())
    samples, batch_size = len(training_set) * section.model.branches, section.training.batch_size  # BBN's pairs
    refuse_unfit(model, images, batch_sizes(samples, batch_size, torchrun.world(), device))
    views = section.training.views_per_decode
    step = _cost_of(_steps(model, section, images), images, min(batch_size, samples), views)
    score = _cost_of(_forward(model, test_images, section.training.precision), test_images, 500)
    judged = len(inputs.test_set) + (0 if inputs.validation_set is None else len(inputs.validation_set))
    evaluations = math.ceil(section.training.epochs / section.training.evaluate_every)
    steps = section.training.epochs * math.ceil(samples / batch_size)
    seconds = steps * step.seconds + evaluations * judged / 500 * score.seconds
    held = _unread(images, len(training_set)) + _unread(test_images, judged)
    facts = _sizes(config, training_set, model) | {"test samples": f"{len(inputs.test_set):,}"}
    from_cache, from_features = section.method.learns_from_cache, section.method.learns_from == "features"
    probabilities = _row_bytes(config, len(training_set.classes), store)
    features = sum(store.features.values()) if store else 0
    if not store and (from_features or (config.cache.features and role == "teacher")):
        features = classifier(model).in_features
    if from_cache or role == "teacher":
        facts["store"] = _store_size(config, len(training_set), probabilities, features)
    if from_cache:
        of_a_view = len(training_set) * (features if from_features else probabilities or 0)
        most = isinstance(config.views, CropFlip) or section.method.draws == "samples"  # of the views come in one epoch
        whole = most and of_a_view * config.views.count <= room(device)
        held += of_a_view * (config.views.count if whole else 2)  # an epoch's, and the next one's meanwhile
    facts["memory"] = f"about {(peak_memory(device) + step.more_memory + held) / 1e6:,.0f} MB on {device.type}"
    uncompiled = ", not compiled as training will be" if section.training.compile else ""
    facts["time"] = f"about {seconds:,.0f} s on {device.type}, {step.basis}{uncompiled}"
    _show(config, facts, _absent(cache, backbone) + notes_on_training(section, store), role)


def show_dump_plan(
    config: Experiment,
    device: torch.device,
    teachers: Sequence[str],
    out: str,
    resume: bool = False,
    apart: bool = False,
    part: tuple[int, int] | None = None,
) -> None:
    """Prints the resolved configuration, and what dumping the teachers' answers would need; teachers may be yet to be made.

    part: (number from 1, count), whose time is meant.
    """
    if torchrun.rank():
        return  # the first process speaks for all
    asked = prepare_dump(config, teachers, out, device, resume or part is not None, apart, TRIED)
    training_set, images = asked.training_set, asked.images
    model, times = asked.networks.to(device), 1
    if not model.members:  # yet to be made
        model, times = _build(config, config.teacher, training_set, images, False), len(teachers)
    batch_size, views = min(config.cache.batch_size, len(training_set)), min(VIEWS_TOGETHER, config.views.count)
    forward = _cost_of(_forward(model, images, config.cache.precision), images, batch_size, views, times)
    crops = config.views.count * len(training_set) / (part[1] if part else 1)
    facts, classes = _sizes(config, training_set, model), len(training_set.classes)
    features = sum(asked.networks.widths)  # of all teachers
    if config.cache.features and not features:
        features = classifier(model).in_features * len(teachers)
    probabilities = _row_bytes(config, classes, None)
    facts["store"] = _store_size(config, len(training_set), probabilities, features // (len(teachers) if apart else 1))
    if apart:
        facts["store"] += f", each of {len(teachers)}"
    memory = peak_memory(device) + forward.more_memory + _unread(images, len(training_set))
    facts["memory"] = f"about {memory / 1e6:,.0f} MB on {device.type}"
    time_of = f"part {part[0]}/{part[1]}: " if part else ""
    facts["time"] = f"{time_of}about {crops / batch_size * forward.seconds:,.0f} s on {device.type}, {forward.basis}"
    _show(config, facts, _absent(*teachers) + asked.notes, "dump")


@dataclass(frozen=True, kw_only=True)
class _Cost:
    seconds: float  # of a step of the whole batch, and of reading it as far as that does not go on meanwhile
    more_memory: float  # bytes that it takes beyond what was taken so far
    basis: str  # what it was extrapolated from


def _build(
    config: Experiment, section: TrainedNetwork, training_set: Dataset, images: ImageSource, weights: bool = True
) -> torch.nn.Module:
    """The network of `section`, where `images` are."""
    network = section.model
    if weights and network.downloads:
        refuse_unknown_weights(network)
    if not weights or network.downloads:
        network = network.without_weights()  # no size or time depends on them
    classes, layout = len(training_set.classes), section.training.channels_last
    model = build_model(network, classes, config.data, config.seed, images.crop_size, channels_last=layout)
    return model.to(images.device)


def _cost_of(work: Callable[[int], None], images: ImageSource, batch_size: int, views: int = 1, times: int = 1) -> _Cost:
    """Of `work`, `times` on each batch of `images`: from whole batches where they are fast, else from a part of one.

    `views` of an image are read together.
    """
    size, device = min(batch_size, 8), images.device
    first, before = _fastest(work, size, device, 2), peak_memory(device)
    whole = first * batch_size / size
    while size < batch_size and 3 * whole * min(1, 4 * size / batch_size) < SECONDS:
        size = min(4 * size, batch_size)
        before = peak_memory(device)
        whole = _fastest(work, size, device, 3) * batch_size / size
    grown = peak_memory(device) - before  # by three quarters of what the last size takes
    more = 0 if size == batch_size else grown * 4 / 3 * (batch_size / size - 1)
    seconds, read = times * whole, batch_size * _reading(images, views)
    if read:  # by workers, while a step runs; on a CPU on the same cores
        cores = len(os.sched_getaffinity(0))
        meanwhile = seconds + (read / cores if device.type == "cpu" else 0)
        seconds = max(read / images.workers, meanwhile) if images.workers else seconds + read
    return _Cost(seconds=seconds, more_memory=more, basis=f"from steps of {size} images")


def _reading(images: ImageSource, views: int) -> float:
    """Seconds in which a core reads an image for each of `views` crops that follow each other; 0 where images are held."""
    if not images.decodes:
        return 0.0
    alone = copy.copy(images)
    alone.workers = 0
    rows = np.arange(min(READ, len(images.label))).repeat(views)
    start = time.perf_counter()
    for _ in alone.batches(rows, np.arange(len(rows)) % views, len(rows)):
        pass
    return (time.perf_counter() - start) / len(rows)


def _unread(images: ImageSource, samples: int) -> int:
    """Bytes of those of `samples` images that a command would hold and this has not read."""
    return 0 if images.decodes else images.padded[0].nbytes * (samples - len(images.label))


def _sizes(config: Experiment, training_set: Dataset, model: torch.nn.Module) -> dict[str, str]:
    counts = training_set.class_counts
    return {
        "training samples (N)": f"{len(training_set):,}",
        "classes (C)": f"{len(counts):,}, of {counts.max():,} to {counts[counts > 0].min():,} samples",
        "views": f"{config.views.count:,}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
    }


def _steps(model: torch.nn.Module, section: TrainedNetwork, images: ImageSource) -> Callable[[int], None]:
    """A training step on so many images, by cross-entropy: other methods' losses cost little beside the network."""
    network, read = freeze(section.method, model), _Read(images) if images.decodes else images
    optimisation = Optimisation(network, model, section.training)

    def step(size: int) -> None:
        (batch,) = read.batches(np.arange(size) % len(images.label), np.zeros(size, np.int64), size)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=section.training.precision == "bfloat16"):
            logits = network.train()(batch.images)
        optimisation.step(losses.cross_entropy(logits, batch.label).mean(), 0.0)

    return step


def _forward(model: torch.nn.Module, images: ImageSource, precision: str) -> Callable[[int], None]:
    """A forward pass of so many images."""
    read = _Read(images) if images.decodes else images

    def forward(size: int) -> None:
        infer(model, read, np.arange(size) % len(images.label), batch_size=size, precision=precision)

    return forward


class _Read:
    """Images to decode, of which each batch is read once: what a step then takes is its own."""

    def __init__(self, images: ImageSource):
        self.images, self.device, self.known = images, images.device, dict[int, list[Batch]]()

    def batches(self, rows: np.ndarray, views: np.ndarray | None, batch_size: int) -> list[Batch]:
        if len(rows) not in self.known:
            self.known = {len(rows): list(self.images.batches(rows, views, batch_size))}
        return self.known[len(rows)]


def _fastest(work: Callable[[int], None], size: int, device: torch.device, calls: int) -> float:
    """Seconds of the fastest of so many calls, after one that is not counted: what else the machine does only adds to them."""
    seconds = []
    for _ in range(1 + calls):
        start = time.perf_counter()
        work(size)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _show(config: Experiment, facts: dict[str, str], notes: list[str], what: str) -> None:
    print(dump_config(config))
    for note in notes:
        print(f"note: {note}")
    terminal.facts(facts, f"{config.name}: {what}, nothing written")


def _absent(*places: str | None) -> list[str]:
    """A note on each of the sources that are given and yet to be made, or misspelt."""
    return [f"{place} is not there yet; planned without it" for place in places if place and not is_there(place)]


def _row_bytes(config: Experiment, classes: int, store: Cache | None) -> int | None:
    """Bytes that one sample's answer to one view takes in memory; None where only the teacher's answers can say."""
    if store:
        width, dtype = store.row_format(features=False)
        return width * dtype.itemsize
    encoding = encodings.from_json(config.cache.encoding.model_dump())
    return classes * np.dtype(encoding.dtype).itemsize if encoding.plain else None


def _store_size(config: Experiment, samples: int, probabilities: int | None, features: int) -> str:
    """In words; `features` is their width, of all teachers: they are stored as bytes."""
    if probabilities is None:
        return "known once klt is fitted to the teacher"
    return f"{config.views.count * samples * (probabilities + features) / 1e6:,.1f} MB in memory"
