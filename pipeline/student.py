"""Recipe: train a student from a cache, with no teacher."""

from functools import partial

import torch

from cache import Cache, CacheError, open_cache
from pipeline import UserError, runs, samplers
from pipeline.config import Experiment
from pipeline.data import datasets
from pipeline.data.images import open_images
from pipeline.dump import refuse_other
from pipeline.engine import Task, train
from pipeline.evaluate import evaluate
from pipeline.methods import method_loss, needs_cache
from pipeline.models import build_model
from pipeline.report import draw_run
from pipeline.targets import Targets


def train_student(config: Experiment, cache_path: str | None, out: str, device: torch.device, resume: bool = False) -> None:
    """Trains the student of `config` from the cache at `cache_path` into the folder `out`.

    Raises CacheError before anything is written if the cache is for other data, views or classes, or is not complete.
    """
    training_set, test_set = datasets.load(config.data)
    method = config.student.method
    cache = open_matching_cache(cache_path, config, training_set) if needs_cache(method) else None
    images, test_images = (open_images(part, config.views, device, config.data.workers) for part in (training_set, test_set))
    model = build_model(config.student.model, len(training_set.classes), config.data, config.seed).to(device)
    run = runs.start_run(out, config, "student", device, resume)
    training = config.student.training
    targets = cache and Targets(cache, device)
    task = Task(
        model=model,
        images=images,
        sample_id=training_set.sample_id,
        views=config.views,
        rows=partial(samplers.instance_balanced, config.seed, sample_id=training_set.sample_id),
        loss=method_loss(method, targets and targets.gather, config.cache.temperature, training_set.class_counts, device),
        prepare=lambda views, later: targets and targets.prepare(views, later),
        evaluate=partial(evaluate, images=test_images, class_counts=training_set.class_counts, precision=training.precision),
        training=training,
        seed=config.seed,
    )
    teacher = cache.identity.teacher if cache else None
    train(task, run, training_set, method.name, teacher=teacher)
    draw_run(run)


def open_matching_cache(path: str | None, config: Experiment, training_set: datasets.Dataset) -> Cache:
    """The complete cache at `path`. Raises CacheError with every difference if it is not for this experiment."""
    if path is None:
        raise UserError(f"method {config.student.method.name} learns from a cache; name one with --cache")
    cache = open_cache(path)
    refuse_other(cache, path, training_set, config.cache.temperature, config.views, cache.identity.teacher)
    if missing := len(cache.missing()):
        raise CacheError(f"{path} lacks {missing} blocks; finish it with dump-logits --resume")
    return cache
