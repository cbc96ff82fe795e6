"""Sections of methods, by kind: their own papers' values are the defaults."""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from offline_bkd.pipeline.schema.base import Fraction, Section, ShareOfEpochs, Temperature


class MethodSection(Section):
    """A way to train a network."""

    title: ClassVar[str | None] = None  # what a person calls it, if not by the name of the class
    learns_from: ClassVar[Literal["probabilities", "experts", "features", "backbone"] | None] = None  # a cache's; a run's
    draws: ClassVar[Literal["epochs", "samples"]] = "epochs"  # every sample once an epoch, or each by itself
    balances: ClassVar[bool] = True  # its network answers as if all classes were as frequent
    whole_batches: ClassVar[bool] = False  # it looks at a batch as a whole, which processes cannot share
    branches: ClassVar[int] = 1  # of its network; each has its part of a batch
    memory: ClassVar[bool] = False  # of its network
    usual_cosine_scale: ClassVar[int | None] = None  # of the cosine classifier that its network must have

    @property
    def learns_from_cache(self) -> bool:
        return self.learns_from not in (None, "backbone")


class CE(MethodSection):
    """Cross-entropy alone."""

    balances = False
    name: Literal["ce"]
    # instance_balanced: every sample once an epoch; class_balanced: a class, each as often, then one of its samples
    sampler: Literal["instance_balanced", "class_balanced"] = "instance_balanced"
    label_smoothing: Fraction = 0.0  # share of the label that is spread evenly over all classes


class KD(MethodSection):
    """Cross-entropy and `alpha` T^2 KL to the teacher's tempered probabilities (Hinton et al., 2015)."""

    learns_from = "probabilities"
    balances = False
    name: Literal["kd"]
    alpha: Annotated[float, Field(ge=0)] = 1.0  # weight of the distillation
    temperature: Temperature | None = None  # null: the cache's; inspect says which others it serves


class BKD(MethodSection):
    """KD from targets that are re-weighted by the effective number of samples (BKD, eq. 8)."""

    learns_from = "probabilities"
    name: Literal["bkd"]
    alpha: Annotated[float, Field(ge=0)] = 1.0  # weight of the distillation
    temperature: Temperature | None = None  # null: the cache's; inspect says which others it serves
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    reweight_from: ShareOfEpochs = 0.0  # share of the epochs without class weights; 0.8 in the CIFAR-10 recipe


class CB(MethodSection):
    """Cross-entropy weighted by the label's inverse effective number (Cui et al., 2019).

    A batch's mean is the weighted one, as in the public code: divided by the sum of the batch's weights.
    """

    name: Literal["cb"]
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    reweight_from: ShareOfEpochs = 0.0  # share of the epochs without class weights


class Focal(MethodSection):
    """Focal loss (Lin et al., 2017), with the gamma of LDAM's and BKD's public scripts; its authors' is 2."""

    balances = False
    name: Literal["focal"]
    gamma: Annotated[float, Field(ge=0)] = 1.0  # how much less a sample counts that is classified well; 0: cross-entropy


class CBFocal(MethodSection):
    """Focal loss weighted by the label's inverse effective number (Cui et al., 2019), a batch's mean being the plain one.

    Of the softmax, beta and gamma as in LDAM's and BKD's public scripts; Cui et al.'s is of a sigmoid for each class.
    """

    title = "CB-Focal"
    name: Literal["cb_focal"]
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    gamma: Annotated[float, Field(ge=0)] = 1.0  # how much less a sample counts that is classified well; 0: cross-entropy
    reweight_from: ShareOfEpochs = 0.0  # share of the epochs without class weights


class LogitAdjustment(MethodSection):
    """Cross-entropy of logits shifted by the log prior (Menon et al., 2021)."""

    title = "Logit-adjusted"
    name: Literal["logit_adjustment"]
    tau: Annotated[float, Field(ge=0)] = 1.0  # factor of the log prior


class LDAM(MethodSection):
    """Margins that grow for rare classes, with deferred re-weighting (Cao et al., 2019); needs a cosine classifier.

    Re-weighted, a batch's mean is divided by the sum of its weights, as in the public code.
    """

    usual_cosine_scale = 30
    name: Literal["ldam"]
    max_margin: Annotated[float, Field(ge=0)] = 0.5  # of the rarest class, as a cosine
    beta: Fraction = 0.9999  # of the effective number (1 - beta^n) / (1 - beta) of n samples
    reweight_from: ShareOfEpochs = 0.8  # share of the epochs without class weights


class CRT(MethodSection):
    """The backbone of another run, frozen, and a new classifier on class-balanced samples (Kang et al., 2020).

    The authors draw four samples of a class in a row, here each is drawn alone.
    """

    title = "cRT"
    learns_from = "backbone"
    draws = "samples"
    name: Literal["crt"]
    batch_statistics: bool = False  # whether the frozen backbone normalises by the batch while the classifier learns


class CBD(MethodSection):
    """(1 - alpha) CE + alpha beta (1 - cos) to the teachers' features, on class-balanced samples (CBD)."""

    learns_from = "features"
    draws = "samples"
    usual_cosine_scale = 20
    name: Literal["cbd"]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4  # share of the distillation
    beta: Annotated[float, Field(ge=0)] = 100.0  # factor of the distance of features


class LFME(MethodSection):
    """Self-paced distillation from one expert a shot group, on class-balanced samples (Xiang et al., 2020).

    An expert teaches less the more often the student has been right about its classes, beside the expert, in the epoch
    before, and no longer once it is as often; images that their expert is unsure of come in over the first half of the
    epochs. Both are measured on the training images that an epoch visits: the authors use a validation set, which not all
    data have. The authors scale the confidence to the range of its class, with a floor for each shot group; here it is the
    expert's probability as it is. Their many-shot classes begin at 100 images and few-shot end at 20, here they are above
    100 and below 20. They draw four samples of a class in a row, here each is drawn alone.
    """

    learns_from = "experts"
    draws = "samples"
    whole_batches = True
    name: Literal["lfme"]
    theta: Fraction = 0.3  # an expert's loss counts in full while the student's accuracy is below theta times its own


class OLTR(MethodSection):
    """Another run's backbone, training on or frozen, with a memory of class centroids (Liu et al., 2019).

    On class-balanced samples; needs model.memory. The authors draw four samples of a class in a row, here each is drawn
    alone.
    """

    learns_from = "backbone"
    draws = "samples"
    whole_batches = True
    memory = True
    name: Literal["oltr"]
    freeze_backbone: bool = False  # true: its weights stay, and training.backbone_rate is of attention and projection


class BBN(MethodSection):
    """Two branches, of uniform and of reversed samples, that share their weight over the epochs (Zhou et al., 2020).

    Half of every batch goes to each branch, so a batch is twice as large as theirs, and what the branches share normalises
    both halves together. Needs a ResNet of model.branches 2.
    """

    draws = "samples"
    branches = 2
    name: Literal["bbn"]
    # share of the uniform branch after the last epoch; 0.19 in the public code for iNaturalist, which counts 100 epochs for 90
    final_share: Fraction = 0.0


AnyMethod = Annotated[
    CE | KD | BKD | CB | Focal | CBFocal | LogitAdjustment | LDAM | CRT | CBD | LFME | OLTR | BBN,
    Field(discriminator="name"),
]

METHODS = {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in get_args(get_args(AnyMethod)[0])}  # by name
