"""From an image file to a batch: decoders, the way from worker processes, single images from a set larger than memory.

    python benchmarks/images.py --out results

Photographs are parts of scikit-learn's two, with noise, 500 by 375 pixels, as JPEG of quality 94. A crop is one of the 224
pixels that training cuts. Decoding is measured in processor time, the rest in time that passes; figures are medians of
turns. Reading is from files whose pages have been dropped from memory. simplejpeg is measured where it is installed.
"""

import hashlib
import importlib.util
import io
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torchvision
from measuring import save
from PIL import Image
from torchvision.transforms.v2 import functional

from offline_bkd.cache.views import RandomResizedCrop
from offline_bkd.pipeline.data import decoding
from offline_bkd.pipeline.data.workers import in_workers

VIEWS, SIZE = RandomResizedCrop(size=224, count=30), (224, 224)
BATCH = 64, 224, 224, 3


def photographs(count: int) -> list[bytes]:
    from sklearn.datasets import load_sample_images

    whole, generator, files = [Image.fromarray(image) for image in load_sample_images().images], np.random.default_rng(0), []
    for number in range(count):
        left, top = generator.integers(0, 141), generator.integers(0, 53)
        pixels = np.asarray(whole[number % 2].crop((left, top, left + 500, top + 375)), np.int16)
        noisy = (pixels + generator.normal(0, 3, pixels.shape).astype(np.int16)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=94)
        files.append(stream.getvalue())
    return files


def crop(image: Image.Image, box) -> np.ndarray:
    top, left, height, width, _ = box
    return np.asarray(image.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BILINEAR))


def ours(data, box):
    return crop(decoding.decode(io.BytesIO(data)), box)


def reduced(data, box):
    """Pillow, decoding at a half, a quarter or an eighth where the crop is still as large as what is made of it."""
    top, left, height, width, _ = box
    image = Image.open(io.BytesIO(data))
    whole, scale = image.width, max(1, min(height, width) // SIZE[0])
    image.draft("RGB", (image.width // scale, image.height // scale))
    image.load()
    sides = (side * image.width / whole for side in (left, top, left + width, top + height))
    return np.asarray(image.resize(SIZE, Image.Resampling.BILINEAR, box=tuple(sides)))


def tensor(data):
    return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def torchvision_decoded(data, box):
    return crop(Image.fromarray(tensor(data).permute(1, 2, 0).numpy()), box)


def torchvision_alone(data, box):
    top, left, height, width, _ = map(int, box)
    return functional.resized_crop(tensor(data), top, left, height, width, SIZE, antialias=True).permute(1, 2, 0).numpy()


def simplejpeg_decoded(data, box):
    import simplejpeg

    return crop(Image.fromarray(simplejpeg.decode_jpeg(data)), box)


DECODERS = {
    "Pillow (ours)": ours,
    "Pillow, scaled decoding": reduced,
    "torchvision.io, Pillow's resizing": torchvision_decoded,
    "torchvision.io, torch's resizing": torchvision_alone,
    **({"simplejpeg, Pillow's resizing": simplejpeg_decoded} if importlib.util.find_spec("simplejpeg") else {}),
}


def measure_decoders(files: list[bytes], repeats: int) -> list[dict]:
    sizes = np.array([decoding.image_size(io.BytesIO(data)) for data in files])
    boxes = np.stack(VIEWS.boxes(np.arange(len(files)), np.zeros(len(files), np.int64), sizes), axis=1)
    work = list(zip(files, boxes.tolist()))
    exact, seconds = [ours(data, box) for data, box in work], {name: [] for name in DECODERS}
    for _ in range(repeats):
        for name, decode in DECODERS.items():
            start = time.process_time()
            for data, box in work:
                decode(data, box)
            seconds[name].append((time.process_time() - start) / len(work))
    rows = []
    for name, decode in DECODERS.items():
        difference = np.abs(np.stack([decode(*item) for item in work]).astype(int) - exact)
        median = statistics.median(seconds[name])
        rows.append({"decoder": name, "ms": 1e3 * median, "images/s a core": 1 / median})
        rows[-1] |= {"mean difference": float(difference.mean()), "largest difference": int(difference.max())}
    return rows


def measure_views(files: list[bytes], repeats: int) -> dict[int, float]:
    """Crops a second and core, by how many are made of an image that is decoded once."""
    sizes, seconds = (
        np.array([decoding.image_size(io.BytesIO(data)) for data in files]),
        {several: [] for several in (1, 2, 4, 8)},
    )
    for turn in range(repeats):
        for several in seconds:
            rows, views = np.arange(len(files)).repeat(several), np.tile(np.arange(several), len(files)) + turn
            boxes = np.stack(VIEWS.boxes(rows, views % VIEWS.count, sizes[rows]), axis=1).reshape(len(files), several, 5)
            start = time.process_time()
            for data, crops in zip(files, boxes.tolist()):
                image = decoding.decode(io.BytesIO(data))
                for box in crops:
                    crop(image, box)
            seconds[several].append((time.process_time() - start) / len(rows))
    return {several: 1 / statistics.median(times) for several, times in seconds.items()}


def bits_by_processor() -> dict[str, str]:
    """A digest of crops by torch's resizing, by the instructions that it may use."""
    script = f"import sys; sys.path[:0] = {sys.path!r}; sys.argv = ['']; import images; images.print_bits()"
    digests = {}
    for instructions in "default", "avx2", "avx512":
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=True)
        digests[instructions] = run.stdout.strip()
    return digests


def print_bits() -> None:
    (data,) = photographs(1)
    print(hashlib.sha256(np.ascontiguousarray(torchvision_alone(data, (20, 30, 300, 310, 0))).tobytes()).hexdigest()[:12])


def measure_channels(repeats: int) -> dict[str, float]:
    """Images a second from two workers that make none: what the way from a process to its parent carries."""
    made, count = np.random.default_rng(0).integers(0, 256, BATCH, dtype=np.uint8), 32

    class Made(torch.utils.data.Dataset):
        def __len__(self):
            return count

        def __getitem__(self, _):
            return torch.from_numpy(made.copy())

    ways = {
        "sockets (ours)": lambda: in_workers(lambda _: made.copy(), count, 2),
        "shared memory (DataLoader)": lambda: torch.utils.data.DataLoader(Made(), batch_size=None, num_workers=2),
        "queue (DataLoader)": lambda: torch.utils.data.DataLoader(
            Made(), batch_size=None, num_workers=2, collate_fn=lambda batch: batch.numpy()
        ),
    }
    rates = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            for batch in way():
                batch[-1]
            rates[name].append(count * BATCH[0] / (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def measure_reading(files: list[bytes], count: int) -> dict[str, float]:
    """Images a second, read one by one in random order from a file that is not in memory."""
    size = len(files[0])
    with tempfile.TemporaryDirectory(dir=".") as folder:
        flat, table = Path(folder) / "flat", Path(folder) / "table.parquet"
        images = pyarrow.array([np.random.default_rng(n).bytes(size) for n in range(1000)], pyarrow.binary())
        with pyarrow.parquet.ParquetWriter(table, pyarrow.schema([("image", pyarrow.binary())])) as writer:
            writer.write_table(pyarrow.table({"image": images}))
        with open(flat, "wb") as file:
            for start in range(0, count, 1000):
                file.writelines(images[n].as_py() for n in range(min(1000, count - start)))
            os.fsync(file.fileno())
        order = np.random.default_rng(0).permutation(count)[:500] * size
        file = os.open(flat, os.O_RDONLY)
        mapped = mmap.mmap(file, 0, prot=mmap.PROT_READ)

        def by_row_group():
            pyarrow.parquet.ParquetFile(table).read_row_group(0)

        ways = {
            "by position (ours)": lambda: [os.pread(file, size, int(start)) for start in order],
            "memory map": lambda: [mapped[start : start + size] for start in order.tolist()],
            "Parquet, a group of 1,000 rows": lambda: [by_row_group() for _ in range(3)],
        }
        rates = {}
        for name, way in ways.items():
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            rates[name] = len(way()) / (time.perf_counter() - start)
        mapped.close()
        os.close(file)
    return rates


@click.command()
@click.option("--out", default="results", show_default=True, help="Folder for images-cpu.json.")
@click.option("--repeats", default=7, show_default=True, help="Turns.")
@click.option("--images", default=40_000, show_default=True, help="In the file that single images are read from.")
def main(out, repeats, images):
    torch.set_num_threads(1)
    files = photographs(64)
    figures = {
        "bytes an image": statistics.mean(map(len, files)),
        "decoders": measure_decoders(files, repeats),
        "crops/s a core, by crops of a decode": measure_views(files, repeats),
        "torch's resizing, digest by instructions": bits_by_processor(),
        "images/s from two workers": measure_channels(repeats),
        "random images/s from the disk": measure_reading(files, images),
    }
    save(Path(out) / "images-cpu.json", figures, "pillow", "torch", "torchvision", "pyarrow", device="cpu (1 thread)")


if __name__ == "__main__":
    main()
