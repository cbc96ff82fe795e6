"""A cache's chunks and markers on an object store: obstore, which caches use, beside s3fs.

    python benchmarks/object_store.py --out results

The store is moto's server on the same machine, so that there is no network and the server takes most of the time: rates say
how the two compare, and the client's processor time what they cost. Both take turns; figures are medians. s3fs is to be
installed apart.
"""

import logging
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import numpy as np
from measuring import save

from offline_bkd.cache.storage import ObjectStorage, RemoteStorage

CHUNK, MARKER = 8 << 20, 600  # bytes
SERVER = "import logging, sys; logging.disable(); import moto.server; moto.server.main(['-p', sys.argv[1]])"


@contextmanager
def bucket():
    """A bucket of a server of its own; the environment says where it is."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/answers", method="PUT")).close()
                break
            time.sleep(0.1)
        yield "s3://answers"
    finally:
        server.kill()
        server.wait()


def measure(storage, chunks: int, markers: int) -> dict[str, tuple[float, float]]:
    """(a second, processor seconds in all) of each operation on `chunks` chunks, in MB, and `markers` markers."""
    data = np.random.default_rng(0).integers(0, 256, CHUNK, np.uint8)
    keys, names = [f"probability/c.0.{n}.0" for n in range(chunks)], [f"done/0.{n}" for n in range(markers)]
    work = {
        "chunks written, MB/s": (chunks * CHUNK / 1e6, lambda: [storage.write(key, data) for key in keys]),
        "chunks read, MB/s": (chunks * CHUNK / 1e6, lambda: [storage.read(key) for key in keys]),
        "markers written one by one, a second": (markers, lambda: [storage.write(name, bytes(MARKER)) for name in names]),
        "markers read at once, a second": (markers, lambda: storage.read_several(names, 1 << 20)),
        "markers listed, a second": (markers, lambda: storage.names("done")),
    }
    figures = {}
    for name, (amount, operation) in work.items():
        start, used = time.perf_counter(), time.process_time()
        operation()
        figures[name] = amount / (time.perf_counter() - start), time.process_time() - used
    assert (storage.read(keys[-1]) == data).all() and len(storage.names("done")) == markers
    return figures


@click.command()
@click.option("--out", default="results", show_default=True, help="Folder for object-store-cpu.json.")
@click.option("--repeats", default=7, show_default=True, help="Turns.")
@click.option("--chunks", default=8, show_default=True, help="Of 8 MiB, a turn.")
@click.option("--markers", default=300, show_default=True, help="A turn.")
def main(out, repeats, chunks, markers):
    logging.disable()
    turns = {"obstore": [], "s3fs": []}
    with bucket() as address:
        for turn in range(repeats + 1):
            order = list(turns.items())[:: 1 if turn % 2 else -1]
            for name, figures in order:
                place = f"{address}/{name}-{turn}"
                storage = ObjectStorage(place) if name == "obstore" else RemoteStorage(place)
                figures.append(measure(storage, chunks, markers))
    medians = {
        name: {
            operation: {
                "rate": statistics.median(turn[operation][0] for turn in figures[1:]),  # the first warms up
                "processor s": statistics.median(turn[operation][1] for turn in figures[1:]),
            }
            for operation in figures[0]
        }
        for name, figures in turns.items()
    }
    save(Path(out) / "object-store-cpu.json", medians, *turns, "moto")


if __name__ == "__main__":
    main()
