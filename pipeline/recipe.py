"""What training a teacher and training a student have in common: from a configuration to a complete run."""

import copy
from collections.abc import Generator
from functools import partial
from typing import NamedTuple

import torch

from offline_bkd.cache import Cache
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.color_jitter import ColorJitter
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.evaluate import evaluate, load_model
from offline_bkd.pipeline.models import build_model, classifier_name, new_parts
from offline_bkd.pipeline.schema import Experiment, Network, Training
from offline_bkd.pipeline.show.report import draw_run
from offline_bkd.pipeline.training.engine import Task, train_in_steps
from offline_bkd.pipeline.training.methods import Setting, build_method
from offline_bkd.pipeline.training.targets import Targets


class Data(NamedTuple):
    """What networks that are trained at once can share."""

    training_set: datasets.Dataset
    test_set: datasets.Dataset
    images: object  # sources of pipeline.data.images
    test_images: object
    cache: Cache | None  # a complete one for the training set, where the method learns from one
    targets: Targets | None


def open_data(
    config: Experiment,
    sets: tuple[datasets.Dataset, datasets.Dataset],
    device: torch.device,
    cache: Cache | None = None,
    features: bool = False,
) -> Data:
    """The training and the test part, and what `cache` holds for the first: its probabilities or its features."""
    images = (open_images(part, config.views, device, config.data.workers) for part in sets)
    return Data(*sets, *images, cache, cache and Targets(cache, device, features))


def train_network(
    config: Experiment,
    stage: str,
    method,
    data: Data,
    out: str,
    device: torch.device,
    resume: bool,
    backbone: runs.Run | None = None,
    label: str = "",
) -> Generator[None, None, None]:
    """Trains the network of `stage` ("teacher" or "student") by `method` into the folder `out`, and draws its pictures.

    Pauses when the folder is its own, and after every step. `backbone`: a complete run, where the method learns from one.
    `label` goes before what is printed.
    """
    training_set, test_set, images, test_images, cache, targets = data
    section = getattr(config, stage)
    refuse_device(section.training, stage, device)
    expert = config.expert(stage)
    members = torch.from_numpy(training_set.class_counts > 0) if expert else None
    classes = len(training_set.classes)
    model = build_model(
        section.model, classes, config.data, config.seed, images.crop_size, members, section.training.channels_last
    ).to(device)
    trained = backbone and take_backbone(model, section.model, backbone, training_set).to(device)
    setting = Setting(
        model=model,
        sample_id=training_set.sample_id,
        label=training_set.label,
        class_counts=training_set.class_counts,
        targets=targets,
        backbone=trained,
        images=images,
        epochs=section.training.epochs,
        seed=config.seed,
        device=device,
    )
    network, rows, loss = build_method(method, setting)
    if stage == "teacher" and section.color_jitter:
        network = ColorJitter(network)
    refuse_unfit(network, images, len(rows(0)), section.training.batch_size)
    learns_from = cache.digest if cache else backbone and backbone.summary()["digest"]
    with runs.start_run(out, config, stage, device, resume, learns_from, label) as run:
        yield
        if not run.has("log.txt"):
            for note in notes_on_training(method, section.training, cache):
                run.log(f"note: {note}")
        task = Task(
            model=model,
            network=network,
            images=images,
            sample_id=training_set.sample_id,
            views=config.views,
            rows=rows,
            loss=loss,
            prepare=lambda views, later: targets and targets.prepare(views, later),
            evaluate=partial(
                evaluate,
                images=test_images,
                class_counts=training_set.class_counts,
                precision=section.training.precision,
            ),
            training=section.training,
            seed=config.seed,
        )
        about = {
            "method": f"{expert}-shot expert" if expert else "teacher" if stage == "teacher" else method.name,
            "classes": training_set.classes,
            "class_counts": training_set.class_counts.tolist(),
            "image_size": images.crop_size,
            "dataset": training_set.fingerprint,
            "test_dataset": test_set.fingerprint,
            "teacher": cache and cache.identity.teacher,
            "backbone": backbone and runs.experiment_of(backbone),
        }
        yield from train_in_steps(task, run, about)
        draw_run(run)


def notes_on_training(method, training: Training, cache: Cache | None) -> list[str]:
    """What is allowed, but perhaps not meant. `method`: a section of config.py, or None."""
    notes = []
    beyond = [str(epoch) for epoch in getattr(training.schedule, "milestones", ()) if epoch >= training.epochs]
    if beyond:
        notes.append(f"training.schedule.milestones {', '.join(beyond)} do not come in {training.epochs} epochs")
    if getattr(training.schedule, "warmup_epochs", 0) >= training.epochs:
        notes.append(
            f"training.schedule.warmup_epochs {training.schedule.warmup_epochs} do not end in {training.epochs} epochs"
        )
    if method and method.name == "cbd" and cache and (linear := _linear(cache)):
        notes.append(f"CBD's teachers have a cosine classifier (model.cosine_scale); linear is that of {linear}")
    return notes


def _linear(cache: Cache) -> str:
    """Names the teachers of `cache` whose classifier is a linear one."""
    teacher = cache.identity.teacher
    known = [one for one in teacher.get("average_of", [teacher]) if "model" in one]
    return ", ".join(
        f"the cache's {one['model']['name']} of seed {one['seed']}" for one in known if not one["model"]["cosine_scale"]
    )


def take_backbone(model: torch.nn.Module, section: Network, run: runs.Run, training_set: datasets.Dataset) -> torch.nn.Module:
    """Gives `model`, which `section` describes, the last weights of `run`, all but the classifier's.

    Returns the network that they are of.

    Raises UserError where they do not fit.
    """
    if expert := run.config().expert(run.stage):
        raise UserError(f"the run in {run.folder} is an expert of {expert}-shot classes; name one that knows all classes")
    if run.summary()["dataset"] != training_set.fingerprint or tuple(run.summary()["classes"]) != training_set.classes:
        raise UserError(
            f"the network in {run.folder} was trained on other data than this {training_set.name}; use the same data"
        )
    if (method := run.summary()["method"]) in ("oltr", "bbn"):
        raise UserError(
            f"the run in {run.folder} is of method {method}, whose network has parts that a backbone has not; "
            "name one of another method, such as a teacher's"
        )
    trained = load_model(run, "last", run.config(), len(training_set.classes))
    own, new = model.state_dict(), tuple(f"{name}." for name in new_parts(model))
    last = f"{classifier_name(trained)}."
    kept = {name: value for name, value in trained.state_dict().items() if not name.startswith(last)}
    wanted = {name for name in own if not name.startswith(new)}
    if kept.keys() != wanted or any(value.shape != own[name].shape for name, value in kept.items()):
        changed = runs.difference(_backbone(getattr(run.config(), run.stage).model), _backbone(section))
        raise UserError(f"the backbone in {run.folder} is another network than student.model: {changed}; give the same model")
    model.load_state_dict({**own, **kept})
    return trained


def _backbone(section: Network) -> dict:
    """The settings of a network that say what its backbone is."""
    return section.model_dump(exclude={"cosine_scale", "memory", "branches", "weights"})


def refuse_device(training: Training, stage: str, device: torch.device) -> None:
    """Raises UserError where the device cannot do what `training` asks for."""
    if training.compile == "cuda_graphs" and device.type != "cuda":
        raise UserError(f"{stage}.training.compile: cuda_graphs needs a CUDA device, found {device.type}; set true or false")


def refuse_unfit(network: torch.nn.Module, images, samples: int, batch_size: int) -> None:
    """Raises UserError if `network` cannot take the first or the last, perhaps smaller, batch of an epoch of `samples`."""
    for size in {min(batch_size, samples), samples % batch_size or min(batch_size, samples)}:
        tried = copy.deepcopy(network).train()  # batch statistics move
        (batch,) = images.batches(
            torch.arange(size).numpy() % len(images.label), torch.zeros(size, dtype=torch.int64).numpy(), size
        )
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = tried(batch.images)
        except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
            raise UserError(
                f"the network cannot train on {size} images of {tuple(batch.images.shape[2:])} pixels "
                f"({str(error).splitlines()[0]}); choose another model, views or batch_size"
            )
        shape = tuple((output[0] if isinstance(output, tuple) else output).shape)
        if len(shape) != 2:
            raise UserError(f"the network answers {shape}, not logits [batch, classes]; choose another model")
