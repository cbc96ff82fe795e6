"""The section of training, and its schedules, by kind."""

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from offline_bkd.pipeline.schema.base import Fraction, Positive, Section


class Constant(Section):
    """The base learning rate throughout."""

    name: Literal["constant"]


class Step(Section):
    """A linear rise over whole epochs, then a factor `gamma` at each milestone (the BKD paper's CIFAR recipe)."""

    name: Literal["step"]
    warmup_epochs: Annotated[int, Strict(), Field(ge=0)] = 5  # of the rise; 0: none
    warmup_from: Fraction = 0.0  # share of the learning rate that the rise begins from; its first epoch is one step above
    milestones: tuple[Positive, ...] = (160, 180)  # epochs after which the rate falls
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.01  # the factor of each fall


class Cosine(Section):
    """A linear rise over `warmup_epochs`, then half a cosine from the base learning rate to zero, step by step."""

    name: Literal["cosine"]
    warmup_epochs: Annotated[int, Strict(), Field(ge=0)] = 0  # of the rise; 0: none


class OneCycle(Section):
    """A linear rise over `warmup` of all steps, then a linear fall to zero."""

    name: Literal["one_cycle"]
    warmup: Fraction = 0.25  # share of all steps


class Training(Section):
    """How long and by what steps a network is trained."""

    epochs: Positive = 200  # in each the sampler visits as many samples as there are
    batch_size: Positive = 128  # samples a step; the last batch of an epoch may be smaller
    # crops that are made each time an image file is decoded. With k, an epoch visits one k-th of the samples, each k times.
    # For images that are decoded as needed and methods that visit every sample once an epoch
    views_per_decode: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 0.1  # the base learning rate, which the schedule changes
    schedule: Annotated[Step | Cosine | OneCycle | Constant, Field(discriminator="name")] = Step(name="step")  # of that rate
    # the backbone's learning rate as a share of that of the classifier and a projection; 0: its weights stay. OLTR's attention
    # and projection count as the backbone's
    backbone_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    centroid_rate: Annotated[float, Field(ge=0, le=1)] = 1.0  # that of OLTR's centroids as a share of the classifier's
    # sgd decays every parameter, as the papers do; adamw all but biases and scales, as transformers are trained
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9  # of sgd; of adamw it is the first beta, the second being 0.999
    nesterov: bool = False  # sgd with Nesterov's momentum
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4  # of the optimizer
    gradient_clip: Annotated[float, Field(gt=0)] | None = None  # the largest norm of all gradients together
    # decay of an exponential moving average of the weights, step by step, which is then what is evaluated and saved
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    # of the forward pass; weights, the last layer and losses stay float32. On a GPU torch multiplies in TF32 within float32's
    # convolutions
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True  # the memory format of images, weights and activations; false: contiguous
    fused: bool = True  # the optimiser steps all weights in one call; false: tensor by tensor
    # torch.compile: a start of about a minute for faster steps; cuda_graphs also launches each pass as one
    compile: Literal[False, True, "cuda_graphs"] = False
    evaluate_every: Positive = 1  # epochs between evaluations, on the test set and a validation part; the last epoch always is

    @model_validator(mode="after")
    def _consistent(self):
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum; set momentum, usually 0.9, or leave out nesterov")
        if self.epochs % self.views_per_decode:
            raise ValueError(
                f"with views_per_decode {self.views_per_decode} so many epochs together visit every sample: {self.epochs} "
                "epochs would leave some out; make epochs a multiple of it"
            )
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"nesterov is of optimizer sgd; leave it out with {self.optimizer}")
        return self
