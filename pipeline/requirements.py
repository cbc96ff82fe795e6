"""What training asks of its settings and sources: refused or noted in one line before anything is written."""

import copy
import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from offline_bkd.cache import Cache, CacheError, open_cache
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import ImageSource
from offline_bkd.pipeline.schema import METHODS, Experiment, MethodSection, TrainedNetwork, Training
from offline_bkd.pipeline.show.terminal import counted
from offline_bkd.pipeline.teachers import refuse_other


def refuse_device(training: Training, role: str, device: torch.device) -> None:
    """Raises UserError where the device cannot do what `training` asks for."""
    if training.compile == "cuda_graphs" and device.type != "cuda":
        raise UserError(f"{role}.training.compile: cuda_graphs needs a CUDA device, found {device.type}; set true or false")
    if training.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "gcc", "clang++"))):
        raise UserError(f"{role}.training.compile needs a C++ compiler, and there is none; install g++, or set false")


def refuse_sources(method: MethodSection, cache: str | None, backbone: str | None) -> None:
    """Raises UserError where what `method` learns from is not given, or something else is."""
    for given, option, wanted in (
        (cache, "--cache", method.learns_from_cache),
        (backbone, "--backbone", method.learns_from == "backbone"),
    ):
        if wanted and given is None:
            raise UserError(f"method {method.name} learns from a {option[2:]}; name one with {option}")
        if given is not None and not wanted:
            raise UserError(f"method {method.name} learns from no {option[2:]}; leave out {option}")


def is_there(place: str) -> bool:
    """Whether there is something at a path; of an address elsewhere only opening it tells."""
    return "://" in place or Path(place).exists()


def open_matching_cache(path: str, config: Experiment, training_set: datasets.Dataset) -> Cache:
    """The complete cache at `path`. Raises CacheError with every difference if it is not for this experiment."""
    cache = open_cache(path)
    refuse_other(cache, path, training_set, config.cache.temperature, config.views, cache.identity.teacher)
    cache.refuse_incomplete()
    method = config.student.method
    if (method.learns_from == "experts") != ("experts" in cache.identity.teacher):
        what, remedy = (
            ("whole teachers' answers", "dump those of teacher.expert many, medium and few")
            if method.learns_from == "experts"
            else ("experts' answers, each for its own classes alone", "dump a whole teacher's, or use method lfme")
        )
        raise CacheError(f"{path} holds {what}, which method {method.name} does not learn from; {remedy}")
    cache.refuse_temperature(getattr(method, "temperature", None) or cache.temperature)
    if method.learns_from == "features" and not cache.features:
        raise CacheError(
            f"{path} holds no features, which method {method.name} learns from; "
            "dump with -o cache.features=true into another folder"
        )
    return cache


def refuse_unfit(network: torch.nn.Module, images: ImageSource, sizes: set[int]) -> None:
    """Raises UserError if `network` cannot train on so many images as one of `sizes` (ranks.batch_sizes).

    Four images stand for more: what fails does so for the size of the images, or for too few of them to normalise over.
    """
    for size in sizes:
        tried, rows = copy.deepcopy(network).train(), np.arange(min(size, 4)) % len(images.label)  # batch statistics move
        (batch,) = images.batches(rows, np.zeros(len(rows), np.int64), len(rows))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = tried(batch.images)
        except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
            if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError) or re.match("CUDA|cuDNN", str(error)):
                raise  # which no other network would mend
            raise UserError(
                f"the network cannot train on {counted(size, 'image')} of {tuple(batch.images.shape[2:])} pixels "
                f"({str(error).splitlines()[0]}); choose another model, views or batch_size"
            )
        shape = tuple((output[0] if isinstance(output, tuple) else output).shape)
        if len(shape) != 2:
            raise UserError(f"the network answers {shape}, not logits [batch, classes]; choose another model")


def notes_on_training(section: TrainedNetwork, cache: Cache | None) -> list[str]:
    """What is allowed, but perhaps not meant."""
    notes, training, schedule = [], section.training, section.training.schedule
    if beyond := [str(epoch) for epoch in getattr(schedule, "milestones", ()) if epoch >= training.epochs]:
        notes.append(f"training.schedule.milestones {', '.join(beyond)} do not come in {counted(training.epochs, 'epoch')}")
    if getattr(schedule, "warmup_epochs", 0) >= training.epochs:
        notes.append(
            f"training.schedule.warmup_epochs {schedule.warmup_epochs} do not end in {counted(training.epochs, 'epoch')}"
        )
    teachers = _teachers(cache) if cache else {}
    linear = [name for name, one in teachers.items() if not one["model"]["cosine_scale"]]
    if section.method.name == "cbd" and linear:
        notes.append(f"CBD's teachers have a cosine classifier (model.cosine_scale); linear is that of {', '.join(linear)}")
    balanced = [name for name, one in teachers.items() if (method := METHODS.get(one.get("method"))) and method.balances]
    if section.method.name == "bkd" and balanced:
        notes.append(
            f"BKD's class weights balance a plain teacher's answers; balanced already are those of {', '.join(balanced)}: "
            "method kd takes them as they are"
        )
    return notes


def _teachers(cache: Cache) -> dict[str, dict]:
    """What the cache keeps of each of its teachers that was trained here, by a name for it; caches of old name no method."""
    identity = cache.identity.teacher
    teachers = [one for one in identity.get("average_of", [identity]) if _trained_here(one)]
    said = "the cache's {} of method {}, seed {}"
    return {said.format(one["model"]["name"], one.get("method", "unknown"), one["seed"]): one for one in teachers}


def _trained_here(teacher: dict) -> bool:
    """Whether a teacher is described as one of ours; others are as whoever wrote their store liked."""
    model = teacher.get("model")
    ours = isinstance(model, dict) and {"name", "cosine_scale"} <= model.keys() and "seed" in teacher
    return ours and isinstance(teacher.get("method", ""), str)
