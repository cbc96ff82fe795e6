"""The schema of an experiment: one YAML file, checked as a whole before anything runs.

Unknown keys, wrong types and impossible values are all reported at once, each with the nearest right name.
"""

from offline_bkd.pipeline.schema.base import (
    Fraction,
    PerChannel,
    Positive,
    PositivePerChannel,
    Section,
    ShareOfEpochs,
    Temperature,
)
from offline_bkd.pipeline.schema.cache import CacheSection, Klt, Logit, Probability
from offline_bkd.pipeline.schema.data import HOW_READ, PLACE, Cifar, Data, Digits, ImageFolder, ImageList, INaturalist, Parquet
from offline_bkd.pipeline.schema.experiment import Experiment, Student, Teacher, TrainedNetwork
from offline_bkd.pipeline.schema.methods import (
    BBN,
    BKD,
    CB,
    CBD,
    CE,
    CRT,
    KD,
    LDAM,
    LFME,
    OLTR,
    AnyMethod,
    CBFocal,
    Focal,
    LogitAdjustment,
    Method,
)
from offline_bkd.pipeline.schema.networks import CifarResNet, LibraryModel, Model, Network, TimmModel, TorchvisionModel
from offline_bkd.pipeline.schema.training import Constant, Cosine, OneCycle, Step, Training

__all__ = [
    "HOW_READ",
    "PLACE",
    "AnyMethod",
    "BBN",
    "BKD",
    "CB",
    "CBD",
    "CBFocal",
    "CE",
    "CRT",
    "CacheSection",
    "Cifar",
    "CifarResNet",
    "Constant",
    "Cosine",
    "Data",
    "Digits",
    "Experiment",
    "Focal",
    "Fraction",
    "INaturalist",
    "ImageFolder",
    "ImageList",
    "KD",
    "Klt",
    "LDAM",
    "LFME",
    "LibraryModel",
    "Logit",
    "LogitAdjustment",
    "Method",
    "Model",
    "Network",
    "OLTR",
    "OneCycle",
    "Parquet",
    "PerChannel",
    "Positive",
    "PositivePerChannel",
    "Probability",
    "Section",
    "ShareOfEpochs",
    "Step",
    "Student",
    "Teacher",
    "Temperature",
    "TimmModel",
    "TorchvisionModel",
    "TrainedNetwork",
    "Training",
]
