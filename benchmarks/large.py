"""What a store of many blocks costs to open, to list, to resume, and how much memory reading it takes.

    python benchmarks/large.py --out results

The stores are simulated: 10³, 10⁴ and 10⁵ blocks of four samples and five classes. So the figures are what blocks cost,
apart from what is in them. The first four are measured where every hundredth block is missing, the others where none is.
Each is measured in a process of its own, which has opened the store once before: seconds, and the memory at its peak
beyond that. With --s3 the first, the second and the fourth instead, on an object store (moto's server), to 10⁴ blocks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from measuring import memory, save

import offline_bkd.cache.format as store_format
from offline_bkd.cache import Identity, RandomResizedCrop, create_cache, open_cache
from offline_bkd.cache.storage import open_storage

ROWS, CLASSES = 4, 5
S3_BLOCKS = 10_000  # at most: moto takes 0.3 s for each listing of a thousand
SIZES = {1_000: (10, 100), 10_000: (100, 100), 100_000: (100, 1000)}  # blocks: views, and blocks of each
CHUNK_BYTES = ROWS * CLASSES * 4  # so that a block is of ROWS samples


def arguments(views: int, blocks: int) -> dict:
    """What `create_cache` takes."""
    label = np.arange(ROWS * blocks) % CLASSES
    return {
        "identity": Identity(
            classes=tuple(f"class {number}" for number in range(CLASSES)),
            temperature=2.0,
            views=RandomResizedCrop(size=8, count=views),
            dataset={"name": "simulated"},
            teacher={"digest": "simulated"},
        ),
        "sample_id": np.arange(len(label)),
        "label": label,
        "image_size": np.full((len(label), 2), 8),
        "encoding": {"name": "probability", "dtype": "float32"},
    }


def build(url: str, views: int, blocks: int, whole: bool = False) -> None:
    """Fill a store with blocks that are all alike. One is written, the others are copies of it."""
    with create_cache(url, resume=True, **arguments(views, blocks)) as writer:
        if (0, 0) in writer.pending():
            writer.write(0, 0, np.full((ROWS, CLASSES), 1 / CLASSES))
        cache = writer.cache
    storage, layout = open_storage(url), cache.layout
    chunk = bytes(storage.read(layout.chunk("probability", 0, 0)))
    entry = {"size": len(chunk), "checksum": store_format.chunk_checksum(chunk)}

    def put(key, data):
        if "://" in url:
            return storage.write(key, data)
        with open(f"{url}/{key}", "wb") as file:  # nobody waits for the disk here
            file.write(data)

    for number, (view, block) in enumerate(cache.missing(), 1):
        if whole or number % 100:
            rows, key = layout.rows(block), layout.chunk("probability", view, block)
            put(key, chunk)
            owner = {"store": cache.digest, "view": view, "rows": [rows.start, rows.stop]}
            put(f"done/{view}.{block}", store_format.marker({key: entry}, **owner))


def resume(url, views, blocks):
    with create_cache(url, resume=True, **arguments(views, blocks)) as writer:
        return len(writer.pending())


WORK = {
    "open": lambda url, *_: open_cache(url),
    "missing": lambda url, *_: open_cache(url).missing(),
    "parts": lambda url, *_: open_cache(url).parts(64),
    "resume": resume,
    "inspect": lambda url, *_: open_cache(url).summary(),
    "to_pandas": lambda url, *_: open_cache(url).to_pandas(view=0),
    "export": lambda url, *_: open_cache(url).export_parquet(f"{url}.parquet"),
    "verify": lambda url, *_: open_cache(url).verify_checksums(),
}


def measured(work: str, url: str, views: int, blocks: int) -> dict:
    """Seconds and peak memory in MB of `work`, in a process of its own."""
    words = [sys.executable, __file__, "--work", work, url, str(views), str(blocks)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    store_format._CHUNK_BYTES = CHUNK_BYTES
    if asked.work:
        name, url, views, blocks = asked.work
        import pandas  # noqa: F401  what tables take to import is no matter of the store
        import pyarrow.parquet  # noqa: F401

        open_cache(url)
        before, start = memory(reset=True), time.perf_counter()
        WORK[name](url, int(views), int(blocks))
        return print(json.dumps({"seconds": time.perf_counter() - start, "peak_MB": (memory() - before) / 1e6}))
    if asked.s3:
        from object_store import bucket as place
    else:
        place = partial(tempfile.TemporaryDirectory, dir=os.environ.get("TMPDIR"))
    found = {}
    with place() as folder:
        for count, size in SIZES.items():
            if asked.s3 and count > S3_BLOCKS:
                continue
            url = f"{folder}/{count}"
            build(url, *size)
            for work in ("open", "missing", "resume") if asked.s3 else WORK:
                if work == "inspect":
                    build(url, *size, whole=True)
                found.setdefault(work, {})[count] = measured(work, url, *size)
                print(count, work, found[work][count], flush=True)
    where = "s3" if asked.s3 else "local"
    save(asked.out / "large-stores.json", {"figures": found}, "numpy", "zarr", section=where)


if __name__ == "__main__":
    main()
