"""The same in Lightning: a student that learns from a cache in the trainer's own loop, on the CPU and without checkpoints.

pip install lightning
python examples/lightning_student.py runs/digits/cache.zarr
"""

import sys
from pathlib import Path

import lightning
import torch
from torch import nn

from offline_bkd import CachedTargets, bkd_loss
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.data import datasets

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"


class Student(lightning.LightningModule):
    def __init__(self, data: CachedTargets):
        super().__init__()
        self.data, self.seen = data, []
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, len(data.cache.classes))
        )

    def on_train_epoch_start(self) -> None:
        self.data.set_epoch(self.current_epoch)

    def training_step(self, batch, _) -> torch.Tensor:
        cache, logits = self.data.cache, self.network(batch.image / 255)
        loss = bkd_loss(logits, batch.target, batch.label, cache.class_counts, temperature=cache.temperature)
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)


def main(cache: str, epochs: int = 3) -> list[float]:
    train, *_ = datasets.load(load_config(DIGITS).data)
    pairs = [(train.decode(row), int(train.label[row])) for row in range(len(train))]
    data = CachedTargets(cache, pairs, seed=0)
    student = Student(data)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(student, loader)
    return student.seen


if __name__ == "__main__":
    print(f"loss {main(sys.argv[1])[-1]:.4f}")
