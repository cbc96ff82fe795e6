"""Recipe: write a teacher's tempered probabilities for every view of every training sample into a cache."""

import time

import numpy as np
import torch

from cache import Cache, CacheError, Identity, create_cache, resume_cache
from pipeline import UserError, runs
from pipeline.config import Experiment
from pipeline.data import datasets
from pipeline.data.images import open_images
from pipeline.evaluate import infer, load_model
from pipeline.progress import Progress


def dump_logits(config: Experiment, teacher_run: str, out: str, device: torch.device, resume: bool = False) -> None:
    """Runs the teacher of the folder `teacher_run` over all views and writes the cache `out`. Resumes block by block."""
    training_set, _ = datasets.load(config.data)
    teacher, answers_of = load_teacher(teacher_run, training_set)
    teacher.to(device)
    images = open_images(training_set, config.views, device, config.data.workers)
    section = config.cache
    make = resume_cache if resume else create_cache
    with make(
        out,
        identity=identity(training_set, section.temperature, config.views, answers_of),
        sample_id=training_set.sample_id,
        label=training_set.label,
        image_size=training_set.image_size,
        encoding=section.encoding.model_dump(),
    ) as writer:
        pending = writer.pending()
        total = config.views.count * writer.blocks
        done, start, count = total - len(pending), time.perf_counter(), 0
        with Progress("dumping", total, done, "blocks", plain=True) as progress:
            for view, block in pending:
                rows = np.arange(len(training_set))[writer.rows(block)]
                probability = tempered(teacher, images, rows, view, section)
                writer.write(view, block, probability.cpu().numpy())
                count += len(rows)
                progress.advance(count / (time.perf_counter() - start), "views/s")


def tempered(teacher: torch.nn.Module, images, rows: np.ndarray, view: int, section) -> torch.Tensor:
    """softmax(z / T), float32 [M, C], of `rows` [M] under `view`."""
    views = np.full(len(rows), view)
    logits = infer(teacher, images, rows, views, section.batch_size, section.precision)
    return torch.softmax(logits / section.temperature, dim=1)


def identity(training_set: datasets.Dataset, temperature: float, views, teacher: dict) -> Identity:
    """Whose answers to what: the identity of a cache of `teacher` for `training_set`."""
    return Identity(
        classes=training_set.classes,
        temperature=temperature,
        views=views,
        dataset=training_set.fingerprint,
        teacher=teacher,
    )


def refuse_other(cache: Cache, path: str, training_set: datasets.Dataset, temperature: float, views, teacher: dict) -> None:
    """Raises CacheError with every difference if the cache at `path` is not the one that these arguments describe."""
    if differences := cache.identity.differences(identity(training_set, temperature, views, teacher)):
        raise CacheError(f"{path} is not for this run: " + "; ".join(differences))


def load_teacher(folder: str, training_set: datasets.Dataset) -> tuple[torch.nn.Module, dict]:
    """The last checkpoint of a complete teacher's run, on the CPU in evaluation mode, and what a cache keeps of its identity.

    Raises UserError if the run is not complete, or the teacher answers for other classes.
    """
    run = runs.open_run(folder)
    if run.stage != "teacher":
        raise UserError(f"{folder} holds a student's run; name the --out of train-teacher")
    summary, trained = run.summary(), run.config()
    if tuple(summary["classes"]) != training_set.classes:
        raise UserError(f"the teacher in {folder} knows other classes than {training_set.name}; use the data it was trained on")
    model = load_model(run, "last", trained, len(training_set.classes))
    if runs.digest(model.state_dict()) != summary["digest"]:
        raise UserError(f"last.safetensors in {folder} is not the checkpoint its summary.json describes; train the teacher again")
    answers_of = {
        "digest": summary["digest"],
        "model": trained.teacher.model.model_dump(mode="json"),
        "seed": trained.seed,
        "epochs": trained.teacher.training.epochs,
        "dataset": summary["dataset"],
        "test": summary["last"],
    }
    return model, answers_of
