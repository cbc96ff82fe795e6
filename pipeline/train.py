"""Recipe: train a network into a run's folder. Teacher and student are uses of a network; one recipe trains both."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from offline_bkd.cache import Cache
from offline_bkd.pipeline import NotFinite, UserError, runs, torchrun
from offline_bkd.pipeline.backbone import take_backbone
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.color_jitter import ColorJitter
from offline_bkd.pipeline.data.images import ImageSource, open_images
from offline_bkd.pipeline.evaluate import evaluate
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.requirements import (
    is_there,
    notes_on_training,
    open_matching_cache,
    refuse_device,
    refuse_sources,
    refuse_unfit,
)
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.show.report import draw_run
from offline_bkd.pipeline.show.trackers import follow, refuse_missing
from offline_bkd.pipeline.training.engine import Task, train
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.training.ranks import Ranks, batch_sizes, join, refuse_shares
from offline_bkd.pipeline.training.targets import Targets

Role = Literal["teacher", "student"]  # the section of the experiment that describes the network


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a network is trained and judged on. Networks that differ in their seeds alone share it."""

    training_set: datasets.Dataset
    test_set: datasets.Dataset
    validation_set: datasets.Dataset | None  # held out of the training part
    images: ImageSource  # of the training part
    test_images: ImageSource
    validation_images: ImageSource | None
    cache: Cache | None  # what the method learns from, if it learns from one
    targets: Targets | None  # of that cache
    backbone: runs.Run | None  # the run whose backbone is taken, if the method takes one

    @property
    def learns_from(self) -> str | None:
        """The digest of the cache, or of the other run's network."""
        if self.cache:
            return self.cache.digest
        return self.backbone.summary()["digest"] if self.backbone else None

    @property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """What the parts of the data set are."""
        parts = {"training": self.training_set, "test": self.test_set, "validation": self.validation_set}
        return {name: part.fingerprint for name, part in parts.items() if part is not None}


def train_teacher(
    config: Experiment,
    out: str,
    device: torch.device,
    *,
    backbone: str | None = None,
    seeds: Sequence[int] = (),
    tracker: str | None = None,
    resume: bool = False,
) -> None:
    """Trains the teacher of `config` into the folder `out`, or one of each of `seeds`, by a method that needs no cache.

    An expert (LFME) sees, and is judged on, the images of its own classes alone, among which it answers.
    """
    _train(config, "teacher", out, device, cache=None, backbone=backbone, seeds=seeds, tracker=tracker, resume=resume)


def train_student(
    config: Experiment,
    cache: str | None,
    out: str,
    device: torch.device,
    *,
    backbone: str | None = None,
    seeds: Sequence[int] = (),
    tracker: str | None = None,
    resume: bool = False,
) -> None:
    """Trains the student of `config` into the folder `out`, from the store at `cache` or the run in `backbone`.

    With `seeds` a student of each is trained, one after the other, into the folders `out`-<seed>: each as it would be
    alone, from one copy of images and targets. One that diverges leaves the others to their ends.

    Raises CacheError before anything is written if the cache is for other data, views or classes, or is not complete.
    """
    _train(config, "student", out, device, cache=cache, backbone=backbone, seeds=seeds, tracker=tracker, resume=resume)


def _train(
    config: Experiment,
    role: Role,
    out: str,
    device: torch.device,
    *,
    cache: str | None,
    backbone: str | None,
    seeds: Sequence[int],
    tracker: str | None,
    resume: bool,
) -> None:
    if seeds and not Path(out).name:
        raise UserError(f"--out {out!r} is no name that seeds can be added to; name a folder")
    refuse_missing(tracker)
    ranks = join(device)
    several = {f"{Path(out)}-{seed}": config.model_copy(update={"seed": seed}) for seed in seeds}
    for folder in (several or (out,)) if ranks.first else ():
        runs.refuse_taken(folder, resume)
    inputs = read_inputs(config, role, device, cache, backbone)
    if not seeds:
        return train_network(config, role, inputs, out, device, ranks, tracker=tracker, resume=resume)
    for folder, seeded in several.items():
        if ranks.first and runs.begun(Path(folder)):  # what cannot go on is refused before others begin
            with runs.start_run(folder, seeded, role, device, resume, inputs.learns_from, inputs.fingerprints, silent=True):
                pass
    diverged = None
    for folder, seeded in several.items():
        try:
            label = f"seed {seeded.seed}: "
            train_network(seeded, role, inputs, folder, device, ranks, label=label, tracker=tracker, resume=resume)
        except NotFinite as error:
            print(error, flush=True)  # the others may take long
            diverged = diverged or str(error)  # not itself, which would keep all that was on the device
    if diverged:
        raise NotFinite(diverged)


def read_inputs(
    config: Experiment,
    role: Role,
    device: torch.device,
    cache: str | None = None,
    backbone: str | None = None,
    tried: int | None = None,
) -> Inputs:
    """The data of `config`, the store at `cache` and the run in `backbone`, refused where they do not fit each other.

    tried: as a dry run reads them: at most so many images of a part, no targets, and nothing is downloaded; cache and backbone
    may be yet to be made.
    """
    section = config.network(role)
    refuse_device(section.training, role, device)
    refuse_sources(section.method, cache, backbone)
    training_set, test_set, validation_set = datasets.load(config.data, section.expert, download=tried is None)
    parts = [training_set, test_set] + ([] if validation_set is None else [validation_set])
    refuse_shares(section.method, section.training.batch_size, min(map(len, parts[1:])), torchrun.world())
    cache, backbone = (place if place and (tried is None or is_there(place)) else None for place in (cache, backbone))
    store = open_matching_cache(cache, config, training_set) if cache else None
    images, test_images, *others = (open_images(part, config.views, device, config.data.workers, tried) for part in parts)
    for part, source in zip(parts, (images, test_images, *others)):
        if source.crop_size != images.crop_size:
            trained, other = (" x ".join(map(str, size)) for size in (images.crop_size, source.crop_size))
            raise UserError(f"{part.name} has images of {other} pixels, the training part of {trained}; make them one size")
    validation_images = others[0] if others else None
    return Inputs(
        training_set=training_set,
        test_set=test_set,
        validation_set=validation_set,
        images=images,
        test_images=test_images,
        validation_images=validation_images,
        cache=store,
        targets=Targets(store, device, section.method.learns_from == "features") if store and tried is None else None,
        backbone=runs.open_run(backbone) if backbone else None,
    )


def train_network(
    config: Experiment,
    role: Role,
    inputs: Inputs,
    out: str,
    device: torch.device,
    ranks: Ranks,
    *,
    label: str = "",
    tracker: str | None = None,
    resume: bool = False,
) -> None:
    """Trains the network of `role` into the folder `out`, and draws its pictures. `label` goes before what is printed.

    The first of `ranks` alone writes, and is followed by `tracker` (show/trackers.py).
    """
    section, training_set, images = config.network(role), inputs.training_set, inputs.images
    members = torch.from_numpy(training_set.class_counts > 0) if section.expert else None
    classes, layout = len(training_set.classes), section.training.channels_last
    model = build_model(section.model, classes, config.data, config.seed, images.crop_size, members, layout).to(device)
    context = Context(
        model=model,
        sample_id=training_set.sample_id,
        label=training_set.label,
        class_counts=training_set.class_counts,
        targets=inputs.targets,
        epochs=section.training.epochs,
        seed=config.seed,
        device=device,
        images=images,
        backbone=take_backbone(model, section.model, inputs.backbone, training_set) if inputs.backbone else None,
    )
    method = build_method(section.method, context)
    network = ColorJitter(method.network, section.color_jitter) if section.color_jitter else method.network
    refuse_unfit(network, images, batch_sizes(len(method.rows(0)), section.training.batch_size, ranks.world, device))
    started = runs.start_run(out, config, role, device, resume, inputs.learns_from, inputs.fingerprints, label)
    with started if ranks.first else nullcontext(runs.Run(Path(out), label, silent=True)) as run:
        ranks.wait()  # until the first has begun
        if ranks.first and not run.has("log.txt"):
            for note in notes_on_training(section, inputs.cache):
                run.log(f"note: {note}")
            if ranks.world > 1 and device.type == "cpu":
                run.log(
                    f"note: each of {ranks.world} processes normalises over its own share of a batch: torch synchronises "
                    "batch statistics on GPUs only"
                )
        judge = partial(evaluate, class_counts=training_set.class_counts, precision=section.training.precision, ranks=ranks)
        task = Task(
            model=model,
            network=network,
            method=method,
            images=images,
            sample_id=training_set.sample_id,
            views=config.views,
            targets=inputs.targets,
            evaluate=partial(judge, images=inputs.test_images),
            validate=partial(judge, images=inputs.validation_images) if inputs.validation_images is not None else None,
            training=section.training,
            seed=config.seed,
            ranks=ranks,
        )
        try:
            with follow(tracker if ranks.first else None, run, config) as track:
                train(task, run, describe(config, role, inputs), track)
        except RuntimeError as error:
            if "gloo" not in str(error) and "NCCL" not in str(error):
                raise
            raise RuntimeError("another process of torchrun ended; see what it said, then go on by --resume")
        if ranks.first:
            draw_run(run)


def describe(config: Experiment, role: Role, inputs: Inputs) -> dict:
    """What a run's summary says of what was trained, and from what."""
    section = config.network(role)
    plain = "teacher" if role == "teacher" and section.method.name == "ce" else section.method.name
    return {
        "method": f"{section.expert}-shot expert" if section.expert else plain,
        "classes": inputs.training_set.classes,
        "class_counts": inputs.training_set.class_counts.tolist(),
        "image_size": inputs.images.crop_size,
        "dataset": inputs.training_set.fingerprint,
        "test_dataset": inputs.test_set.fingerprint,
        "validation_dataset": inputs.validation_set.fingerprint if inputs.validation_set is not None else None,
        "teacher": inputs.cache and inputs.cache.identity.teacher,
        "backbone": inputs.backbone and runs.experiment_of(inputs.backbone),
    }
