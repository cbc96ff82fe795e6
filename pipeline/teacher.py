"""Recipe: train a teacher on the long-tailed set with cross-entropy."""

from functools import partial

import torch

from pipeline import runs, samplers
from pipeline.config import Experiment
from pipeline.data import datasets
from pipeline.data.images import open_images
from pipeline.engine import Task, train
from pipeline.evaluate import evaluate
from pipeline.losses import cross_entropy
from pipeline.models import build_model
from pipeline.report import draw_run


def train_teacher(config: Experiment, out: str, device: torch.device, resume: bool = False) -> None:
    """Trains the teacher of `config` into the folder `out`."""
    training_set, test_set = datasets.load(config.data)
    images, test_images = (open_images(part, config.views, device, config.data.workers) for part in (training_set, test_set))
    model = build_model(config.teacher.model, len(training_set.classes), config.data, config.seed).to(device)
    run = runs.start_run(out, config, "teacher", device, resume)
    training = config.teacher.training
    task = Task(
        model=model,
        images=images,
        sample_id=training_set.sample_id,
        views=config.views,
        rows=partial(samplers.instance_balanced, config.seed, sample_id=training_set.sample_id),
        loss=lambda logits, batch, epoch: {"loss": cross_entropy(logits, batch.label)},
        prepare=lambda views, later: None,
        evaluate=partial(evaluate, images=test_images, class_counts=training_set.class_counts, precision=training.precision),
        training=training,
        seed=config.seed,
    )
    train(task, run, training_set, "teacher")
    draw_run(run)
