"""CIFAR-10 and CIFAR-100 as the Parquet files that the configurations for CPUs read.

    python examples/cifar_parquet.py data
    export OFFLINE_BKD_DATA=data

torchvision downloads both sets into the folder. Beside them come `cifar10-lt/` and `cifar100-lt/`, each with a train-*.parquet
and a test-*.parquet in the Hugging Face layout. All training images are in them: the configurations draw the long-tailed part.
A folder that is there already is left alone.
"""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from torchvision import datasets


def main(folder: str) -> list[Path]:
    written = []
    for source, name, column in (datasets.CIFAR10, "cifar10-lt", "label"), (datasets.CIFAR100, "cifar100-lt", "fine_label"):
        place = Path(folder) / name
        if place.exists():
            print(f"{place} is there already; left alone")
            continue
        place.mkdir(parents=True)
        for part, train in ("train", True), ("test", False):
            images = source(folder, train=train, download=True)
            features = {"img": {"_type": "Image"}, column: {"_type": "ClassLabel", "names": images.classes}}
            schema = pa.schema(
                {"img": pa.struct({"bytes": pa.binary(), "path": pa.string()}), column: pa.int64()},
                {"huggingface": json.dumps({"info": {"features": features}})},
            )
            img = [{"bytes": png(pixels), "path": f"{row:05d}.png"} for row, pixels in enumerate(images.data)]
            written.append(place / f"{part}-00000-of-00001.parquet")
            parquet.write_table(pa.table({"img": img, column: images.targets}, schema), written[-1])
            print(f"{written[-1]}: {len(img):,} images")
    return written


def png(pixels) -> bytes:
    """Pixels, uint8 [32, 32, 3], as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


if __name__ == "__main__":
    main(sys.argv[1])
