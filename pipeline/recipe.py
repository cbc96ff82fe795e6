"""What training a teacher and training a student have in common: from a configuration to a complete run."""

import copy
from functools import partial

import torch

from cache import Cache
from pipeline import UserError, runs, samplers
from pipeline.config import Experiment
from pipeline.data import datasets
from pipeline.data.images import open_images
from pipeline.engine import Task, train
from pipeline.evaluate import evaluate
from pipeline.methods import method_loss
from pipeline.models import build_model
from pipeline.report import draw_run
from pipeline.targets import Targets


def train_network(
    config: Experiment,
    stage: str,
    method,
    sets: tuple[datasets.Dataset, datasets.Dataset],
    cache: Cache | None,
    out: str,
    device: torch.device,
    resume: bool,
) -> None:
    """Trains the network of `stage` ("teacher" or "student") by `method` into the folder `out`, and draws its pictures.

    `sets`: the training and the test part. `cache`: a complete one for them, where the method learns from one.
    """
    training_set, test_set = sets
    section = getattr(config, stage)
    images, test_images = (open_images(part, config.views, device, config.data.workers) for part in sets)
    model = build_model(section.model, len(training_set.classes), config.data, config.seed).to(device)
    _refuse_unfit(model, images, section.training.batch_size)
    with runs.start_run(out, config, stage, device, resume, learns_from=cache and cache.digest) as run:
        targets = cache and Targets(cache, device)
        gather = targets and targets.gather
        task = Task(
            model=model,
            images=images,
            sample_id=training_set.sample_id,
            views=config.views,
            rows=partial(samplers.instance_balanced, config.seed, sample_id=training_set.sample_id),
            loss=method_loss(method, gather, config.cache.temperature, training_set.class_counts, device),
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
            "method": "teacher" if stage == "teacher" else method.name,
            "classes": training_set.classes,
            "class_counts": training_set.class_counts.tolist(),
            "dataset": training_set.fingerprint,
            "test_dataset": test_set.fingerprint,
            "teacher": cache and cache.identity.teacher,
        }
        train(task, run, about)
        draw_run(run)


def _refuse_unfit(model: torch.nn.Module, images, batch_size: int) -> None:
    """Raises UserError if the network cannot take the epoch's first or its last, perhaps smaller, batch."""
    samples = len(images.label)
    for size in {min(batch_size, samples), samples % batch_size or min(batch_size, samples)}:
        tried = copy.deepcopy(model).train()  # batch statistics move
        (batch,) = images.batches(torch.arange(size).numpy(), torch.zeros(size, dtype=torch.int64).numpy(), size)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                shape = tuple(tried(batch.images).shape)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the network cannot train on {size} images of {tuple(batch.images.shape[2:])} pixels "
                f"({str(error).splitlines()[0]}); choose another model, views or batch_size"
            )
        if len(shape) != 2:
            raise UserError(f"the network answers {shape}, not logits [batch, classes]; choose another model")
