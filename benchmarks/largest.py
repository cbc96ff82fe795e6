"""A store of iNaturalist 2018's size, of a simulated teacher: written by the normal writer, then every byte read back.

    python benchmarks/largest.py --folder FOLDER --out results

437,513 samples of 8,142 classes; as many views as --logit and --klt say. Each step is measured in a process of its own:
seconds, and the most memory that the process had. The steps: `write` every block, of which `teacher_s` is the time that the
simulated teacher takes; `verify`, every byte and its checksum; `epoch`, one view's plane read and all its rows decoded in
random order, 256 at a time, as a student does; `inspect`; `to_pandas` of one view. The stores are deleted in the end.
The figures go into large-stores.json, beside those of benchmarks/large.py.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measuring import memory, save

from cache import Simulated
from offline_bkd.cache import Identity, RandomResizedCrop, create_cache, open_cache
from offline_bkd.cache.target import softmax

SAMPLES, CLASSES, BATCH = 437_513, 8142, 256
ENCODINGS = {"logit": {"name": "logit"}, "klt": {"name": "klt", "max_error": 0.02}}


def write(path: Path, encoding: str, views: int) -> dict:
    teacher, asked = Simulated(SAMPLES, CLASSES), 0.0
    chosen = np.linspace(0, SAMPLES - 1, 1024).astype(int)  # to fit a codebook to

    def fit(numbers):
        return np.stack([softmax(teacher.moved(number)[chosen] @ teacher.head) for number in numbers])

    identity = Identity(
        classes=tuple(map(str, range(CLASSES))),
        temperature=2.0,
        views=RandomResizedCrop(size=224, count=views),
        dataset={"name": "simulated"},
        teacher={"digest": "simulated"},
    )
    arguments = {
        "identity": identity,
        "sample_id": np.arange(SAMPLES),
        "label": teacher.label,
        "image_size": np.full((SAMPLES, 2), 256),
        "encoding": ENCODINGS[encoding],
        "fit": fit,
    }
    with create_cache(path, **arguments) as writer:
        for view in range(views):
            start = time.perf_counter()
            feature = teacher.moved(view)
            asked += time.perf_counter() - start
            for block in range(writer.blocks):
                start = time.perf_counter()
                probability = softmax(feature[writer.rows(block)] @ teacher.head)
                asked += time.perf_counter() - start
                writer.write(view, block, probability)
    return {"teacher_s": asked}


def verify(path: Path, *_) -> dict:
    return {"damaged": len(open_cache(path).verify_checksums())}


def epoch(path: Path, *_) -> dict:
    cache, start = open_cache(path), time.perf_counter()
    plane = cache.stored_plane(0)
    read = time.perf_counter() - start
    order = np.random.default_rng(0).permutation(SAMPLES)
    for first in range(0, SAMPLES, BATCH):
        assert np.isfinite(cache.held.decode(plane[order[first : first + BATCH]])).all()
    return {"read_s": read, "plane_bytes": plane.nbytes}


def inspect(path: Path, *_) -> dict:
    summary = open_cache(path).summary()
    return {name: summary[name] for name in ("complete", "blocks", "bytes", "error")}


def to_pandas(path: Path, *_) -> dict:
    return {"rows": len(open_cache(path).to_pandas(view=0))}


STEPS = {step.__name__: step for step in (write, verify, epoch, inspect, to_pandas)}


def measured(*words) -> dict:
    """Seconds, peak memory in bytes and what a step gives, of a process of its own."""
    command = [sys.executable, __file__, "--step", *map(str, words)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--logit", type=int, default=4, help="views, of 7.1 GB each")
    parser.add_argument("--klt", type=int, default=8, help="views, of 5.5 MB each")
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        name, path, encoding, views = given.step
        start = time.perf_counter()
        result = STEPS[name](Path(path), encoding, int(views))
        return print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": memory()} | result))
    found = {}
    for encoding, views in {"logit": given.logit, "klt": given.klt}.items():
        path, found[encoding] = given.folder / encoding, {"samples": SAMPLES, "classes": CLASSES, "views": views}
        for step in STEPS if views else ():
            found[encoding][step] = measured(step, path, encoding, views)
            print(encoding, step, found[encoding][step], flush=True)
        files = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
        found[encoding] |= {"files": len(files), "bytes": sum(files)}
        shutil.rmtree(path, ignore_errors=True)
    save(given.out / "large-stores.json", {"stores": found}, "numpy", "zarr", section="largest")


if __name__ == "__main__":
    main()
