"""The processes that train one network together, as torchrun starts them: each takes its share of every batch.

Rows, views and batches are those of one process; every rank reads what it needs of them. Gradients are of the whole batch's
mean loss, up to rounding. Batch statistics are synchronised on GPUs; on CPUs, where torch cannot, each rank has its own.
"""

import atexit
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed

from offline_bkd.pipeline import UserError, torchrun
from offline_bkd.pipeline.schema import MethodSection
from offline_bkd.pipeline.training.methods.contract import StepLoss


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rank's part of an epoch: as many batches as the epoch has, of `batch_size` images, the last perhaps of fewer."""

    rows: np.ndarray  # int64 [M]
    views: np.ndarray  # int64 [M]
    batch_size: int
    # the step in which the rank has no image of its own, and runs some that do not count, but in synchronised batch statistics
    idle_step: int | None = None


class Ranks:
    """This process among `world`; the first writes what a run writes."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: np.ndarray, views: np.ndarray, batch_size: int) -> Share:
        """This rank's part of the `rows` [M] that an epoch visits under `views` [M] in batches of `batch_size`."""
        if self.world == 1:
            return Share(rows=rows, views=views, batch_size=batch_size)
        size, whole = batch_size // self.world, len(rows) // batch_size * batch_size
        full = np.arange(whole).reshape(-1, batch_size)[:, self.rank * size : (self.rank + 1) * size].reshape(-1)
        unit = 2 - size % 2  # two images may belong together
        bounds = unit * np.rint((len(rows) - whole) / unit * np.arange(self.world + 1) / self.world).astype(int)
        bounds[-1] = len(rows) - whole
        last, idle = np.arange(whole + bounds[self.rank], whole + bounds[self.rank + 1]), None
        if not len(last) and whole < len(rows):
            last, idle = np.arange(whole, min(whole + unit, len(rows))), whole // batch_size
        mine = np.concatenate([full, last])
        return Share(rows=rows[mine], views=views[mine], batch_size=size, idle_step=idle)

    def mean(self, terms: StepLoss, images: int, idle: bool) -> torch.Tensor:
        """What this rank minimises, so that the mean of all ranks' gradients is that of the whole batch's mean loss.

        `images`: how many the whole batch has. `idle`: none of this rank's counts.
        """
        if self.world == 1:
            return terms.mean()
        counts = 0.0 if idle else 1.0
        if terms.weight is None:
            return counts * terms.loss.sum() * (self.world / images)
        total = self.sum(counts * terms.weight.detach().sum())
        return counts * (terms.weight * terms.loss).sum() * (self.world / total)

    def together(self, network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """The network as a step runs it: its gradients are means over the ranks."""
        if self.world == 1:
            return network
        if device.type == "cuda":
            network = synchronised(network)
        devices = [device.index] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(network, device_ids=devices)

    def agree(self, model: torch.nn.Module) -> None:
        """Gives every rank the first one's buffers."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return self._reduced(value, distributed.ReduceOp.SUM)

    def least(self, value: torch.Tensor) -> torch.Tensor:
        return self._reduced(value, distributed.ReduceOp.MIN)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' parts [M, ...], of perhaps different lengths, one after the other, on every rank."""
        if self.world == 1:
            return part
        parts: list = [None] * self.world
        distributed.all_gather_object(parts, part.cpu())
        return torch.cat(parts).to(part.device)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            distributed.barrier()

    def _reduced(self, value: torch.Tensor, operation) -> torch.Tensor:
        if self.world > 1:
            value = value.clone()
            distributed.all_reduce(value, operation)
        return value


def synchronised(network: torch.nn.Module) -> torch.nn.Module:
    """The network with batch statistics over all ranks."""
    if any(type(module).__module__.startswith("timm.") for module in network.modules()):
        from timm.layers import convert_sync_batchnorm  # torch's would lose what timm's layers do after they normalise

        return convert_sync_batchnorm(network)
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """This process among those that torchrun started, or alone."""
    world = torchrun.world()
    if world == 1:
        return ALONE
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave)
    return Ranks(distributed.get_rank(), world)


def leave() -> None:
    """Ends what `join` began: its threads may abort a process that ends with them."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def batch_sizes(samples: int, batch_size: int, world: int, device: torch.device) -> set[int]:
    """Over how many images one of `world` processes may normalise, in an epoch of `samples`: on a GPU over a whole batch."""
    world = world if device.type == "cpu" else 1
    few = np.arange(min(samples, batch_size + samples % batch_size))  # a whole batch and the last one
    shares = (Ranks(rank, world).share(few, few, batch_size) for rank in range(world))
    lengths = ((len(share.rows), share.batch_size) for share in shares)
    return {min(size, count - start) for count, size in lengths for start in range(0, count, size)}


def refuse_shares(method: MethodSection, batch_size: int, judged: int, world: int) -> None:
    """Raises UserError where `world` processes cannot share a batch, or the `judged` images of an evaluation."""
    if world == 1:
        return
    if method.whole_batches:
        raise UserError(f"method {method.name} learns from whole batches; train it in one process, without torchrun")
    if batch_size % world or batch_size // world % method.branches:
        even = "an even share" if method.branches == 2 else "equal shares"
        raise UserError(f"{world} processes cannot have {even} of training.batch_size {batch_size}; change one or the other")
    if judged < world:
        raise UserError(f"{world} processes cannot share {judged} test or validation images; start fewer processes")
