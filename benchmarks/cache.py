"""What a view of a sample costs: bytes, error of the BKD target, and the rate of writing and of reading it.

    python benchmarks/cache.py                                    simulated teacher, 10,000 samples, 100 classes
    python benchmarks/cache.py --samples 115846 --classes 1000
    python benchmarks/cache.py --store STORE.zarr                 the answers in a store of encoding `probability`

Bytes a view are those of one more view; all that a store holds, over its few views here, are in the next column.
Every format holds the same answers and gives back the same thing: float32 probabilities [256, C] of random samples,
each sample once, from one view. Medians of `--repeats`, on one thread, all in one run; the rates of a machine mean
little, their ratios to the memmap's do. The formats of others are written here from their descriptions:

    TinyViT   one file of rows, top-K probabilities in float16 and classes in int16; the rest spread evenly
    FKD       one file a sample, top-K of all its views, pickled; renormalised
    per row   the same Zarr store, read row by row where others read planes
"""

import argparse
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr

sys.path[0] = str(Path(__file__).parents[1])  # this file has the name of the package that it measures

from cache import CropFlip, Identity, create_cache, open_cache  # noqa: E402
from cache.encodings import class_weight, softmax, total_variation  # noqa: E402

BATCH = 256


def simulated(samples, classes, views, rank=64, ratio=100):
    """Labels [N] of a long tail and probabilities [views, N, C] at T = 2, from features that move a little by view.

    The spectrum falls as that of a ResNet-20 trained on CIFAR-100-LT does.
    """
    rng = np.random.default_rng(0)
    share = ratio ** -(np.arange(classes) / (classes - 1))
    label = np.sort(rng.choice(classes, samples, p=share / share.sum()))
    head, _ = np.linalg.qr(rng.normal(size=(classes, min(rank, classes - 1))))
    spread = 6 * np.exp(-np.arange(head.shape[1]) / 9)
    feature = rng.normal(size=(samples, head.shape[1])) * spread
    pull = 0.25 * spread.sum() * head[label] / np.linalg.norm(head[label], axis=1, keepdims=True).clip(1e-9)
    moved = (feature + pull + 0.4 * spread * rng.normal(size=feature.shape) for _ in range(views))
    return label, np.stack([softmax((each @ head.T).astype(np.float32)) for each in moved])


def stored(path):
    cache = open_cache(path)
    return cache.label, np.stack([cache.plane(view) for view in range(min(cache.views.count, 4))])


class Ours:
    def __init__(self, name, encoding):
        self.name, self.encoding = name, encoding

    def write(self, folder, label, answers):
        views, samples, classes = answers.shape
        identity = Identity(
            classes=tuple(map(str, range(classes))),
            temperature=2.0,
            views=CropFlip(pad=(0, 1)[views > 2]),
            dataset={"name": "benchmark"},
            teacher={"digest": "benchmark"},
        )
        columns = {"sample_id": np.arange(samples), "label": label, "image_size": np.full((samples, 2), 32)}
        chosen = np.linspace(0, samples - 1, min(samples, 2048)).astype(int)

        def fit(numbers):
            return np.stack([answers[number % views][chosen] for number in range(len(numbers))])

        with create_cache(folder / "s", identity=identity, encoding=self.encoding, fit=fit, **columns) as writer:
            reference = writer.pending()[0][0]
            self.view_of = [reference, *(view for view in range(identity.views.count) if view != reference)][:views]
            for number, view in enumerate(self.view_of):
                for block in range(writer.blocks):
                    writer.write(view, block, answers[number][writer.rows(block)])

    def open(self, folder):
        self.cache = open_cache(folder / "s")

    def one_more(self, folder):
        return sum(path.stat().st_size for path in folder.glob(f"s/*/c.{self.view_of[-1]}.*"))

    def epoch(self, view, order):
        codes = self.cache.stored_plane(self.view_of[view])
        for start in range(0, len(order), BATCH):
            yield self.cache.encoding.decode(codes[order[start : start + BATCH]])


class PerRow(Ours):
    """The store of `Ours`, read as a data set of rows."""

    def epoch(self, view, order):
        array = zarr.open_array(self.cache._storage.root / "probability", mode="r")
        for start in range(0, min(len(order), 4 * BATCH), BATCH):  # the whole epoch would take minutes
            yield array.oindex[self.view_of[view], order[start : start + BATCH]].astype(np.float32)


class Memmap:
    name = "memmap, float16"

    def write(self, folder, label, answers):
        self.shape = answers.shape
        answers.astype(np.float16).tofile(folder / "values")

    def open(self, folder):
        self.values = np.memmap(folder / "values", np.float16, "r", shape=self.shape)

    def epoch(self, view, order):
        plane = np.array(self.values[view])
        for start in range(0, len(order), BATCH):
            yield plane[order[start : start + BATCH]].astype(np.float32)


class TinyViT:
    def __init__(self, top):
        self.name, self.top = f"TinyViT, top-{top}", top

    def write(self, folder, label, answers):
        self.shape, top = answers.shape, min(self.top, answers.shape[2] - 1)
        self.row = 4 + 4 * top  # a seed, then values and classes
        with open(folder / "values.bin", "wb") as file:
            for plane in answers:
                chosen = np.argpartition(-plane, top, 1)[:, :top]
                rows = np.zeros((len(plane), self.row), np.uint8)
                rows[:, 4 : 4 + 2 * top] = np.take_along_axis(plane, chosen, 1).astype(np.float16).view(np.uint8)
                rows[:, 4 + 2 * top :] = chosen.astype(np.int16).view(np.uint8)
                file.write(rows)

    def open(self, folder):
        self.file = open(folder / "values.bin", "rb")

    def epoch(self, view, order):
        _, samples, classes = self.shape
        top = (self.row - 4) // 4
        for start in range(0, len(order), BATCH):
            batch = []
            for sample in order[start : start + BATCH]:
                self.file.seek((view * samples + int(sample)) * self.row)
                data = self.file.read(self.row)
                value = np.frombuffer(data, np.float16, top, 4).astype(np.float32)
                p = np.full(classes, max(0, 1 - value.sum()) / (classes - top), np.float32)
                p[np.frombuffer(data, np.int16, top, 4 + 2 * top)] = value
                batch.append(p)
            yield np.stack(batch)


class FKD:
    def __init__(self, top):
        self.name, self.top = f"FKD, top-{top}", top

    def write(self, folder, label, answers):
        self.folder, self.shape = folder, answers.shape
        for sample in range(answers.shape[1]):
            p = answers[:, sample]
            chosen = np.argpartition(-p, self.top, 1)[:, : self.top]
            values = np.take_along_axis(p, chosen, 1).astype(np.float16)
            (folder / str(sample)).write_bytes(pickle.dumps((chosen.astype(np.int16), values)))

    def open(self, folder):
        self.folder = folder

    def epoch(self, view, order):
        for start in range(0, len(order), BATCH):
            batch = np.zeros((min(BATCH, len(order) - start), self.shape[2]), np.float32)
            for place, sample in enumerate(order[start : start + BATCH]):
                chosen, values = pickle.loads((self.folder / str(sample)).read_bytes())
                batch[place, chosen[view]] = values[view].astype(np.float32) / values[view].sum(dtype=np.float32)
            yield batch


def formats():
    half = {"name": "probability", "dtype": "float16"}
    yield Memmap()
    yield Ours("probability, float16", half)
    for bound in 0.01, 0.02, 0.03:
        yield Ours(f"klt, error ≤ {bound}", {"name": "klt", "max_error": bound})
    yield TinyViT(10)
    yield TinyViT(100)
    yield FKD(10)
    yield PerRow("probability, per row", half)


def measure(each, label, answers, repeats, scratch):
    """One format's row of the table."""
    views, samples, _ = answers.shape
    weight, order = class_weight(np.bincount(label, minlength=answers.shape[2])), None
    writing, reading, variation, divergence = [], [], [], []
    for repeat in range(repeats):
        folder = Path(tempfile.mkdtemp(dir=scratch))
        start = time.perf_counter()
        each.write(folder, label, answers)
        writing.append(views * samples / (time.perf_counter() - start))
        each.open(folder)
        order = np.random.default_rng(repeat).permutation(samples)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / views
        one_more = each.one_more(folder) if hasattr(each, "one_more") else size
        for view in range(views):
            start, count = time.perf_counter(), 0
            for batch in each.epoch(view, order):
                count += len(batch)
            reading.append(count / (time.perf_counter() - start))
        if repeat == 0:
            for place, batch in enumerate(each.epoch(views - 1, order)):
                exact = answers[-1][order[place * BATCH : (place + 1) * BATCH]]
                variation.append(total_variation(exact, batch, weight))
                divergence.append(kl(exact, batch, weight))
        shutil.rmtree(folder)
    return {
        "bytes": one_more / samples,
        "all": size / samples,
        "tv": np.concatenate(variation).mean(),
        "kl": np.concatenate(divergence).mean(),
        "write": statistics.median(writing),
        "read": statistics.median(reading),
    }


def kl(exact, rebuilt, weight):
    """KL(q ‖ q̃) of the BKD target, nats [B]; a class that was cut counts as 1e-12."""
    q, rebuilt = (p.astype(np.float64) * weight for p in (exact, rebuilt))
    q, rebuilt = (p / p.sum(1, keepdims=True) for p in (q, rebuilt))
    return (q * np.log(np.maximum(q, 1e-300) / np.maximum(rebuilt, 1e-12))).sum(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", help="a store of encoding `probability`, whose first views are used instead")
    parser.add_argument("--only", help="formats whose name has this in it")
    parser.add_argument("--scratch", help="a folder to write in")
    given = parser.parse_args()
    label, answers = stored(given.store) if given.store else simulated(given.samples, given.classes, given.views)
    print(
        f"{answers.shape[1]} samples, {answers.shape[2]} classes, {answers.shape[0]} views; {given.repeats} repeats\n"
    )
    columns = [
        "bytes / view",
        "all / views",
        "TV of q",
        "KL of q",
        "write, views/s",
        "read, views/s",
        "× memmap's time",
    ]
    print(f"| format | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    limit = None
    for each in formats():
        if given.only and given.only not in each.name and limit is not None:
            continue
        row = measure(each, label, answers, given.repeats, given.scratch)
        limit = limit or row["read"]
        sizes, errors = f"{row['bytes']:.1f} | {row['all']:.1f}", f"{row['tv']:.2g} | {row['kl']:.2g}"
        rates = f"{row['write']:,.0f} | {row['read']:,.0f} | {limit / row['read']:.2g}"
        print(f"| {each.name} | {sizes} | {errors} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
