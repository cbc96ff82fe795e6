"""Recipe: write a teacher's tempered probabilities for every view of every training sample into a cache."""

import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from offline_bkd.cache import (
    Cache,
    CacheError,
    CacheWriter,
    CropFlip,
    RandomResizedCrop,
    create_cache,
    open_cache,
    philox,
)
from offline_bkd.cache.features import check as check_features
from offline_bkd.cache.parts import VIEWS_TOGETHER
from offline_bkd.cache.pieces import one_blas_thread
from offline_bkd.cache.storage import RemoteStorage, open_storage
from offline_bkd.cache.writer import refuse_taken
from offline_bkd.pipeline import UserError, runs, torchrun
from offline_bkd.pipeline.config import explain
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.dataset import Dataset
from offline_bkd.pipeline.data.images import ImageSource, open_images
from offline_bkd.pipeline.device import repeatable
from offline_bkd.pipeline.evaluate import refuse_size
from offline_bkd.pipeline.requirements import is_there
from offline_bkd.pipeline.schema import CacheSection, Experiment
from offline_bkd.pipeline.show.progress import Progress
from offline_bkd.pipeline.show.terminal import counted
from offline_bkd.pipeline.teachers import Teachers, average, computed, identity, load_teachers, notes_on_teachers, tempered

FIT_SAMPLES = 4096  # that a codebook is fitted to: a few thousand rows settle a covariance of a hundred directions
GROUP_BYTES = 1 << 30  # of probabilities that wait in memory so that one decode of an image serves several views
Blocks = Sequence[tuple[int, int]]  # (view, block)


def dump_logits(
    config: Experiment,
    teachers: Sequence[str],
    out: str,
    device: torch.device,
    resume: bool = False,
    apart: bool = False,
    part: tuple[int, int] | None = None,
    blocks: Blocks | None = None,
) -> None:
    """Runs the teachers of the folders `teachers` over all views and writes their average's cache to `out`.

    Experts' average holds each one's probabilities of its own classes, at an equal share of the row: no class has two.
    With `apart` there is a cache for each, named as its folder, in the folder `out`: one decode of an image serves all.
    What is already committed is kept with `resume`. Under torchrun, processes share the blocks.

    part: (number from 1, count): only this part of the work; blocks: only these (view, block), such as a list of
    `open_cache(out).parts(count)`. Other processes may write the others, before, meanwhile or later, in any order: who comes
    first creates the store, and its bytes are those of one process. What is there is kept.
    """
    share, resume = _share(part, blocks), resume or part is not None or blocks is not None
    asked = prepare_dump(config, teachers, out, device, resume, apart)
    for note in asked.notes if torchrun.rank() == 0 else ():
        print(f"note: {note}", flush=True)
    asked.networks.to(device)
    write_stores(asked, config.views, config.cache, resume, share)


class Store(NamedTuple):
    """A store that a dump writes."""

    path: str
    teacher: dict  # the identity of those whose answers it holds
    features: dict[str, int]  # the width of each teacher's features, by its name
    members: list[int]  # which of the teachers its answers are the average of


class Prepared(NamedTuple):
    """Whom a dump asks about what, and where the answers go."""

    training_set: Dataset
    images: ImageSource
    networks: Teachers
    names: list[str]  # of the teachers
    stores: list[Store]
    notes: list[str]  # on what is allowed, but perhaps not meant


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


def dump(
    network: Callable[[torch.Tensor], torch.Tensor],
    data: Experiment | Dataset,
    views: CropFlip | RandomResizedCrop,
    out: str,
    *,
    temperature: float = 2.0,
    encoding: dict | None = None,
    teacher: str | None = None,
    batch_size: int = 512,
    device: str | torch.device | None = None,
    workers: int = 2,
    resume: bool = False,
    blocks: Blocks | None = None,
) -> None:
    """Writes the answers of any network to all `views` of a training set into the store `out`.

    network: an nn.Module, or any callable, from uint8 images [B, 3, S, S] to logits [B, C]; it normalises them itself.
    data: an experiment, whose training part is meant, or a part of a data set.  encoding: as in `cache.encoding`; None: the
    default.  teacher: says whose answers they are, beside the digest of a module's weights, or where there are none.
    blocks: only these (view, block), while other processes write others; whoever comes first creates the store (see
    `dump_logits`).  device: where the network runs meanwhile; None: where it is. Afterwards it is where it was, and in the
    mode that it was in.

    Raises UserError where the network cannot be told from another or does not answer logits, and for settings that make no
    sense, CacheError where the store cannot be written.
    """
    if not teacher and not (isinstance(network, torch.nn.Module) and network.state_dict()):
        raise UserError('a network without weights of its own has no digest; say whose answers they are with teacher="…"')
    training_set = datasets.load(data.data).training if isinstance(data, Experiment) else data
    if not (isinstance(training_set, Dataset) and isinstance(views, CropFlip | RandomResizedCrop)):
        found = f"{type(training_set).__name__} and {type(views).__name__}"
        raise UserError(f"dump takes the data and the views of an experiment, found {found}; see config.load_config")
    settings = {"temperature": temperature, "batch_size": batch_size} | ({"encoding": encoding} if encoding else {})
    try:
        section = CacheSection(**settings)
    except ValidationError as error:
        raise UserError("; ".join(f"{key}: {message}" for key, message in explain(error, CacheSection))) from None
    module = network if isinstance(network, torch.nn.Module) else _Called(network)
    digest = runs.digest(module.state_dict())  # with a name, of both: neither may change between two parts of a dump
    if teacher:
        digest = hashlib.sha256(f"{digest}\n{teacher}".encode()).hexdigest()
    store = Store(os.fspath(out), {"digest": digest, **({"name": teacher} if teacher else {})}, {}, [0])
    share = _share(None, blocks)
    with _lent(module, device) as device:
        images = open_images(training_set, views, device, workers)
        _refuse_answers(module, images, len(training_set.classes))
        asked = Prepared(training_set, images, Teachers([module], features=False), ["network"], [store], [])
        write_stores(asked, views, section, resume or blocks is not None, share)


@contextmanager
def _lent(module: torch.nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The module in evaluation mode on `device`, or where it is, for as long as the context lasts; gives the device."""
    training = {part: part.training for part in module.modules()}
    home = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
    away = home if device is None else torch.device(device)
    try:
        module.eval().to(away)
        with repeatable():
            yield away
    finally:
        module.to(home)
        for part, mode in training.items():
            part.training = mode


def _refuse_answers(network: torch.nn.Module, images: ImageSource, classes: int) -> None:
    """Raises UserError where the answers to a few images are not logits of `classes`."""
    rows = np.arange(min(8, len(images.label)))
    (batch,) = images.batches(rows, np.zeros_like(rows), len(rows))
    with torch.no_grad():
        logits = network(batch.images)
    if not isinstance(logits, torch.Tensor) or logits.shape != (len(rows), classes):
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"the network answers {len(rows)} images by {found}, not by logits [{len(rows)}, {classes}]; wrap it")
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise UserError("the network answers probabilities, not logits; leave out its softmax, or give their logarithms")


class _Called(torch.nn.Module):
    """A callable as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.function(images)


class Share(NamedTuple):
    """The (view, block) that one of several processes writes; `choose` picks them from the open cache."""

    choose: Callable[[Cache], Blocks]
    name: str
    part: int = 1
    rank: int = 0  # of the processes that torchrun started for the part

    def waits(self, path: str) -> bool:
        """Whether another process is to create the store at `path`. Where nothing is locked, part 1 is."""
        return self.rank > 0 or (self.part > 1 and isinstance(open_storage(path), RemoteStorage))


def _share(part: tuple[int, int] | None, blocks: Blocks | None) -> Share | None:
    """None: everything. Each part is shared by torchrun's processes, if there are several."""
    rank, world = torchrun.rank(), torchrun.world()
    if blocks is not None:
        if part or world > 1:
            raise UserError("blocks are for this process alone; give no part, and start it without torchrun")
        return Share(lambda cache: blocks, counted(len(blocks), "block"))
    if part is None and world == 1:
        return None
    number, count = part or (1, 1)
    if not 1 <= number <= count:
        raise UserError(f"part {number}/{count}: parts are 1/{count} to {count}/{count}")
    place, places = (number - 1) * world + rank, count * world
    return Share(lambda cache: cache.parts(places)[place], f"part {place + 1}/{places}", number, rank)


def write_stores(
    asked: Prepared, views: CropFlip | RandomResizedCrop, section: CacheSection, resume: bool, share: Share | None = None
) -> None:
    """Writes the answers to `views` into the stores, as far as they lack them. All of it, or this process's `share`."""
    training_set, images, stores = asked.training_set, asked.images, asked.stores

    def answers(rows: np.ndarray, views: list[int], stores: list[Store] = stores) -> list[Answers]:
        """For each store, of `rows` [M] under each of `views`. A sample's views come together, to share its decoding."""

        def by_view(values: torch.Tensor) -> np.ndarray:
            return values.reshape(len(rows), len(views), -1).transpose(0, 1).cpu().numpy()

        answered, vectors = tempered(asked.networks, images, rows.repeat(len(views)), np.tile(views, len(rows)), section)
        named = {name: by_view(vector) for name, vector in zip(asked.names, vectors)}
        return [
            Answers(by_view(answered[:, store.members].mean(1)), {name: named[name] for name in store.features})
            for store in stores
        ]

    chosen = philox.permutation(0, philox.FIT, training_set.sample_id)[:FIT_SAMPLES]

    @functools.cache  # all stores are fitted to the same
    def fitting(*views: int) -> list[Answers]:
        return answers(chosen, list(views))

    with ExitStack() as stack:
        writers = []
        for number, store in enumerate(stores):
            if share and share.waits(store.path):
                _wait_for(store.path, math.inf if share.rank else 600)  # torchrun ends all where the first one ends
            writer = create_cache(
                store.path,
                resume=resume or (share is not None and share.rank > 0),
                joint=share is not None,
                identity=identity(training_set, section.temperature, views, store.teacher, computed(section, images.device)),
                sample_id=training_set.sample_id,
                label=training_set.label,
                image_size=images.image_size,
                encoding=section.encoding.model_dump(),
                fit=lambda views, number=number: fitting(*views)[number].probability,
                features=store.features,
            )
            if share:
                writer.take(share.choose(writer.cache))
            for note in writer.notes:
                print(f"note: {store.path} was begun otherwise, {note}; answers may differ in their last bits", flush=True)
            if writer.lost:
                blocks = counted(writer.lost, "block")
                print(f"note: {store.path}: {blocks} had lost files, or parts of them, and will be dumped again", flush=True)
            writers.append(stack.enter_context(writer))
        fitting.cache_clear()
        sizes = [writer.cache.layout.block_rows for writer in writers]
        for size in dict.fromkeys(sizes):  # stores of wider features may have smaller blocks
            alike = [number for number, other in enumerate(sizes) if other == size]
            some = [stores[number] for number in alike]
            write_pending(
                [writers[number] for number in alike], functools.partial(answers, stores=some), views.count, images.decodes
            )
        for store, writer in zip(stores, writers):
            if writer.exact:
                fact = f"its codebook does not fit {counted(writer.exact, 'block')}, stored without it"
                print(f"note: {store.path}: {fact}; if they are many, cache.encoding={{name: logit}} is smaller", flush=True)
    paths = ", ".join(store.path for store in stores)
    what = f", {share.name}" if share else ""
    print(f"{paths}: {counted(views.count, 'view')} of {counted(len(training_set), 'sample')}{what}", flush=True)


class Answers(NamedTuple):
    """What a store is to hold of M samples under V views."""

    probability: np.ndarray  # float32 [V, M, C], softened
    features: dict[str, np.ndarray]  # of each teacher, float32 [V, M, D]


def write_pending(
    writers: list[CacheWriter], answers: Callable[[np.ndarray, list[int]], list[Answers]], views: int, decodes: bool
) -> None:
    """Asks for the answers of every block that a writer lacks, and writes them while the next are computed.

    All writers' blocks are of the same rows. Each gets the view that its others are stored as differences from before these.
    Where images are decoded, one decode serves a group of views. Groups do not depend on what is pending, so that the
    teacher sees the same batches, and the store gets the same bytes, whether or not the work was interrupted.
    """
    left = [dict.fromkeys(writer.pending()) for writer in writers]
    references = [writer.cache.encoding.reference for writer in writers]
    samples, classes = len(writers[0].cache), len(writers[0].cache.classes)
    owned = set().union(*(writer.owned for writer in writers))
    start, done = time.perf_counter(), 0
    with Progress("dumping", len(owned), len(owned) - len(set().union(*left)), "blocks", plain=True) as progress:
        # The teacher runs on all cores meanwhile; matrix products of the encoder's would take them from it.
        with one_blas_thread(), ThreadPoolExecutor(1) as writing:
            last = None
            while any(left):
                firsts = [(next(iter(items)), reference) for items, reference in zip(left, references) if items]
                view, block = next((first for first, reference in firsts if first[0] == reference), firsts[0][0])
                rows = np.arange(samples)[writers[0].rows(block)]
                size = VIEWS_TOGETHER if decodes else 1
                while size > 1 and size * len(writers) * len(rows) * classes * 4 > GROUP_BYTES:
                    size //= 2  # so that groups lie within the parts of a dump
                first = view // size * size
                group = range(first, min(first + size, views))
                answered = answers(rows, list(group))
                if last:
                    last.result()
                work, asked = [], {(member, block) for member in group if any((member, block) in items for items in left)}
                for writer, items, reference, found in zip(writers, left, references, answered):
                    if reference not in group and (reference, block) in items:
                        continue  # until that is there
                    for member in sorted(group, key=lambda member: member != reference):
                        if (member, block) in items:
                            del items[member, block]
                            work.append((writer, (member, block), found, member - first))
                last = writing.submit(_write, work)
                finished = [item for item in asked if not any(item in items for items in left)]
                done += len(rows) * len(finished)
                progress.advance(done / (time.perf_counter() - start), "views/s", len(finished))
            if last:
                last.result()


def _write(work: list[tuple[CacheWriter, tuple[int, int], Answers, int]]) -> None:
    for writer, (view, block), answers, place in work:
        writer.write(
            view, block, answers.probability[place], {name: vector[place] for name, vector in answers.features.items()}
        )


def _wait_for(path: str, seconds: float) -> None:
    """Until the first process has created the cache."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            open_cache(path)
            return
        except CacheError:
            time.sleep(0.5)
    raise RuntimeError(f"the first process, or part, has not created {path} in {seconds:.0f} s; start it")
