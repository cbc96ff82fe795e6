"""A run's network as a file that runs without this package: ONNX, or a program of torch.export.

Preprocessing is inside: uint8 images [B, H, W, 3] in, logits, float32 [B, C], out, for any B.
"""

import contextlib
import importlib.util
import io
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from offline_bkd.cache.views import CropFlip
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import ImageSource, open_images
from offline_bkd.pipeline.evaluate import infer, load_model

OPSET = 20  # of ONNX: it has every operator that is needed, and runtimes know it since 2023
CHECKED = 1000  # test images
TOLERANCE = 1e-4  # of logits, absolute and relative
BATCH = {"images": {0: torch.export.Dim("batch")}}  # the dimension that is free
Exported = Callable[[np.ndarray], np.ndarray]  # uint8 images [B, H, W, 3] to logits, float32 [B, C]


class PixelsToLogits(nn.Module):
    """uint8 images [B, H, W, 3], as image libraries have them, to logits, float32 [B, C]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.permute(0, 3, 1, 2))


def _write_onnx(network: nn.Module, example: torch.Tensor, path: Path) -> None:
    with contextlib.redirect_stdout(None):
        torch.onnx.export(
            network,
            (example,),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=BATCH,
            external_data=False,
            verbose=False,
        )


def _read_onnx(path: Path) -> Exported:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def _write_torch(network: nn.Module, example: torch.Tensor, path: Path) -> None:
    buffer = io.BytesIO()  # torch's own writer does not say why it cannot write
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=BATCH), buffer)
    path.write_bytes(buffer.getbuffer())


def _read_torch(path: Path) -> Exported:
    program = torch.export.load(path).module()
    return lambda images: program(torch.from_numpy(images)).numpy()


class Format(NamedTuple):
    file: str
    kind: str
    needs: tuple[str, ...]  # packages to write it
    library: str  # that runs it
    call: str  # Python, of an `image` of Pillow
    caution: str
    write: Callable[[nn.Module, torch.Tensor, Path], None]
    read: Callable[[Path], Exported]


FORMATS = {
    "onnx": Format(
        file="model.onnx",
        kind=f"ONNX, opset {OPSET}",
        needs=("onnx", "onnxruntime", "onnxscript"),
        library="onnxruntime",
        call='onnxruntime.InferenceSession("model.onnx").run(None, {"images": numpy.asarray(image)[None]})[0]',
        caution="",
        write=_write_onnx,
        read=_read_onnx,
    ),
    "torch": Format(
        file="model.pt2",
        kind=f"a program of torch.export, torch {torch.__version__}",
        needs=(),
        library="torch",
        call='torch.export.load("model.pt2").module()(torch.from_numpy(numpy.array(image)[None])).detach()',
        caution="\nAs a pickle does, such a file may bring code, which `torch.export.load` runs: load those that you trust.\n",
        write=_write_torch,
        read=_read_torch,
    ),
}
README = """\
`{file}` ({kind}) takes RGB images, uint8 [B, {height}, {width}, 3], and gives logits, float32 [B, {classes}], one for
each class of `classes.txt`. To run it (`pip install numpy pillow {library}`):

```python
import numpy, {library}
from PIL import Image, ImageOps
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB"){crop}
logits = {call}
```
{caution}"""
CENTRE = """
side, (width, height) = min(image.size) * 7 // 8, image.size
left, top = (width - side) // 2, (height - side) // 2
image = image.crop((left, top, left + side, top + side)).resize(({width}, {height}), Image.Resampling.BILINEAR)"""


def export_model(
    folder: str, form: str, out: str, checkpoint: str = "last", overrides: tuple[str, ...] = ()
) -> dict[str, str]:
    """Writes the run's network, its class names and how to run it into the new folder `out`; returns facts to print.

    `form`: a key of FORMATS. `overrides` may say where the test images are. Before the folder appears, the file is read back
    by its runtime and asked about some of them.

    Raises UserError for what cannot be exported, RuntimeError if the answers are others.
    """
    kind = FORMATS[form]
    if not all(map(importlib.util.find_spec, kind.needs)):
        raise UserError(f'--format {form} needs {", ".join(kind.needs)}; run: pip install ".[{form}]"')
    runs.refuse_taken(out, resume=None)
    run = runs.open_run(folder)
    experiment, classes = run.config(overrides), run.summary()["classes"]
    if experiment.network(run.stage).model.memory:
        raise UserError(f"the network in {folder} has a memory, whose distances (torch.cdist) no exporter takes; name another")
    _, test_set, _ = datasets.load(experiment.data)
    if test_set.classes != tuple(classes):
        raise UserError(f"the network in {folder} knows other classes than {test_set.name}; name its own test images by -o")
    rows = np.unique(np.linspace(0, len(test_set) - 1, CHECKED).astype(np.int64))
    images = open_images(test_set.take(rows), experiment.views, torch.device("cpu"), experiment.data.workers)
    model, (height, width) = load_model(run, checkpoint, experiment, len(classes)), images.crop_size
    partial = Path(f"{out.rstrip('/')}.{secrets.token_hex(8)}.partial")  # which no other process takes
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}; name another folder")
    try:
        example = torch.zeros(2, height, width, 3, dtype=torch.uint8)
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            kind.write(PixelsToLogits(model).eval(), example, partial / kind.file)
            checked = compare(model, kind.read(partial / kind.file), images)
        crop = "" if isinstance(experiment.views, CropFlip) else CENTRE.replace("{width}, {height}", f"{width}, {height}")
        sizes = {"height": height, "width": width, "classes": len(classes)}
        (partial / "README.md").write_text(README.format(**kind._asdict(), **sizes, crop=crop))
        (partial / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
        try:
            os.replace(partial, out)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made: {error.strerror}; name another folder")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "file": f"{Path(out) / kind.file}, {kind.kind}",
        "takes": f"images, uint8 [B, {height}, {width}, 3], RGB",
        "gives": f"logits, float32 [B, {len(classes)}], in the order of classes.txt",
        "checked": checked,
    }


def compare(model: nn.Module, exported: Exported, images: ImageSource) -> str:
    """In words, how far the exported network's answers are from the model's, about all of `images`.

    Raises RuntimeError if that is further than TOLERANCE.
    """
    rows = np.arange(len(images.label))
    expected = infer(model, images, rows).numpy()
    batches = (batch.images.permute(0, 2, 3, 1).contiguous().numpy() for batch in images.batches(rows, None, 100))
    logits = np.concatenate([exported(pixels) for pixels in batches])
    known = np.isfinite(expected)  # an expert's other classes have none
    difference = np.abs(logits - expected)[known].max()
    if not np.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise RuntimeError(f"the exported network's logits differ by {difference:.2g} from the run's; nothing was written")
    there, here = (f"{100 * np.mean(answers.argmax(1) == images.label.numpy()):.2f}%" for answers in (logits, expected))
    return f"{len(rows):,} test images: logits differ by {difference:.1e} at most, accuracy {there} there, {here} here"
