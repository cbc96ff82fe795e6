"""Ask a network about every view of every sample that stores lack, and write its answers meanwhile."""

import functools
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch

from offline_bkd.cache import CacheError, CacheWriter, CropFlip, RandomResizedCrop, create_cache, open_cache, philox
from offline_bkd.cache.parts import VIEWS_TOGETHER
from offline_bkd.cache.pieces import one_blas_thread
from offline_bkd.pipeline.data.dataset import Dataset
from offline_bkd.pipeline.data.images import ImageSource
from offline_bkd.pipeline.dump.parts import Part
from offline_bkd.pipeline.schema import CacheSection
from offline_bkd.pipeline.show.progress import Progress
from offline_bkd.pipeline.show.terminal import counted
from offline_bkd.pipeline.teachers import Teachers, computed, identity, tempered

FIT_SAMPLES = 4096  # that a codebook is fitted to: a few thousand rows settle a covariance of a hundred directions
QUIET = 60  # seconds of waiting for another process, after which it is said
GROUP_BYTES = 1 << 30  # of probabilities that wait in memory so that one decode of an image serves several views


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


def write_stores(
    prepared: Prepared, views: CropFlip | RandomResizedCrop, section: CacheSection, resume: bool, own: Part | None = None
) -> None:
    """Writes the answers to `views` into the stores, as far as they lack them. All of it, or this process's `own` part."""
    training_set, images, stores = prepared.training_set, prepared.images, prepared.stores

    def predict(rows: np.ndarray, views: list[int], stores: list[Store] = stores) -> list[Predictions]:
        """For each store, of `rows` [M] under each of `views`. A sample's views come together, to share its decoding."""

        def by_view(values: torch.Tensor) -> np.ndarray:
            return values.reshape(len(rows), len(views), -1).transpose(0, 1).cpu().numpy()

        answered, vectors = tempered(prepared.networks, images, rows.repeat(len(views)), np.tile(views, len(rows)), section)
        named = {name: by_view(vector) for name, vector in zip(prepared.names, vectors)}
        return [
            Predictions(by_view(answered[:, store.members].mean(1)), {name: named[name] for name in store.features})
            for store in stores
        ]

    chosen = philox.permutation(0, philox.FIT, training_set.sample_id)[:FIT_SAMPLES]

    @functools.cache  # all stores are fitted to the same
    def fitting(*views: int) -> list[Predictions]:
        return predict(chosen, list(views))

    with ExitStack() as stack:
        writers = []
        for number, store in enumerate(stores):
            if own and own.waits(store.path):
                _wait_for(store.path, math.inf if own.rank else 600)  # torchrun ends all where the first one ends
            writer = create_cache(
                store.path,
                resume=resume or (own is not None and own.rank > 0),
                joint=own is not None,
                identity=identity(training_set, section.temperature, views, store.teacher, computed(section, images.device)),
                sample_id=training_set.sample_id,
                label=training_set.label,
                image_size=images.image_size,
                encoding=section.encoding.model_dump(),
                fit=lambda views, number=number: fitting(*views)[number].probability,
                features=store.features,
            )
            if own:
                writer.take(own.choose(writer.cache))
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
                [writers[number] for number in alike], functools.partial(predict, stores=some), views.count, images.decodes
            )
        for store, writer in zip(stores, writers):
            if writer.exact:
                fact = f"its codebook does not fit {counted(writer.exact, 'block')}, stored without it"
                print(f"note: {store.path}: {fact}; if they are many, cache.encoding={{name: logit}} is smaller", flush=True)
    paths = ", ".join(store.path for store in stores)
    what = f", {own.name}" if own else ""
    print(f"{paths}: {counted(views.count, 'view')} of {counted(len(training_set), 'sample')}{what}", flush=True)


class Predictions(NamedTuple):
    """What a store is to hold of M samples under V views."""

    probability: np.ndarray  # float32 [V, M, C], softened
    features: dict[str, np.ndarray]  # of each teacher, float32 [V, M, D]


def write_pending(
    writers: list[CacheWriter], predict: Callable[[np.ndarray, list[int]], list[Predictions]], views: int, decodes: bool
) -> None:
    """Asks `predict` for every block that a writer lacks, and writes the answers while the next are computed.

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
                predicted = predict(rows, list(group))
                if last:
                    last.result()
                work, lacking = [], {(member, block) for member in group if any((member, block) in items for items in left)}
                for writer, items, reference, found in zip(writers, left, references, predicted):
                    if reference not in group and (reference, block) in items:
                        continue  # until that is there
                    for member in sorted(group, key=lambda member: member != reference):
                        if (member, block) in items:
                            del items[member, block]
                            work.append((writer, (member, block), found, member - first))
                last = writing.submit(_write, work)
                finished = [item for item in lacking if not any(item in items for items in left)]
                done += len(rows) * len(finished)
                progress.advance(done / (time.perf_counter() - start), "views/s", len(finished))
            if last:
                last.result()


def _write(work: list[tuple[CacheWriter, tuple[int, int], Predictions, int]]) -> None:
    for writer, (view, block), found, place in work:
        writer.write(view, block, found.probability[place], {name: vector[place] for name, vector in found.features.items()})


def _wait_for(path: str, seconds: float) -> None:
    """Until the first process has created the cache. After a while it says what it waits for, which may never come."""
    start, told = time.monotonic(), False
    while True:
        try:
            open_cache(path)
            return
        except CacheError as error:
            found = error
        waited = time.monotonic() - start
        if waited > seconds:
            raise RuntimeError(f"the first process, or part, has not created {path} in {seconds:.0f} s ({found}); start it")
        if waited > QUIET and not told:
            print(f"note: waiting for the first process, or part, to create the cache: {found}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.5)
