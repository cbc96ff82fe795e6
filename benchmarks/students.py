"""What a student makes of each way to store a teacher's answers.

    python benchmarks/students.py --config configs/cifar100-lt-quick.yaml --cache runs/cache.zarr --out runs/encodings

Takes a complete cache of encoding `logit` or `probability`, stores its answers again in each way, trains BKD students of
several seeds from each, and writes the table to OUT/students.json: bytes an answer, the BKD target's mean total variation and
divergence from the exact one, and accuracy. What is there already is kept, so it can be interrupted, and several may run with
--only.
The peers' ways are as their own sources have them: TinyViT keeps the k largest probabilities and spreads the rest evenly,
FKD keeps the k largest and renormalises.
"""

from pathlib import Path

import click
import numpy as np
import torch
from measuring import save

from offline_bkd.cache import Cache, create_cache, open_cache
from offline_bkd.cache.target import class_weight, total_variation
from offline_bkd.pipeline import config, runs
from offline_bkd.pipeline.device import device_name
from offline_bkd.pipeline.show.report import spread
from offline_bkd.pipeline.show.terminal import COLUMNS, table
from offline_bkd.pipeline.train import train_student

FIT_SAMPLES = 4096


def largest(probability: np.ndarray, k: int) -> np.ndarray:
    """`probability` [N, C] as float16, with all but the k largest of each row zero."""
    kept = np.zeros_like(probability)
    index = np.argpartition(-probability, k - 1, axis=1)[:, :k]
    np.put_along_axis(kept, index, np.take_along_axis(probability, index, 1).astype(np.float16), 1)
    return kept


def evenly(k: int):
    def store(probability):
        kept = largest(probability, k)
        rest = np.maximum(1 - kept.sum(1, keepdims=True), 0) / (probability.shape[1] - k)
        return np.where(kept > 0, kept, rest)

    return store


def renormalised(k: int):
    def store(probability):
        kept = largest(probability, k)
        return kept / kept.sum(1, keepdims=True)

    return store


HALF = {"name": "probability", "dtype": "float16"}
# name: (what becomes of the probabilities, the encoding they are stored by here, bytes an answer where that is not ours)
WAYS = {
    "probability float16": (None, HALF, None),
    **{f"klt max_error {bound}": (None, {"name": "klt", "max_error": bound}, None) for bound in (0.01, 0.03, 0.1)},
    "top-10, rest evenly (TinyViT)": (evenly(10), HALF, 44),
    "top-10, renormalised (FKD)": (renormalised(10), HALF, 40),
    "top-32, rest evenly (TinyViT)": (evenly(32), HALF, 132),
}


def store_again(source: Cache, change, encoding: dict, path: Path) -> Cache:
    """The answers of `source` in another way, at `path`."""

    def fit(views):
        rows = np.random.default_rng(0).permutation(len(source))[:FIT_SAMPLES]
        return np.stack([source.plane(view)[rows] for view in views])

    with create_cache(
        str(path),
        resume=True,
        identity=source.identity,
        sample_id=source.sample_id,
        label=source.label,
        image_size=source.image_size,
        encoding=encoding,
        fit=fit,
    ) as writer:
        for view, block in writer.pending():
            probability = source.plane(view)[writer.rows(block)]
            probability /= probability.sum(1, keepdims=True)
            writer.write(view, block, change(probability) if change else probability)
    return open_cache(path)


def distance(source: Cache, other: Cache) -> tuple[float, float]:
    """Mean total variation and Kullback-Leibler divergence of the BKD target from the exact one, over four views."""
    weight, variation, divergence = class_weight(source.class_counts), [], []
    for view in np.linspace(0, source.views.count - 1, 4).astype(int).tolist():
        exact, rebuilt = source.plane(view), other.plane(view)
        variation.append(total_variation(exact, rebuilt, weight).mean())
        q, r = (p.astype(np.float64) * weight + 1e-12 for p in (exact, rebuilt))
        q, r = q / q.sum(1, keepdims=True), r / r.sum(1, keepdims=True)
        divergence.append((q * np.log(q / r)).sum(1).mean())
    return float(np.mean(variation)), float(np.mean(divergence))


@click.command()
@click.option("--config", "config_file", required=True, help="The experiment that the cache was dumped for.")
@click.option("--cache", required=True, help="A complete cache with encoding logit or probability.")
@click.option("--out", required=True, help="Folder for stores, runs and students.json.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(WAYS)), help="Only this way; repeatable.")
@click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE")
def main(config_file, cache, out, seeds, only, overrides):
    out, source, seeds = Path(out), open_cache(cache), [int(seed) for seed in seeds.split(",")]
    for way in only or WAYS:
        change, encoding, _ = WAYS[way]
        path = out / f"{way}.zarr"
        store_again(source, change, encoding, path)
        for seed in seeds:
            experiment = config.load_config(config_file, overrides, seed)
            train_student(experiment, str(path), str(out / f"{way}-{seed}"), torch.device("cpu"), resume=True)
    found = []
    for way, (_, _, peer_bytes) in WAYS.items():
        folders = [out / f"{way}-{seed}" for seed in seeds]
        if not all((folder / "summary.json").exists() for folder in folders):
            continue
        stored = open_cache(out / f"{way}.zarr")
        variation, divergence = distance(source, stored)
        last = [runs.open_run(folder).summary()["last"] for folder in folders]
        found.append(
            {
                "way": way,
                "bytes an answer": peer_bytes or round(stored.nbytes / len(source) / source.views.count, 1),
                "total variation": variation,
                "divergence": divergence,
                "seeds": seeds,
                **{name: [scores[key] for scores in last] for name, key in COLUMNS.items()},
            }
        )
    save(out / "students.json", {"ways": found}, "torch", "zarr", device=device_name(torch.device("cpu")))
    rows = [["stored as", "bytes an answer", "TV", "KL", *COLUMNS]]
    for row in found:
        cells = [row["way"], str(row["bytes an answer"]), f"{row['total variation']:.4f}", f"{row['divergence']:.2e}"]
        rows.append(cells + [spread(row[name]) for name in COLUMNS])
    table(rows, f"BKD students, test accuracy in %, {len(seeds)} seeds")


if __name__ == "__main__":
    main()
