"""From a loss to new weights: the learning rate of every step, the optimiser, clipping, the moving average."""

import math

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from offline_bkd.pipeline.models import head_parts
from offline_bkd.pipeline.schema import Training


def learning_rate(training: Training, step: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` (from 0 over the whole run)."""
    schedule, base, total = training.schedule, training.learning_rate, training.epochs * steps_per_epoch
    if schedule.name == "constant":
        return base
    if schedule.name == "cosine":
        rise = schedule.warmup_epochs * steps_per_epoch
        if step < rise:
            return base * (step + 1) / rise
        return base * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))
    if schedule.name == "one_cycle":
        rise = schedule.warmup * total
        return base * ((step + 1) / (rise + 1) if step < rise else (total - step) / (total - rise))
    epoch = step // steps_per_epoch
    if epoch < schedule.warmup_epochs:
        risen = (epoch + 1) / schedule.warmup_epochs
        return base * (schedule.warmup_from + (1 - schedule.warmup_from) * risen if schedule.warmup_from else risen)
    return base * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)


class Optimisation:
    """The optimiser of `network`, whose parameters are those of `model`, and what resuming needs of both."""

    def __init__(self, network: torch.nn.Module, model: torch.nn.Module, training: Training):
        self.network, self.model, self.training = network, model, training
        self.optimiser = build_optimiser(model, training)
        average = training.ema and get_ema_multi_avg_fn(training.ema)
        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if average else None

    @property
    def averaged(self) -> torch.nn.Module | None:
        """The model of averaged weights, if there is an average."""
        return self.average and self.average.module

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One step down the gradient of `loss` at the learning rate `rate`."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.training.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.gradient_clip)
        self.optimiser.step()
        if self.average:
            self.average.update_parameters(self.model)

    def state(self) -> dict[str, torch.Tensor]:
        """All that a resumed run goes on from, by name."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                if value is not None:
                    tensors[f"{_STORED.get(key, key)}.{name}"] = torch.as_tensor(value)
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state` gave."""
        self.network.load_state_dict({name: tensors[f"network.{name}"] for name in self.network.state_dict()})
        for name, parameter in self.network.named_parameters():
            for key in _KEPT[self.training.optimizer]:
                if (value := tensors.get(f"{_STORED.get(key, key)}.{name}")) is not None:
                    if value.shape == parameter.shape:  # in the parameter's memory format
                        value = torch.empty_like(parameter).copy_(value)
                    on_host = key == "step" and not self.training.fused  # where torch would have it: read in every step
                    self.optimiser.state[parameter][key] = value if on_host else value.to(parameter.device)
        if self.average:
            self.average.load_state_dict({name: tensors[f"average.{name}"] for name in self.average.state_dict()})


# what an optimiser keeps of each parameter, and the one that is stored under another name
_KEPT = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
_STORED = {"momentum_buffer": "momentum"}


def build_optimiser(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """Over every parameter that is not frozen; groups have their `share` of the learning rate.

    SGD decays all of them, AdamW all but biases and scales.
    """
    shares: dict[float, list[torch.nn.Parameter]] = {}
    heads = tuple(f"{name}." for name in head_parts(model)) if training.backbone_rate != 1 else ("",)
    for name, parameter in model.named_parameters():
        share = 1.0 if name.startswith(heads) else training.backbone_rate
        if name.endswith(".centroids"):
            share = training.centroid_rate
        if not share:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            shares.setdefault(share, []).append(parameter)
    groups = [{"params": parameters, "share": share} for share, parameters in shares.items()]
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=training.learning_rate,
            momentum=training.momentum,
            nesterov=training.nesterov,
            weight_decay=training.weight_decay,
            fused=training.fused,
        )
    decayed = [{**group, "params": [one for one in group["params"] if one.dim() > 1]} for group in groups]
    others = [{**group, "params": [one for one in group["params"] if one.dim() <= 1], "weight_decay": 0.0} for group in groups]
    return torch.optim.AdamW(
        [group for group in decayed + others if group["params"]],
        lr=training.learning_rate,
        betas=(training.momentum, 0.999),
        weight_decay=training.weight_decay,
        fused=training.fused,
    )
