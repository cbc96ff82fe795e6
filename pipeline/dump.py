"""Recipe: write a teacher's tempered probabilities for every view of every training sample into a cache."""

import functools
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import PIL.features
import torch

from offline_bkd.cache import Cache, CacheError, CacheWriter, Identity, create_cache, open_cache, philox
from offline_bkd.cache.features import check as check_features
from offline_bkd.cache.pieces import one_blas_thread
from offline_bkd.pipeline import UserError, metrics, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.evaluate import infer, load_model
from offline_bkd.pipeline.models import classifier
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.show.progress import Progress

FIT_SAMPLES = 4096  # that a codebook is fitted to: a few thousand rows settle a covariance of a hundred directions
GROUP_BYTES = 1 << 30  # of probabilities that wait in memory so that one decode of an image serves several views


def dump_logits(
    config: Experiment,
    teachers: Sequence[str],
    out: str,
    device: torch.device,
    resume: bool = False,
    apart: bool = False,
) -> None:
    """Runs the teachers of the folders `teachers` over all views and writes their average's cache to `out`.

    Experts' average holds each one's probabilities of its own classes, at an equal share of the row: no class has two.
    With `apart` there is a cache for each, named as its folder, in the folder `out`: one decode of an image serves all.
    What is already committed is kept with `resume`. Under torchrun, processes share the blocks.
    """
    training_set, _, _ = datasets.load(config.data)
    section = config.cache
    teacher, identities = load_teachers(teachers, training_set, section.features)
    if apart and "expert" in identities[0]:
        raise UserError("experts teach together, from one cache; leave out --apart")
    for note in notes_on_teachers(teachers, identities, training_set):
        print(f"note: {note}", flush=True)
    teacher.to(device)
    images = open_images(training_set, config.views, device, config.data.workers)
    names = [Path(folder).resolve().name for folder in teachers]
    if len(set(names)) < len(names) and (apart or section.features):
        raise UserError("teachers are kept apart by the names of their folders; give them different ones")
    widths = dict(zip(names, teacher.widths))
    try:
        check_features(widths)
    except ValueError as error:
        raise UserError(f"{error}; rename the teacher's folder, which the features are named after")
    paths = cache_paths(teachers, out, apart)
    if apart:
        features = [{name: width} for name, width in widths.items()] or [{}] * len(names)
    else:
        identities, features = [average(identities)], [widths]

    def answers(rows: np.ndarray, views: list[int]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """For each cache, of `rows` [M] under each of `views`: probabilities [len(views), M, C], features by teacher.

        A sample's views come together, so that they share its decoding.
        """

        def by_view(values: torch.Tensor) -> np.ndarray:
            return values.reshape(len(rows), len(views), -1).transpose(0, 1).cpu().numpy()

        found, vectors = tempered(teacher, images, rows.repeat(len(views)), np.tile(views, len(rows)), section)
        named = {name: by_view(vector) for name, vector in zip(names, vectors)}
        if not apart:
            return [(by_view(found.mean(1)), named)]
        return [(by_view(found[:, k]), {name: named[name] for name in features[k]}) for k in range(len(names))]

    chosen = philox.permutation(0, philox.SUBSET, training_set.sample_id)[:FIT_SAMPLES]

    @functools.cache  # all caches are fitted to the same
    def fitting(*views: int) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        return answers(chosen, list(views))

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with ExitStack() as stack:
        writers = []
        for number, (path, answers_of) in enumerate(zip(paths, identities)):
            if rank:
                _wait_for(path)
            writer = create_cache(
                path,
                resume=resume or rank > 0,
                identity=identity(training_set, section.temperature, config.views, answers_of, computed(section, device)),
                sample_id=training_set.sample_id,
                label=training_set.label,
                image_size=images.image_size,
                encoding=section.encoding.model_dump(),
                fit=lambda views, number=number: fitting(*views)[number][0],
                features=features[number],
                rank=rank,
                world=world,
            )
            for note in writer.notes:
                print(f"note: {path} was begun otherwise, {note}; answers may differ in their last bits", flush=True)
            writers.append(stack.enter_context(writer))
        fitting.cache_clear()
        write_pending(writers, answers, config.views.count, images.decodes)
    print(f"{', '.join(paths)}: {config.views.count} views of {len(training_set):,} samples", flush=True)


def write_pending(writers: list[CacheWriter], answers, views: int, decodes: bool) -> None:
    """Asks for the answers of every block that a writer lacks, and writes them while the next are computed.

    Where images are decoded, one decode serves a group of views. Groups do not depend on what is pending, so that the
    teacher sees the same batches, and the store gets the same bytes, whether or not the work was interrupted.
    """
    left = [dict.fromkeys(writer.pending()) for writer in writers]
    pending = dict.fromkeys(item for items in left for item in items)
    samples, classes, blocks = len(writers[0].cache), len(writers[0].cache.classes), writers[0].blocks
    start, done = time.perf_counter(), 0
    with Progress("dumping", views * blocks, views * blocks - len(pending), "blocks", plain=True) as progress:
        # The teacher runs on all cores meanwhile; threads of the encoder's own would take them from it.
        with one_blas_thread(), ThreadPoolExecutor(1) as writing:
            last = None
            while pending:
                view, block = next(iter(pending))
                rows = np.arange(samples)[writers[0].rows(block)]
                size = max(1, GROUP_BYTES // (len(writers) * len(rows) * classes * 4)) if decodes else 1
                first = view // size * size
                group = range(first, min(first + size, views))
                found = answers(rows, list(group))
                if last:
                    last.result()
                work = [
                    (writer, (member, block), found[number], member - first)
                    for number, writer in enumerate(writers)
                    for member in sorted(group, key=lambda member: member != view)  # the first pending comes first
                    if (member, block) in left[number]
                ]
                last = writing.submit(_write, work)
                finished = [(member, block) for member in group if (member, block) in pending]
                for item in finished:
                    del pending[item]
                done += len(rows) * len(finished)
                progress.advance(done / (time.perf_counter() - start), "views/s", len(finished))
            if last:
                last.result()


def _write(work: list) -> None:
    for writer, (view, block), (probability, features), place in work:
        writer.write(view, block, probability[place], {name: vector[place] for name, vector in features.items()})


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


def tempered(
    teacher: "Teachers", images, rows: np.ndarray, views: np.ndarray, section
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """softmax(z / T) of each of K teachers, float32 [M, K, C] on the device, of `rows` [M] under `views` [M].

    And each one's feature, float32 [M, D], of length one, if the teachers give them.
    """
    found = infer(teacher, images, rows, views, section.batch_size, section.precision)
    size = found.shape[1] - sum(teacher.widths)
    logits, *features = found.split([size, *teacher.widths], dim=1)
    logits = logits.reshape(len(rows), len(teacher.members), -1)
    return torch.softmax(logits / section.temperature, dim=2), [torch.nn.functional.normalize(one) for one in features]


def computed(section, device: torch.device) -> dict:
    """What the teacher's answers depend on beside teacher and data, for a cache's identity."""
    return {
        "precision": section.precision,
        "device": device.type,
        "environment": {
            "device": runs.device_name(device),
            "torch": torch.__version__,
            "decoder": f"Pillow {PIL.__version__}, libjpeg {PIL.features.version('jpg')}",
            "batch_size": section.batch_size,
        },
    }


def identity(
    training_set: datasets.Dataset, temperature: float, views, teacher: dict, computed: dict | None = None
) -> Identity:
    """Whose answers to what: the identity of a cache of `teacher` for `training_set`."""
    return Identity(
        classes=training_set.classes,
        temperature=temperature,
        views=views,
        dataset=training_set.fingerprint,
        teacher=teacher,
        computed=computed or {},
    )


def refuse_other(cache: Cache, path: str, training_set: datasets.Dataset, temperature: float, views, teacher: dict) -> None:
    """Raises CacheError with every difference if the cache at `path` is not the one that these arguments describe."""
    if differences := cache.identity.differences(identity(training_set, temperature, views, teacher)):
        raise CacheError(f"{path} is not for this run: " + "; ".join(differences))


class Teachers(torch.nn.Module):
    """K teachers that see the same images: their logits, and if asked their features, side by side, [B, K C + sum D]."""

    def __init__(self, members: list[torch.nn.Module], features: bool):
        super().__init__()
        self.members, self.seen = torch.nn.ModuleList(members), []
        self.widths = [classifier(member).weight.shape[1] for member in members] if features else []
        if features:
            for member in members:
                classifier(member).register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0].float()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.clear()
        return torch.cat([*[member(images) for member in self.members], *self.seen], dim=1)


def load_teachers(
    folders: Sequence[str], training_set: datasets.Dataset, features: bool = False
) -> tuple[Teachers, list[dict]]:
    """The teachers of `folders`, and what a cache keeps of each one's identity."""
    members, identities = zip(*(load_teacher(folder, training_set) for folder in folders))
    for folder, identity in zip(folders, identities):
        if features and identity["model"]["memory"]:
            raise UserError(
                f"the network in {folder} has a memory before its classifier, and no features that a student could learn; "
                "leave out cache.features"
            )
    digests = [one["digest"] for one in identities]
    if repeated := [folder for number, folder in enumerate(folders) if digests[number] in digests[:number]]:
        raise UserError(f"the teacher in {repeated[0]} is given twice; name different teachers")
    _refuse_unfit(members, identities, training_set)
    return Teachers(list(members), features).eval(), list(identities)


def notes_on_teachers(folders: Sequence[str], identities: list[dict], training_set: datasets.Dataset) -> list[str]:
    """What is allowed, but perhaps not meant."""
    notes = [
        f"the teacher in {folder} was trained elsewhere; whether on other images than it is asked about is not known"
        for folder, one in zip(folders, identities)
        if "source" in one
    ]
    return notes + [
        f"the teacher in {folder} was trained on other images ({one['dataset']['size']}) "
        f"than it is asked about ({training_set.fingerprint['size']})"
        for folder, one in zip(folders, identities)
        if "expert" not in one and one["dataset"] != training_set.fingerprint
    ]


def cache_paths(teachers: Sequence[str], out: str, apart: bool) -> list[str]:
    """Where the caches of a dump go. `out` may be a URL."""
    return [f"{out.rstrip('/')}/{Path(folder).resolve().name}.zarr" for folder in teachers] if apart else [out]


def average(identities: list[dict]) -> dict:
    """What a cache keeps of the identity of several teachers' average; one teacher is itself."""
    if len(identities) == 1:
        return identities[0]
    digests = "\n".join(one["digest"] for one in identities)
    kind = "experts" if "expert" in identities[0] else "average_of"
    return {"digest": hashlib.sha256(digests.encode()).hexdigest(), kind: identities}


def _refuse_unfit(members: Sequence[torch.nn.Module], identities: Sequence[dict], training_set: datasets.Dataset) -> None:
    """Raises UserError for experts that do not have every class once between them, or that stand beside other teachers."""
    experts = [member.members.numpy() for member in members if member.members is not None]
    if not experts:
        return
    if len(experts) < len(members):
        raise UserError("experts and teachers of all classes cannot share a cache; name the ones or the others")
    for shot, group in metrics.shot_groups(training_set.class_counts).items():
        if (np.sum(experts, axis=0)[group] != 1).any():
            named = ", ".join(one["expert"] for one in identities)
            raise UserError(
                f"every {shot}-shot class of {training_set.name} needs one expert that was trained on it; found experts of "
                f"{named}; name one of each shot group (teacher.expert), trained on these data"
            )
    for members, one in zip(experts, identities):
        if one["dataset"] != training_set.take(np.flatnonzero(members[training_set.label])).fingerprint:
            raise UserError(
                f"the {one['expert']}-shot expert was trained on other images than {training_set.name} has; train it on these"
            )


def load_teacher(folder: str, training_set: datasets.Dataset) -> tuple[torch.nn.Module, dict]:
    """The last checkpoint of any complete run, on the CPU in evaluation mode, and what a cache keeps of its identity.

    Raises UserError if the run is not complete, or its network answers for other classes.
    """
    run = runs.open_run(folder)
    summary, trained = run.summary(), run.config()
    section = trained.network(run.stage)
    if tuple(summary["classes"]) != training_set.classes:
        raise UserError(
            f"the network in {folder} knows other classes than {training_set.name}; use the data it was trained on"
        )
    model = load_model(run, "last", trained, len(training_set.classes))
    answers_of = {
        "digest": summary["digest"],
        "method": section.method.name,
        "model": section.model.model_dump(mode="json"),
        "seed": trained.seed,
        "epochs": section.training.epochs,
        "data": trained.data.name,
        "dataset": summary["dataset"],
        "test": summary["last"],
    }
    if "source" in summary:  # trained elsewhere, by what and for how long nobody says
        answers_of |= {"method": summary["method"], "epochs": None, "source": summary["source"]}
    if section.expert:
        answers_of["expert"] = section.expert
    return model, answers_of
