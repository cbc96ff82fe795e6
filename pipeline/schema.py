"""The schema of an experiment: one YAML file, checked as a whole before anything runs.

Unknown keys, wrong types and impossible values are all reported at once, each with the nearest right name.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from offline_bkd.cache.views import CropFlip, RandomResizedCrop


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Positive = Annotated[int, Strict(), Field(gt=0)]
Temperature = Annotated[float, Field(ge=0.01, le=1000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _share_of_epochs(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"a share of the epochs, from 0 to below 1 (epoch 160 of 200 is 0.8); found {value:g}")
    return value


ShareOfEpochs = Annotated[float, AfterValidator(_share_of_epochs)]
PerChannel = tuple[float, float, float]
PositivePerChannel = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


def _validation(value):
    if value is None or isinstance(value, str):
        return value
    share, count = isinstance(value, float) and 0 < value < 1, type(value) is int and value > 0
    if not share and not count:
        raise ValueError(
            "a share of each class's training images, above 0 and below 1, a whole number of them, or the files of a "
            f"validation part; found {value!r}"
        )
    return value


class Data(Section):
    """What every data set has: where it is, how its training part is made long-tailed, how pixels are normalised."""

    root: str = "."  # folder that relative paths start from; ~ and ${VARIABLES} are expanded
    imbalance_ratio: Annotated[float, Field(ge=1)] | None = None  # n_max / n_min; null keeps every training sample
    max_per_class: Positive | None = None  # n_max; null takes the first class's size
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**64)] = 0  # which samples stay, and which are held out
    # the part by which epochs are chosen: held out, a share of each class's training images (0.1) or so many of them (20);
    # or its own files, given as those of `test`
    validation: Annotated[int | float | str | None, BeforeValidator(_validation)] = None
    mean: PerChannel | None = None  # of pixels in [0, 1]; null: the network's own, for all but timm's that of ImageNet
    std: PositivePerChannel | None = None  # likewise
    workers: Annotated[int, Strict(), Field(ge=0)] = 2  # decoding processes, where images are decoded as needed

    @model_validator(mode="after")
    def _own_files(self):
        if isinstance(self.validation, str) and not hasattr(self, "test"):
            raise ValueError(
                f"{self.name} has no files to name as validation: give a share of the training images such as 0.1"
            )
        return self


class Digits(Data):
    """scikit-learn's handwritten digits: 8x8 images, 10 classes, embedded, the last 40 of each class for testing."""

    name: Literal["digits"]


class Parquet(Data):
    """Parquet in the Hugging Face layout: an image struct with `bytes` or a `path`, an integer label column."""

    name: Literal["parquet"]
    train: str  # a file or a pattern such as train-*.parquet
    test: str  # likewise
    image: str = "image"  # the column of images
    label: str = "label"  # the column of class numbers
    # a folder for the copy of the images that a part of more than 1 GiB is read from; null: `copies` beside its files
    copies: str | None = None


class Cifar(Data):
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded into `root` where it is missing."""

    name: Literal["cifar10", "cifar100"]


class ImageFolder(Data):
    """A folder for each class, of image files; classes are the folders' sorted names."""

    name: Literal["imagefolder"]
    train: str = "train"  # the folder of the classes' folders
    test: str = "test"  # likewise


class ImageList(Data):
    """Text files of lines `relative/path.jpg label`, as ImageNet-LT and Places-LT are given; paths start from `root`."""

    name: Literal["image_list"]
    train: str  # the file
    test: str  # likewise
    classes: str | None = None  # a file with a class name on each line; null names the classes 0, 1, …


class INaturalist(Data):
    """The JSON files of iNaturalist 2017 and 2018: images, an annotation for each, categories; paths start from `root`."""

    name: Literal["inaturalist"]
    train: str  # the file
    test: str  # likewise


class Network(Section):
    """What every network may have at its end."""

    projection: Positive | None = None  # a layer (linear, ReLU) of this width before the classifier
    cosine_scale: Annotated[float, Field(gt=0)] | None = None  # null: a linear classifier; a number: s of a cosine classifier
    # how its weights are drawn, whose length divides their gradient: of length one (LDAM's code), or Glorot's uniform (CBD's)
    cosine_init: Literal["unit", "glorot"] = "unit"
    zero_init_residual: bool = False  # a ResNet's blocks begin as their shortcuts: the last scale of each is zero (CBD's code)
    memory: bool = False  # OLTR's modulated attention before pooling and memory of class centroids after it
    branches: Literal[1, 2] = 1  # 2: a ResNet's last block exists twice, for method bbn

    @property
    def downloads(self) -> bool:
        """Whether its initial weights come over the network."""
        return False

    def without_weights(self) -> Self:
        """The same network, its initial weights drawn instead of loaded."""
        return self


class CifarResNet(Network):
    """He et al.'s ResNets for small images, depth 6n + 2, with parameter-free (option A) shortcuts."""

    name: Literal["cifar_resnet"]
    depth: Positive = 32  # layers
    width: Annotated[int, Strict(), Field(ge=2, multiple_of=2)] = 16  # channels of the first stage

    @model_validator(mode="after")
    def _depth(self):
        if self.depth % 6 != 2 or self.depth < 8:
            raise ValueError(f"depth is 6n + 2 (8, 14, 20, 32, 44, 56, 110); found {self.depth}")
        return self


class LibraryModel(Network):
    """A network that a library knows by its name."""

    architecture: str  # the name in the library
    weights: str | None = None  # initial ones: a local .pth or .safetensors file, or the library's own, downloaded

    @property
    def downloads(self) -> bool:
        """Whether `weights` are the library's own; files have a suffix."""
        return self.weights is not None and not Path(self.weights).suffix

    def without_weights(self) -> Self:
        return self.model_copy(update={"weights": None})


class TorchvisionModel(LibraryModel):
    """Any of torchvision's classifiers, by its name there, and resnet10, which is ImageNet-LT's.

    Its own weights have names, such as IMAGENET1K_V1; DEFAULT is the newest.
    """

    name: Literal["torchvision"]

    @model_validator(mode="after")
    def _drawn_or_loaded(self):
        if self.weights is not None and self.zero_init_residual:
            raise ValueError("weights say how blocks begin; leave out zero_init_residual, or the weights")
        return self


class TimmModel(LibraryModel):
    """Any of timm's classifiers, by its name there: vit_tiny_patch16_224, or with the tag of its configuration and weights.

    Its own weights are DEFAULT, from the hub that timm knows. What is null follows timm's configuration.
    """

    name: Literal["timm"]
    input_size: Positive | None = None  # side of its images in pixels, of an architecture that takes one size alone
    patch_size: Positive | None = None  # pixels
    drop_path: Fraction | None = None  # how often a block is left out in training, at the last one

    @model_validator(mode="after")
    def _no_resnet_of_ours(self):
        if self.memory or self.branches != 1:
            raise ValueError(
                "memory and branches change the last stage of a ResNet of cifar_resnet or torchvision; timm's stay whole"
            )
        if self.zero_init_residual:
            raise ValueError("timm's ResNets begin as their shortcuts by themselves; leave out zero_init_residual")
        return self


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
    learning_rate: Annotated[float, Field(gt=0)] = 0.1  # the base learning rate, which the schedule changes
    schedule: Annotated[Step | Cosine | OneCycle | Constant, Field(discriminator="name")] = Step(name="step")  # of that rate
    # share of the learning rate that all but the classifier, a projection and what OLTR adds learns at; 0 freezes it
    backbone_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    # sgd decays every parameter, as the papers do; adamw all but biases and scales, as transformers are trained
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9  # of sgd; of adamw it is the first beta, the second being 0.999
    nesterov: bool = False  # sgd with Nesterov's momentum
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4  # of the optimizer
    gradient_clip: Annotated[float, Field(gt=0)] | None = None  # the largest norm of all gradients together
    # decay of an exponential moving average of the weights, step by step, which is then what is evaluated and saved
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    # of the forward pass; weights and losses stay float32. On a GPU torch multiplies in TF32 within float32's convolutions
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True  # the memory format of images, weights and activations; false: contiguous
    fused: bool = True  # the optimiser steps all weights in one call; false: tensor by tensor
    # torch.compile: a start of about a minute for faster steps; cuda_graphs also launches each pass as one
    compile: Literal[False, True, "cuda_graphs"] = False
    evaluate_every: Positive = 1  # epochs between evaluations on the test set; the last epoch always is

    @model_validator(mode="after")
    def _momentum(self):
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum; set momentum, usually 0.9, or leave out nesterov")
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"nesterov is of optimizer sgd; leave it out with {self.optimizer}")
        return self


class Method(Section):
    """A way to train a network."""

    learns_from: ClassVar[Literal["probabilities", "experts", "features", "backbone"] | None] = None  # a cache's; a run's


class CE(Method):
    """Cross-entropy alone."""

    name: Literal["ce"]
    # instance_balanced: every sample once an epoch; class_balanced: a class, each as often, then one of its samples
    sampler: Literal["instance_balanced", "class_balanced"] = "instance_balanced"
    label_smoothing: Fraction = 0.0  # share of the label that is spread evenly over all classes


class KD(Method):
    """Cross-entropy and `alpha` T^2 KL to the teacher's tempered probabilities (Hinton et al., 2015)."""

    learns_from = "probabilities"
    name: Literal["kd"]
    alpha: Annotated[float, Field(ge=0)] = 1.0  # weight of the distillation
    temperature: Temperature | None = None  # null: the cache's; inspect says which others it serves


class BKD(Method):
    """KD from targets that are re-weighted by the effective number of samples (BKD, eq. 8)."""

    learns_from = "probabilities"
    name: Literal["bkd"]
    alpha: Annotated[float, Field(ge=0)] = 1.0  # weight of the distillation
    temperature: Temperature | None = None  # null: the cache's; inspect says which others it serves
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    reweight_from: ShareOfEpochs = 0.0  # share of the epochs without class weights; 0.8 in the CIFAR-10 recipe


class CB(Method):
    """Cross-entropy weighted by the label's inverse effective number (Cui et al., 2019).

    A batch's mean is the weighted one, as in the public code: divided by the sum of the batch's weights.
    """

    name: Literal["cb"]
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    reweight_from: ShareOfEpochs = 0.0  # share of the epochs without class weights


class Focal(Method):
    """Focal loss (Lin et al., 2017)."""

    name: Literal["focal"]
    gamma: Annotated[float, Field(ge=0)] = 1.0  # how much less a sample counts that is classified well; 0: cross-entropy


class CBFocal(Method):
    """Focal loss weighted by the label's inverse effective number (Cui et al., 2019), a batch's mean being the plain one."""

    name: Literal["cb_focal"]
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    gamma: Annotated[float, Field(ge=0)] = 1.0  # how much less a sample counts that is classified well; 0: cross-entropy
    reweight_from: ShareOfEpochs = 0.0  # share of the epochs without class weights


class LogitAdjustment(Method):
    """Cross-entropy of logits shifted by the log prior (Menon et al., 2021)."""

    name: Literal["logit_adjustment"]
    tau: Annotated[float, Field(ge=0)] = 1.0  # factor of the log prior


class LDAM(Method):
    """Margins that grow for rare classes, with deferred re-weighting (Cao et al., 2019); needs a cosine classifier.

    Re-weighted, a batch's mean is divided by the sum of its weights, as in the public code.
    """

    name: Literal["ldam"]
    max_margin: Annotated[float, Field(ge=0)] = 0.5  # of the rarest class, as a cosine
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    reweight_from: ShareOfEpochs = 0.8  # share of the epochs without class weights


class CRT(Method):
    """The backbone of another run, frozen, and a new classifier on class-balanced samples (Kang et al., 2020)."""

    learns_from = "backbone"
    name: Literal["crt"]
    batch_statistics: bool = False  # whether the frozen backbone normalises by the batch while the classifier learns


class CBD(Method):
    """(1 - alpha) CE + alpha beta (1 - cos) to the teachers' features, on class-balanced samples (CBD)."""

    learns_from = "features"
    name: Literal["cbd"]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4  # share of the distillation
    beta: Annotated[float, Field(ge=0)] = 100.0  # factor of the distance of features


class LFME(Method):
    """Self-paced distillation from one expert a shot group, on class-balanced samples (Xiang et al., 2020).

    An expert teaches less the more often the student has been right about its classes, beside the expert, in the epoch
    before, and no longer once it is as often; images that their expert is unsure of come in over the first half of the
    epochs. Both are measured on the training images that an epoch visits: the authors use a validation set, which not all
    data have. Their confidence is scaled to the range of its class and has a floor for each shot group, here it is the
    expert's probability as it is; their groups end at 100 and 20 images inclusively, here as everywhere.
    """

    learns_from = "experts"
    name: Literal["lfme"]
    theta: Fraction = 0.3  # an expert teaches in full until the student is right this many times as often


class OLTR(Method):
    """Another run's backbone, all of it training on, with a memory of class centroids (Liu et al., 2019).

    On class-balanced samples; needs model.memory. The authors draw four samples of a class in a row, here each is drawn
    alone.
    """

    learns_from = "backbone"
    name: Literal["oltr"]


class BBN(Method):
    """Two branches, of uniform and of reversed samples, that share their weight over the epochs (Zhou et al., 2020).

    Half of every batch goes to each branch, so a batch is twice as large as theirs, and what the branches share normalises
    both halves together. Needs a ResNet of model.branches 2.
    """

    name: Literal["bbn"]


class Logit(Section):
    """The logits over T less the largest of their row, float16: they serve other temperatures too."""

    name: Literal["logit"]


class Probability(Section):
    """The tempered probabilities themselves."""

    name: Literal["probability"]
    dtype: Literal["float16", "float32"] = "float16"  # 11 bits a probability in 2 bytes, or exact in 4


class Klt(Section):
    """Transform-coded log-probabilities, several times smaller."""

    name: Literal["klt"]
    max_error: Annotated[float, Field(gt=0, lt=1)] = 0.02  # mean total variation of the BKD target, held in every block


class CacheSection(Section):
    """What stage one writes."""

    temperature: Temperature = 2.0  # T of softmax(z / T), the answers that are stored
    encoding: Annotated[Logit | Probability | Klt, Field(discriminator="name")] = Logit(name="logit")  # how they are stored
    features: bool = False  # also each teacher's last feature, L2-normalised, 8 bits a number
    batch_size: Positive = 512  # fixed, so that the stored bytes do not depend on how the work was shared
    precision: Literal["float32", "bfloat16"] = "float32"  # of the teacher's forward pass


Model = Annotated[CifarResNet | TorchvisionModel | TimmModel, Field(discriminator="name")]


AnyMethod = Annotated[
    CE | KD | BKD | CB | Focal | CBFocal | LogitAdjustment | LDAM | CRT | CBD | LFME | OLTR | BBN,
    Field(discriminator="name"),
]


class TrainedNetwork(Section):
    """A network and how it is trained. Teacher and student are uses of one."""

    model: Model  # the network
    method: AnyMethod  # what is minimised
    training: Training = Training()  # by what steps
    # random colour changes of training images: mild as in the public code of cRT and OLTR, strong as of half of CBD's teachers
    color_jitter: Annotated[
        Literal[False, "mild", "strong"], BeforeValidator(lambda value: "strong" if value is True else value)
    ] = False
    expert: Literal["many", "medium", "few"] | None = None  # learns the classes of this shot group alone, to teach method lfme

    @model_validator(mode="after")
    def _fits(self):
        method, model, memory = self.method.name, self.model, self.method.name == "oltr"
        if method in ("ldam", "cbd") and model.cosine_scale is None:
            usual = {"ldam": 30, "cbd": 20}[method]
            raise ValueError(f"method {method} needs a cosine classifier: set model.cosine_scale, usually {usual}")
        if memory != model.memory:
            raise ValueError(
                f"method {method} needs a network {'with' if memory else 'without'} a memory: set "
                f"model.memory={'true' if memory else 'false'}"
            )
        if model.memory and model.cosine_scale is not None:
            raise ValueError("a memory has its own cosine classifier: leave out model.cosine_scale")
        branches = 2 if method == "bbn" else 1
        if model.branches != branches:
            raise ValueError(
                f"method {method} needs a network of {'two branches' if branches == 2 else 'one branch'}: set "
                f"model.branches={branches}; found {model.branches}"
            )
        if method == "bbn" and self.training.batch_size % 2:
            raise ValueError(f"method bbn splits every batch in two: training.batch_size {self.training.batch_size} is odd")
        if self.expert and method != "ce":
            raise ValueError(
                f"an expert of some classes is trained by method ce; found {method}; leave out expert or the method"
            )
        if self.color_jitter and self.method.learns_from in ("probabilities", "experts", "features"):
            raise ValueError(
                f"method {method} learns from a cache, which holds no answers to jittered images; leave out color_jitter"
            )
        return self


class Teacher(TrainedNetwork):
    """The network whose answers are cached."""

    method: AnyMethod = CE(name="ce")  # what is minimised; none that learns from a cache

    @model_validator(mode="after")
    def _needs_no_cache(self):
        if self.method.learns_from not in (None, "backbone"):
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

    def network(self, role: str) -> TrainedNetwork:
        """The section of `role`, "teacher" or "student"."""
        return getattr(self, role)
