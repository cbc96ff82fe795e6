"""Recipe: train students from a cache, with no teacher; or by a method that needs none, or another run's backbone."""

from collections.abc import Sequence
from pathlib import Path

import torch

from offline_bkd.cache import Cache, CacheError, open_cache
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.dump import refuse_other
from offline_bkd.pipeline.recipe import open_data, train_network
from offline_bkd.pipeline.schema import Experiment, Method
from offline_bkd.pipeline.training.engine import finish, in_turns


def train_student(
    config: Experiment,
    cache_path: str | None,
    out: str,
    device: torch.device,
    resume: bool = False,
    backbone: str | None = None,
    seeds: Sequence[int] = (),
) -> None:
    """Trains the student of `config` into the folder `out`, from the cache at `cache_path` or the run in `backbone`.

    With `seeds` a student of each is trained, all at once, into the folders `out`-<seed>: each as it would be alone, from
    one copy of images and targets.

    Raises CacheError before anything is written if the cache is for other data, views or classes, or is not complete.
    """
    if seeds and not Path(out).name:
        raise UserError(f"--out {out!r} is no name that seeds can be added to; name a folder")
    students = {f"{Path(out)}-{seed}": config.model_copy(update={"seed": seed}) for seed in seeds}
    for folder in students or (out,):
        runs.refuse_taken(folder, resume)
    method = config.student.method
    refuse_sources(method, cache_path, backbone)
    sets = datasets.load(config.data)
    cache = cache_path and open_matching_cache(cache_path, config, sets[0])
    data = open_data(config, sets, device, cache, features=method.learns_from == "features")
    trained = backbone and runs.open_run(backbone)
    if not seeds:
        return finish(train_network(config, "student", method, data, out, device, resume, trained))
    trainings = []
    # Those that were begun come first: what is refused of them is refused before others begin.
    for folder, one in sorted(students.items(), key=lambda student: not runs.begun(Path(student[0]))):
        own = data._replace(targets=data.targets and data.targets.beside())
        label = f"seed {one.seed}: "
        trainings.append(train_network(one, "student", method, own, folder, device, resume, trained, label))
    in_turns(trainings, device)


def refuse_sources(method: Method, cache_path: str | None, backbone: str | None) -> None:
    """Raises UserError where what `method` learns from is not given, or something else is."""
    for given, option, wanted in (
        (cache_path, "--cache", method.learns_from not in (None, "backbone")),
        (backbone, "--backbone", method.learns_from == "backbone"),
    ):
        if wanted and given is None:
            raise UserError(f"method {method.name} learns from a {option[2:]}; name one with {option}")
        if given is not None and not wanted:
            raise UserError(f"method {method.name} learns from no {option[2:]}; leave out {option}")


def open_matching_cache(path: str, config: Experiment, training_set: datasets.Dataset) -> Cache:
    """The complete cache at `path`. Raises CacheError with every difference if it is not for this experiment."""
    cache = open_cache(path)
    refuse_other(cache, path, training_set, config.cache.temperature, config.views, cache.identity.teacher)
    if missing := cache.missing_blocks:
        raise CacheError(f"{path} lacks {missing} blocks; finish it with dump-logits --resume")
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
