"""The section of an experiment, which holds the others, and those of teacher and student."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from offline_bkd.cache.views import CropFlip, RandomResizedCrop
from offline_bkd.pipeline.schema.base import Section
from offline_bkd.pipeline.schema.cache import CacheSection
from offline_bkd.pipeline.schema.data import Cifar, Digits, ImageFolder, ImageList, INaturalist, Parquet
from offline_bkd.pipeline.schema.methods import BKD, CE, AnyMethod
from offline_bkd.pipeline.schema.networks import Model
from offline_bkd.pipeline.schema.training import Training


class TrainedNetwork(Section):
    """A network and how it is trained. Teacher and student are uses of one."""

    model: Model  # the network
    method: AnyMethod  # what is minimised
    training: Training = Training()  # by what steps
    # random colour changes of training images: mild as in the public code of cRT and OLTR, strong as of half of CBD's
    # teachers; not for a student that learns from a cache, which holds no answers to changed images
    color_jitter: Annotated[
        Literal[False, "mild", "strong"], BeforeValidator(lambda value: "strong" if value is True else value)
    ] = False
    # of a teacher: it learns the classes of this shot group alone, for method lfme
    expert: Literal["many", "medium", "few"] | None = None

    @model_validator(mode="after")
    def _fits(self):
        method, model, usual = self.method.name, self.model, self.method.usual_cosine_scale
        memory, branches = self.method.memory, self.method.branches
        if usual and model.cosine_scale is None:
            raise ValueError(f"method {method} needs a cosine classifier: set model.cosine_scale, usually {usual}")
        if memory != model.memory:
            raise ValueError(
                f"method {method} needs a network {'with' if memory else 'without'} a memory: set "
                f"model.memory={'true' if memory else 'false'}"
            )
        if model.memory and model.cosine_scale is not None:
            raise ValueError("a memory has its own cosine classifier: leave out model.cosine_scale")
        if model.branches != branches:
            raise ValueError(
                f"method {method} needs a network of {'two branches' if branches == 2 else 'one branch'}: set "
                f"model.branches={branches}; found {model.branches}"
            )
        if self.training.batch_size % branches:
            raise ValueError(
                f"method {method} splits every batch in two: training.batch_size {self.training.batch_size} is odd"
            )
        sampler = getattr(self.method, "sampler", None)
        if self.training.views_per_decode > 1 and (self.method.draws == "samples" or sampler == "class_balanced"):
            raise ValueError(
                f"method {method} draws samples one by one, each under one view: leave out training.views_per_decode"
            )
        if self.expert and method != "ce":
            raise ValueError(
                f"an expert of some classes is trained by method ce; found {method}; leave out expert or the method"
            )
        if self.expert and getattr(self.method, "label_smoothing", 0):
            raise ValueError("an expert gives the other groups' classes no probability: leave out expert or label_smoothing")
        if self.color_jitter and self.method.learns_from_cache:
            raise ValueError(
                f"method {method} learns from a cache, which holds no answers to jittered images; leave out color_jitter"
            )
        return self


class Teacher(TrainedNetwork):
    """The network whose answers are cached."""

    method: AnyMethod = CE(name="ce")  # what is minimised; none that learns from a cache

    @model_validator(mode="after")
    def _needs_no_cache(self):
        if self.method.learns_from_cache:
            raise ValueError(
                f"method {self.method.name} learns from a cache, which stage one has not written yet; train it as a student, "
                "whose run can be a teacher too"
            )
        return self


class Student(TrainedNetwork):
    """The network that learns, from a cache or without one."""

    method: AnyMethod = BKD(name="bkd")  # what is minimised

    @model_validator(mode="after")
    def _knows_all_classes(self):
        if self.expert:
            raise ValueError("a student knows all classes: leave out student.expert; experts are teachers, for method lfme")
        return self


class Experiment(Section):
    """One experiment: a data set, its views, a teacher, a cache and a student."""

    name: str  # for messages and pictures
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = 0  # of initial weights, sample order and views drawn
    data: Annotated[Digits | Parquet | Cifar | ImageFolder | ImageList | INaturalist, Field(discriminator="name")]  # images
    views: Annotated[CropFlip | RandomResizedCrop, Field(discriminator="name")]  # the crops that are numbered and cached
    teacher: Teacher  # of stage one
    cache: CacheSection = CacheSection()  # between the stages
    student: Student  # of stage two

    @model_validator(mode="after")
    def _decodes(self):
        if (
            isinstance(self.views, CropFlip)
            and max(self.teacher.training.views_per_decode, self.student.training.views_per_decode) > 1
        ):
            raise ValueError(
                "views crop_flip keeps decoded images in memory: training.views_per_decode gains nothing there; leave it out"
            )
        return self

    def network(self, role: str) -> TrainedNetwork:
        """The section of `role`, "teacher" or "student"."""
        return getattr(self, role)
