"""Whose answers a cache holds: the networks of complete runs, alone, averaged or as experts, and what identifies them."""

import hashlib
from collections.abc import Sequence

import numpy as np
import PIL.features
import torch

from offline_bkd.cache import Cache, CacheError, Identity
from offline_bkd.cache.shots import shot_groups
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.decoding import DECODER
from offline_bkd.pipeline.data.images import ImageSource
from offline_bkd.pipeline.device import device_name
from offline_bkd.pipeline.evaluate import infer, load_model
from offline_bkd.pipeline.models import classifier
from offline_bkd.pipeline.schema import PIXELS, CacheSection, Experiment


class Teachers(torch.nn.Module):
    """K teachers that see the same images: their logits, and if asked their features, side by side, [B, K C + sum D]."""

    def __init__(self, members: list[torch.nn.Module], features: bool):
        super().__init__()
        self.members, self.seen = torch.nn.ModuleList(members), list[torch.Tensor]()
        self.widths = [int(classifier(member).get_parameter("weight").shape[1]) for member in members] if features else []
        if features:
            for member in members:
                classifier(member).register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0].float()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.clear()
        return torch.cat([*[member(images) for member in self.members], *self.seen], dim=1)


def tempered(
    teachers: Teachers, images: ImageSource, rows: np.ndarray, views: np.ndarray, section: CacheSection
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """softmax(z / T) of each of K teachers, float32 [M, K, C] on the device, of `rows` [M] under `views` [M].

    And each one's feature, float32 [M, D], of length one, if the teachers give them.
    """
    answers = infer(teachers, images, rows, views, section.batch_size, section.precision).float()  # of a network in half, too
    size = answers.shape[1] - sum(teachers.widths)
    logits, *features = answers.split([size, *teachers.widths], dim=1)
    logits = logits.reshape(len(rows), len(teachers.members), -1)
    return torch.softmax(logits / section.temperature, dim=2), [torch.nn.functional.normalize(one) for one in features]


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


def notes_on_teachers(
    folders: Sequence[str], identities: list[dict], training_set: datasets.Dataset, config: Experiment
) -> list[str]:
    """What is allowed, but perhaps not meant, of teachers whose answers are dumped by `config`."""
    notes = [
        f"the teacher in {folder} was trained elsewhere; whether on other images than it is asked about is not known"
        for folder, one in zip(folders, identities)
        if "source" in one
    ]
    notes += [
        f"the teacher in {folder} was trained on other images ({one['dataset']['size']}) "
        f"than it is asked about ({training_set.fingerprint['size']})"
        for folder, one in zip(folders, identities)
        if "expert" not in one and one["dataset"] != training_set.fingerprint
    ]
    if len(folders) == 1 and (changed := _changed(runs.open_run(folders[0]), config)):  # of several not all can be as it says
        notes.append(f"the teacher in {folders[0]} answers as it was trained, though {changed}")
    return notes


def _changed(run: runs.Run, config: Experiment) -> str | None:
    """What `config` says of the teacher of `run` that is not so of it, in words."""
    if run.stage != "teacher":
        return None
    was, is_now = (one.model_dump(mode="json", include={"teacher": True, "data": PIXELS}) for one in (run.config(), config))
    return runs.difference(was, is_now)


def average(identities: list[dict]) -> dict:
    """What a cache keeps of the identity of several teachers' average; one teacher is itself."""
    if len(identities) == 1:
        return identities[0]
    digests = "\n".join(one["digest"] for one in identities)
    kind = "experts" if "expert" in identities[0] else "average_of"
    return {"digest": hashlib.sha256(digests.encode()).hexdigest(), kind: identities}


def _refuse_unfit(members: Sequence[torch.nn.Module], identities: Sequence[dict], training_set: datasets.Dataset) -> None:
    """Raises UserError for experts that do not have every class once between them, or that stand beside other teachers."""
    experts = [member.get_buffer("members").numpy() for member in members if member.members is not None]
    if not experts:
        return
    if len(experts) < len(members):
        raise UserError("experts and teachers of all classes cannot share a cache; name the ones or the others")
    for shot, group in shot_groups(training_set.class_counts).items():
        if (np.sum(experts, axis=0)[group] != 1).any():
            named = ", ".join(one["expert"] for one in identities)
            raise UserError(
                f"every {shot}-shot class of {training_set.name} needs one expert that was trained on it; found experts of "
                f"{named}; name one of each shot group (teacher.expert), trained on these data"
            )
    for own, one in zip(experts, identities):
        if one["dataset"] != training_set.take(np.flatnonzero(own[training_set.label])).fingerprint:
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


def computed(section, device: torch.device) -> dict:
    """What the teacher's answers depend on beside teacher and data, for a cache's identity."""
    return {
        "precision": section.precision,
        "device": device.type,
        "environment": {
            "device": device_name(device),
            "torch": torch.__version__,
            "decoder": f"{DECODER} (Pillow {PIL.__version__}, libjpeg {PIL.features.version('jpg')})",
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
        as_dumped = "data (data.validation and data.seed too), views and cache.temperature"
        if all(line.startswith("teacher.") for line in differences):
            as_dumped = "the runs of the teachers"
        raise CacheError(
            f"{path} is not for this run: {'; '.join(differences)}; give {as_dumped} as they were when it was dumped, or dump "
            "again"
        )
