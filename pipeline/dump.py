"""Recipe: write a teacher's tempered probabilities for every view of every training sample into a cache."""

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from cache import Cache, CacheError, CacheWriter, Identity, create_cache, open_cache, philox, resume_cache
from pipeline import UserError, runs
from pipeline.config import Experiment
from pipeline.data import datasets
from pipeline.data.images import open_images
from pipeline.evaluate import infer, load_model
from pipeline.progress import Progress

FIT_SAMPLES = 4096  # that a codebook is fitted to: a few thousand rows settle a covariance of a hundred directions
GROUP_BYTES = 1 << 30  # of probabilities that wait in memory so that one decode of an image serves several views


def dump_logits(config: Experiment, teachers: Sequence[str], out: str, device: torch.device, resume: bool = False) -> None:
    """Runs the teacher of the folder in `teachers`, or the average of several, over all views; writes the cache `out`.

    What is already committed there is kept with `resume`. Under torchrun, processes share the blocks.
    """
    training_set, _ = datasets.load(config.data)
    section = config.cache
    teacher, answers_of = load_teachers(teachers, training_set, section.temperature)
    teacher.to(device)
    images = open_images(training_set, config.views, device, config.data.workers)

    def answers(rows: np.ndarray, views: list[int]) -> np.ndarray:
        """Probabilities, float32 [len(views), M, C], of `rows` [M] under each of `views`, a sample's views together."""
        found = tempered(teacher, images, rows.repeat(len(views)), np.tile(views, len(rows)), section)
        return found.view(len(rows), len(views), -1).transpose(0, 1).cpu().numpy()

    chosen = philox.permutation(0, philox.SUBSET, training_set.sample_id)[:FIT_SAMPLES]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        _wait_for(out)
    make = resume_cache if resume or rank else create_cache
    with make(
        out,
        identity=identity(training_set, section.temperature, config.views, answers_of),
        sample_id=training_set.sample_id,
        label=training_set.label,
        image_size=training_set.image_size,
        encoding=section.encoding.model_dump(),
        fit=lambda views: answers(chosen, views),
        rank=rank,
        world=world,
    ) as writer:
        _write_pending(writer, answers, config.views.count, images.decodes)


def _write_pending(writer: CacheWriter, answers, views: int, decodes: bool) -> None:
    """Asks for the answers of every pending block and writes them while the next are computed.

    Where images are decoded, one decode serves a group of views. Groups do not depend on what is pending, so that the
    teacher sees the same batches, and the store gets the same bytes, whether or not the work was interrupted.
    """
    pending = writer.pending()
    left, rows = dict.fromkeys(pending), np.arange(len(writer.cache))
    start, done = time.perf_counter(), 0
    with Progress("dumping", views * writer.blocks, views * writer.blocks - len(pending), "blocks", plain=True) as progress, \
            ThreadPoolExecutor(1) as writing:
        last = None
        for view, block in pending:
            if (view, block) not in left:
                continue
            members = rows[writer.rows(block)]
            size = max(1, GROUP_BYTES // (len(members) * len(writer.cache.classes) * 4)) if decodes else 1
            first = view // size * size
            group = list(range(first, min(first + size, views)))
            probability = answers(members, group)
            if last:
                last.result()
            wanted = [(member, block) for member in sorted(group, key=lambda member: member != view) if (member, block) in left]
            last = writing.submit(_write_group, writer, wanted, probability, first)
            for item in wanted:
                del left[item]
            done += len(members) * len(wanted)
            progress.advance(done / (time.perf_counter() - start), "views/s", len(wanted))
        if last:
            last.result()


def _write_group(writer: CacheWriter, blocks: list[tuple[int, int]], probability: np.ndarray, first: int) -> None:
    for view, block in blocks:
        writer.write(view, block, probability[view - first])


def _wait_for(path: str, seconds: float = 600) -> None:
    """Until the first process has created the cache."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            open_cache(path)
            return
        except CacheError:
            time.sleep(0.5)
    raise RuntimeError(f"the first process has not created {path} in {seconds:.0f} s")


def tempered(teacher: torch.nn.Module, images, rows: np.ndarray, views: np.ndarray, section) -> torch.Tensor:
    """softmax(z / T), float32 [M, C] on the device, of `rows` [M] under `views` [M]."""
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


class Average(torch.nn.Module):
    """Several teachers as one: images to logits z, float32 [B, C], whose softmax(z / T) is the mean of theirs."""

    def __init__(self, members: list[torch.nn.Module], temperature: float):
        super().__init__()
        self.members, self.temperature = torch.nn.ModuleList(members), temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers = torch.stack([torch.softmax(member(images) / self.temperature, 1) for member in self.members])
        return self.temperature * answers.mean(0).log()


def load_teachers(folders: Sequence[str], training_set: datasets.Dataset, temperature: float) -> tuple[torch.nn.Module, dict]:
    """One teacher, or the average of several at T, and what a cache keeps of its identity."""
    loaded = [load_teacher(folder, training_set) for folder in folders]
    if len(loaded) == 1:
        return loaded[0]
    members, identities = zip(*loaded)
    digests = [one["digest"] for one in identities]
    if repeated := [folder for number, folder in enumerate(folders) if digests[number] in digests[:number]]:
        raise UserError(f"the teacher in {repeated[0]} is given twice; an average is of different teachers")
    whole = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Average(list(members), temperature).eval(), {"digest": whole, "average_of": list(identities)}


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
