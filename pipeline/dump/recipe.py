"""Recipe: dump the answers of complete runs."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from offline_bkd.cache.features import check as check_features
from offline_bkd.cache.writer import refuse_taken
from offline_bkd.pipeline import UserError, runs, torchrun
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.dump.parts import Blocks, own_part
from offline_bkd.pipeline.dump.writing import Prepared, Store, write_stores
from offline_bkd.pipeline.evaluate import refuse_size
from offline_bkd.pipeline.requirements import is_there
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.teachers import Teachers, average, load_teachers, notes_on_teachers


def dump_logits(
    config: Experiment,
    teachers: Sequence[str],
    out: str,
    device: torch.device,
    *,
    apart: bool = False,
    part: tuple[int, int] | None = None,
    blocks: Blocks | None = None,
    resume: bool = False,
) -> None:
    """Runs the teachers of the folders `teachers` over all views and writes their average's cache to `out`.

    Experts' average holds each one's probabilities of its own classes, at an equal share of the row: no class has two.
    With `apart` there is a cache for each, named as its folder, in the folder `out`: one decode of an image serves all.
    What is already committed is kept with `resume`. Under torchrun, processes share the blocks.

    part: (number from 1, count): only this part of the work; blocks: only these (view, block), such as a list of
    `open_cache(out).parts(count)`. Other processes may write the others, before, meanwhile or later, in any order: who comes
    first creates the store, and its bytes are those of one process. What is there is kept.
    """
    own, resume = own_part(part, blocks), resume or part is not None or blocks is not None
    prepared = prepare_dump(config, teachers, out, device, resume, apart)
    for note in prepared.notes if torchrun.rank() == 0 else ():
        print(f"note: {note}", flush=True)
    prepared.networks.to(device)
    write_stores(prepared, config.views, config.cache, resume, own)


def prepare_dump(
    config: Experiment,
    teachers: Sequence[str],
    out: str,
    device: torch.device,
    resume: bool,
    apart: bool,
    tried: int | None = None,
) -> Prepared:
    """What `dump_logits` would begin with. Writes nothing.

    tried: as a dry run reads it: at most so many images, and nothing is downloaded; teachers may be yet to be made, and there
    are then no networks and no stores.  Raises UserError or CacheError for what cannot be dumped.
    """
    names = [Path(folder).resolve().name for folder in teachers]
    if len(set(names)) < len(names) and (apart or config.cache.features):
        raise UserError("teachers are kept apart by the names of their folders; give them different ones")
    try:
        check_features(dict.fromkeys(names, 1) if config.cache.features else {})
    except ValueError as error:
        raise UserError(f"{error}; rename the teacher's folder, which the features are named after")
    out = os.fspath(out)
    paths = [f"{out.rstrip('/')}/{name}.zarr" for name in names] if apart else [out]  # `out` may be a URL
    for path in paths if torchrun.rank() == 0 else ():
        refuse_taken(path, resume)
    training_set = datasets.load(config.data, download=tried is None).training
    networks, stores, notes = Teachers([], features=False), [], []
    made = teachers if tried is None or all(map(is_there, teachers)) else ()
    if made:
        networks, identities = load_teachers(teachers, training_set, config.cache.features)
        if apart and "expert" in identities[0]:
            raise UserError("experts teach together, from one cache; leave out --apart")
        notes = notes_on_teachers(teachers, identities, training_set, config)
        widths = dict(zip(names, networks.widths))
        if apart:
            features = [{name: width} for name, width in widths.items()] or [{}] * len(names)
            stores = [Store(*parts, [number]) for number, parts in enumerate(zip(paths, identities, features))]
        else:
            stores = [Store(paths[0], average(identities), widths, list(range(len(names))))]
    images = open_images(training_set, config.views, device, config.data.workers, tried)
    for folder in made:
        refuse_size(runs.open_run(folder), images.crop_size)
    return Prepared(training_set, images, networks, names, stores, notes)
