"""What an answer costs: bytes, error of the BKD target, and the rate of writing and of reading it.

    python benchmarks/cache.py --store STORE.zarr --out results

The answers are those in STORE, of encoding `logit` or `probability`; without it, a simulated teacher's for 10,000
samples of 100 classes. Everything is measured in one run on one thread, by the median of `--repeats`. The rates of a
machine mean little; their ratios to the memmap's do.

The first table holds formats side by side, over four views. All give back the same thing: float32 probabilities
[256, C] of random samples, each sample once, from one view. Bytes are those of one more view. The formats of others
are written here from their descriptions:

    TinyViT     one file of rows, top-K probabilities in float16 and classes in int16; the rest spread evenly
    FKD         one file a sample, top-K of all its views (hundreds; four here), by torch.save; renormalised.
                Bytes without the file's container, of one or two kilobytes
    DistillKit  Parquet, a list of bytes a row: top-128 classes in bits, 16 log-probabilities in float16, a polynomial
                of the rank for the others; the rest spread evenly. Simplified: one view a file, no residuals of the
                polynomial; read as a memory-mapped table, and decoded a batch at a time
    per row     the same Zarr store, read row by row where others read planes

The second table is of planes of ImageNet-LT's and iNaturalist 2018's size, of simulated teachers: reading a whole
plane, and decoding it in batches of 256, against a sequential memmap copy of the decoded bytes (for `probability`,
those of its float16). Memory is the most that opening the store, the plane, and reading and decoding it take.
"""

import argparse
import io
import pickle
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import zarr
from measuring import memory, save

from offline_bkd.cache import CropFlip, Identity, create_cache, open_cache
from offline_bkd.cache.klt import fit_views
from offline_bkd.cache.target import class_weight, softmax, total_variation

try:
    import torch
except ImportError:
    torch = None

BATCH = 256
HALF = {"name": "probability", "dtype": "float16"}
COLUMNS = {
    "bytes": ("bytes / answer", "{:.1f}"),
    "total_variation": ("TV of q", "{:.2g}"),
    "divergence": ("KL of q", "{:.2g}"),
    "written": ("write, answers/s", "{:,.0f}"),
    "read": ("read, answers/s", "{:,.0f}"),
    "of_memmap": ("× memmap's time", "{:.2g}"),
}
PLANE_COLUMNS = {
    "bytes": ("bytes / answer", "{:.1f}"),
    "total_variation": ("TV of q", "{:.2g}"),
    "write_us": ("write, µs/view", "{:.1f}"),
    "read_s": ("read plane, s", "{:.2f}"),
    "decode_s": ("decode, s", "{:.2f}"),
    "of_memmap": ("× memmap copy", "{:.2g}"),
    "memory_mb": ("memory, MB", "{:.0f}"),
}
PLANES = [
    ("ImageNet-LT", 115_846, 1000, HALF),
    ("ImageNet-LT", 115_846, 1000, {"name": "klt", "max_error": 0.02}),
    ("iNaturalist 2018", 437_513, 8142, {"name": "klt", "max_error": 0.02}),
]


class Simulated:
    """A teacher whose features move a little by view; the spectrum falls as a ResNet-20's on CIFAR-100-LT does."""

    def __init__(self, samples, classes, rank=64, ratio=100):
        rng = np.random.default_rng(0)
        share = ratio ** -(np.arange(classes) / (classes - 1))
        self.label = np.sort(rng.choice(classes, samples, p=share / share.sum()))
        head, _ = np.linalg.qr(rng.normal(size=(classes, min(rank, classes - 1))))
        self.spread = 6 * np.exp(-np.arange(head.shape[1]) / 9)
        feature = rng.normal(size=(samples, head.shape[1])) * self.spread
        towards = head / np.linalg.norm(head, axis=1, keepdims=True).clip(1e-9)
        self.feature = (feature + 0.25 * self.spread.sum() * towards[self.label]).astype(np.float32)
        self.head = head.T.astype(np.float32)

    def moved(self, view):
        noise = np.random.default_rng(1 + view).standard_normal(self.feature.shape, np.float32)
        return self.feature + noise * (0.4 * self.spread).astype(np.float32)

    def answers(self, views):
        """Probabilities at T = 2, float32 [views, N, C]."""
        return np.stack([softmax(self.moved(view) @ self.head) for view in range(views)])


def stored(path):
    """The labels [N] of a store, and its answers under the reference view and three far from it."""
    cache = open_cache(path)
    planes = np.stack([cache.plane(view) for view in fit_views(cache.views)])
    planes /= planes.sum(2, keepdims=True)
    return cache.label, planes


def arguments(label, classes, views):
    """What `create_cache` takes."""
    samples = len(label)
    return {
        "identity": Identity(
            classes=tuple(map(str, range(classes))),
            temperature=2.0,
            views=CropFlip(pad=(0, 1)[views > 2]),
            dataset={"name": "benchmark"},
            teacher={"digest": "benchmark"},
        ),
        "sample_id": np.arange(samples),
        "label": label,
        "image_size": np.full((samples, 2), 32),
    }


class Ours:
    def __init__(self, name, encoding):
        self.name, self.encoding = name, encoding

    def write(self, folder, label, answers):
        views, samples, classes = answers.shape
        given = arguments(label, classes, views)
        chosen = np.linspace(0, samples - 1, min(samples, 2048)).astype(int)

        def fit(numbers):
            return np.stack([answers[number % views][chosen] for number in range(len(numbers))])

        with create_cache(folder / "s", encoding=self.encoding, fit=fit, **given) as writer:
            reference = writer.pending()[0][0]
            others = (view for view in range(given["identity"].views.count) if view != reference)
            self.view_of = [reference, *others][:views]
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
            yield self.cache.held.decode(codes[order[start : start + BATCH]])


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
        self.name, self.top = f"FKD, top-{top}" + ("" if torch else " (pickle for want of torch)"), top

    def write(self, folder, label, answers):
        self.shape = answers.shape
        for sample in range(answers.shape[1]):
            p = answers[:, sample]
            chosen = np.argpartition(-p, self.top, 1)[:, : self.top]
            pair = chosen.astype(np.int16), np.take_along_axis(p, chosen, 1).astype(np.float16)
            if torch:
                torch.save([torch.from_numpy(part) for part in pair], folder / str(sample))
            else:
                (folder / str(sample)).write_bytes(pickle.dumps(pair))

    def open(self, folder):
        self.folder = folder

    def one_more(self, folder):
        return 4 * self.top * self.shape[1]

    def load(self, sample):
        data = (self.folder / str(sample)).read_bytes()
        return [part.numpy() for part in torch.load(io.BytesIO(data))] if torch else pickle.loads(data)

    def epoch(self, view, order):
        for start in range(0, len(order), BATCH):
            batch = np.zeros((min(BATCH, len(order) - start), self.shape[2]), np.float32)
            for place, sample in enumerate(order[start : start + BATCH]):
                chosen, values = self.load(sample)
                batch[place, chosen[view]] = values[view].astype(np.float32) / values[view].sum(dtype=np.float32)
            yield batch


class DistillKit:
    exact = 16

    def __init__(self, top):
        self.name, self.top = f"DistillKit, top-{top}", top

    def write(self, folder, label, answers):
        import pyarrow as pa
        from pyarrow import parquet

        self.shape, classes = answers.shape, answers.shape[2]
        self.kept, self.bits = min(self.top, classes), int(classes - 1).bit_length()
        # By rank r of a class beyond the exact ones: 1, √r, r, r², r³, r⁴.
        rank = np.linspace(0, 1, self.kept - self.exact)[:, None]
        self.terms = np.concatenate([np.sqrt(rank), rank ** np.arange(5)], 1)
        solve = np.linalg.pinv(self.terms)
        for view, plane in enumerate(answers):
            order = np.argsort(-plane, 1)[:, : self.kept]
            logs = np.log(np.maximum(np.take_along_axis(plane, order, 1), 1e-12))
            bits = (order[..., None] >> np.arange(self.bits)) & 1
            parts = [
                np.packbits(bits.astype(np.uint8).reshape(len(plane), -1), axis=1),
                logs[:, : self.exact].astype(np.float16).view(np.uint8),
                (logs[:, self.exact :] @ solve.T).astype(np.float32).view(np.uint8),
            ]
            rows = np.concatenate(parts, 1)
            starts = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
            column = pa.ListArray.from_arrays(starts, rows.reshape(-1))
            parquet.write_table(pa.table({"logprobs": column}), folder / f"{view}.parquet")

    def open(self, folder):
        self.folder = folder

    def epoch(self, view, order):
        from pyarrow import parquet

        classes, packed = self.shape[2], -(-self.kept * self.bits // 8)
        column = parquet.read_table(self.folder / f"{view}.parquet", memory_map=True)["logprobs"].combine_chunks()
        data = column.values.to_numpy().reshape(len(column), -1)
        for start in range(0, len(order), BATCH):
            rows = data[order[start : start + BATCH]]
            bits = np.unpackbits(rows[:, :packed], axis=1, count=self.kept * self.bits)
            chosen = bits.reshape(len(rows), self.kept, self.bits) @ (1 << np.arange(self.bits))
            coefficients = rows[:, packed + 2 * self.exact :].copy().view(np.float32)
            exact = rows[:, packed : packed + 2 * self.exact].copy().view(np.float16)
            value = np.exp(np.concatenate([exact, coefficients @ self.terms.T.astype(np.float32)], 1, dtype=np.float32))
            value /= np.maximum(1, value.sum(1, keepdims=True))
            rest = np.maximum(1 - value.sum(1, keepdims=True), 0) / max(1, classes - self.kept)
            batch = np.tile(rest, (1, classes))
            np.put_along_axis(batch, chosen, value, 1)
            yield batch


def formats():
    yield Memmap()
    yield Ours("logit, float16", {"name": "logit"})
    yield Ours("probability, float16", HALF)
    for bound in 0.01, 0.02, 0.03:
        yield Ours(f"klt, error ≤ {bound}", {"name": "klt", "max_error": bound})
    yield TinyViT(10)
    yield TinyViT(100)
    yield FKD(10)
    yield DistillKit(128)
    yield PerRow("probability, per row", HALF)


def measure(each, label, answers, repeats, scratch):
    """One format's row of the first table."""
    views, samples, classes = answers.shape
    weight = class_weight(np.bincount(label, minlength=classes))
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
        "name": each.name,
        "bytes": one_more / samples,
        "total_variation": float(np.concatenate(variation).mean()),
        "divergence": float(np.concatenate(divergence).mean()),
        "written": statistics.median(writing),
        "read": statistics.median(reading),
    }


def kl(exact, rebuilt, weight):
    """KL(q ‖ q̃) of the BKD target, nats [B]; a class that was cut counts as 1e-12."""
    q, rebuilt = (p.astype(np.float64) * weight for p in (exact, rebuilt))
    q, rebuilt = (p / p.sum(1, keepdims=True) for p in (q, rebuilt))
    return (q * np.log(np.maximum(q, 1e-300) / np.maximum(rebuilt, 1e-12))).sum(1)


def measure_plane(samples, classes, encoding, repeats, scratch):
    """One store's row of the second table: two views are written, the second is measured."""
    teacher, folder = Simulated(samples, classes), Path(tempfile.mkdtemp(dir=scratch))
    chosen, writing = np.linspace(0, samples - 1, 1024).astype(int), []

    def fit(numbers):
        return np.stack([softmax(teacher.moved(number)[chosen] @ teacher.head) for number in numbers])

    with create_cache(folder / "s", encoding=encoding, fit=fit, **arguments(teacher.label, classes, 2)) as writer:
        for view in 0, 1:
            feature = teacher.moved(view)
            for block in range(writer.blocks):
                probability = softmax(feature[writer.rows(block)] @ teacher.head)
                start = time.perf_counter()
                writer.write(view, block, probability)
                writing.append((time.perf_counter() - start) / len(probability))
    size = sum(path.stat().st_size for path in folder.glob("s/*/c.1.*"))
    before = memory(reset=True)
    cache = open_cache(folder / "s")
    error = cache.survey().error
    codes = cache.stored_plane(1)  # and the reference, which is then in memory
    rows = rows_at_once(classes * 4)
    batch = np.empty((min(rows, samples), classes), np.float32)
    cache.held.decode(codes[:rows], batch)
    used = memory() - before
    decoded = np.dtype(np.float32 if cache.decoder else codes.dtype)
    copying, reading, decoding = [], [], []
    for _ in range(repeats):  # in turns, as a machine with others on it changes its pace
        start = time.perf_counter()
        cache.stored_plane(1, codes)
        reading.append(time.perf_counter() - start)
        start = time.perf_counter()
        for first in range(0, samples if cache.decoder else 0, rows):
            some = codes[first : first + rows]
            cache.held.decode(some, batch[: len(some)])
        decoding.append(time.perf_counter() - start)
        copying.append(copied(samples, classes * decoded.itemsize, folder))
    shutil.rmtree(folder)
    read, decode, limit = (statistics.median(times) for times in (reading, decoding, copying))
    return {
        "samples": samples,
        "classes": classes,
        "encoding": encoding,
        "bytes": size / samples,
        "total_variation": error and error["mean"],
        "write_us": statistics.median(writing) * 1e6,
        "read_s": read,
        "decode_s": decode,
        "memmap_s": limit,
        "of_memmap": statistics.median((r + d) / c for r, d, c in zip(reading, decoding, copying, strict=True)),
        "memory_mb": used / 1e6,
    }


def rows_at_once(row_bytes):
    """How many rows are copied, or decoded, at a time: 64 MB of them."""
    return max(1, (64 << 20) // row_bytes)


def copied(samples, row_bytes, folder):
    """Seconds that copying `samples` rows from a memmap takes, 64 MB at a time into the same memory."""
    rows = rows_at_once(row_bytes)
    np.zeros((rows, row_bytes), np.uint8).tofile(folder / "copied")
    source = np.memmap(folder / "copied", np.uint8, "r", shape=(rows, row_bytes))
    target, found = np.array(source), []
    for _ in range(max(3, samples // rows)):
        start = time.perf_counter()
        np.copyto(target, source)
        found.append((time.perf_counter() - start) / rows)
    return statistics.median(found) * samples


def heading(title, columns):
    names = [name for name, _ in columns.values()]
    print(f"\n| {title} | {' | '.join(names)} |\n|---|{'--:|' * len(names)}", flush=True)


def line(name, row, columns):
    cells = ["–" if row[key] is None else form.format(row[key]) for key, (_, form) in columns.items()]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="a store of encoding `logit` or `probability`, whose answers the first table is of")
    parser.add_argument("--out", help="a folder for cache-cpu.json, the figures of both tables")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="rows whose name has this in it, after the memmap's")
    parser.add_argument("--scratch", help="a folder to write in")
    given = parser.parse_args()
    if given.store:
        label, answers = stored(given.store)
    else:
        teacher = Simulated(10_000, 100)
        label, answers = teacher.label, teacher.answers(4)
    views, samples, classes = answers.shape
    print(f"{samples} samples, {classes} classes, {views} views; {given.repeats} repeats")
    heading("format", COLUMNS)
    rows, planes = [], []
    for each in formats():
        if given.only and given.only not in each.name and rows:
            continue
        row = measure(each, label, answers, given.repeats, given.scratch)
        rows.append(row | {"of_memmap": (rows or [row])[0]["read"] / row["read"]})
        line(each.name, rows[-1], COLUMNS)
    heading("plane", PLANE_COLUMNS)
    for name, samples, classes, encoding in PLANES:
        title = f"{name}, {samples:,} × {classes:,}, {encoding['name']}"
        if not given.only or given.only in title:
            planes.append({"name": name} | measure_plane(samples, classes, encoding, given.repeats, given.scratch))
            line(title, planes[-1], PLANE_COLUMNS)
    if given.out:
        size = {"samples": len(label), "classes": answers.shape[2], "views": views}
        figures = {"answers": size, "formats": rows, "planes": planes}
        save(Path(given.out) / "cache-cpu.json", figures, "numpy", "zarr")


if __name__ == "__main__":
    main()
