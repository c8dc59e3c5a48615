"""The schema of a run: every field, its default and its meaning."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resnet_jax.errors import UserError
from resnet_jax.machine import usable_cores
from resnet_jax.models import shortcuts
from resnet_jax.models.blocks import STRIDE_VERSIONS
from resnet_jax.models.convolution import (
    ALGORITHMS,
    INITIALIZATIONS,
    STEM_ALGORITHMS,
)
from resnet_jax.models.fused import ARITHMETICS, VARIANCES
from resnet_jax.models.normalization import NORMALIZATIONS as NET_NORMALIZATIONS

if TYPE_CHECKING:
    import ml_collections

NORMALIZATIONS = ("per_pixel_mean", "per_channel", "imagenet", "none")
INTERPOLATIONS = ("bilinear", "bicubic")
PARTIAL_BATCHES = ("span", "drop")
ON_ERROR = ("stop", "skip")
POLICIES = ("randaugment", "trivialaugment")
OPTIMIZERS = ("sgd", "lars", "lamb")
DECAY_SCOPES = ("all", "all_but_norm", "kernels")
LOSSES = ("softmax", "sigmoid")
SCHEDULES = ("constant", "piecewise", "cosine", "polynomial", "plateau")


def option(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    below: float | None = None,
    operational: bool = False,
) -> Any:
    """A field of the schema.

    Args:
      default: its default; None in an optional field means what ``meaning`` says.
      meaning: one line of documentation.
      choices: the valid strings.
      at_least: the smallest valid number.
      below: valid numbers are smaller than this.
      operational: it changes where or how fast a run happens and not its result, so
        that it may change when a run goes on.
    """
    metadata = {
        "meaning": meaning,
        "choices": choices,
        "at_least": at_least,
        "below": below,
        "operational": operational,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The net."""

    name: str = option("cifar_resnet20", "a name of resnet_jax.list_models()")
    shortcut: str | None = option(
        None,
        "A, B, C, pooled or none, or one of those that He et al. 2016 compare with the "
        "identity; None: the net's own",
        choices=tuple(shortcuts.BY_NAME),
    )
    stride_version: str | None = option(
        None,
        "where a bottleneck strides: v1 the first 1x1 (paper), v1.5 the 3x3; None: the "
        "net's own",
        choices=STRIDE_VERSIONS,
    )
    block_convs: int | None = option(
        None, "3x3 convolutions of a basic block; None: the net's own", at_least=1
    )
    squeeze_excite: bool | None = option(
        None, "gate residual functions by their channels' means; None: the net's own"
    )
    zero_init_last: bool | None = option(
        None,
        "a block's last normalisation starts with scale zero; None: the net's own",
    )
    stochastic_depth_rate: float | None = option(
        None,
        "with which the last block is dropped in training, growing linearly from the "
        "first; None: the net's own",
        at_least=0,
        below=1,
    )
    dropout_rate: float | None = option(
        None,
        "of the net's own kind of dropout; None: the net's own",
        at_least=0,
        below=1,
    )
    gate_bias: float | None = option(
        None,
        "the first bias of the gates of a highway net or gated shortcut; None: the "
        "net's own",
    )
    normalization: str | None = option(
        None,
        "batch, or none: a residual or plain net without, whose convolutions have "
        "biases; None: the net's own",
        choices=NET_NORMALIZATIONS,
    )
    initialization: str | None = option(
        None,
        "of kernels: he (fan-out), he_fan_in, xavier or normal_0.01; a residual or "
        "plain net's classifier keeps its own; None: the net's own",
        choices=tuple(INITIALIZATIONS),
    )
    weights: str | None = option(
        None, "file or hub name of weights to start from; None: fresh ones"
    )
    new_head: bool = option(
        False, "start with a fresh classifier in place of that of model.weights"
    )
    frozen: tuple[str, ...] = option(
        (), "parts that training leaves as they are: stem,stage1"
    )
    dtype: str = option(
        "float32",
        "dtype of convolutions and maps; all else is float32",
        choices=("float32", "bfloat16"),
    )
    batch_norm_groups: int = option(
        1, "parts of the global batch with statistics of their own", at_least=1
    )
    batch_norm_momentum: float = option(
        0.9, "decay of the running statistics (torch's 0.1 is 0.9)", at_least=0, below=1
    )
    batch_norm_epsilon: float = option(1e-5, "added to the variance", at_least=0)
    norm_variance: str = option(
        "two_pass",
        "how batch normalisation computes the variance: fast reads the map once, and "
        "is wrong where the mean is large beside the deviation",
        choices=VARIANCES,
    )
    norm_arithmetic: str = option(
        "wide",
        "of normalised maps in training: wide is float32, narrow is the dtype of the "
        "maps, which rounds more",
        choices=ARITHMETICS,
    )
    fused_norm: bool = option(
        False,
        "normalisation, addition and ReLU as one function whose gradient keeps less",
    )
    stem_form: str = option(
        "conv",
        "how an ImageNet net's 7x7 convolution is computed, with the same parameters",
        choices=("conv", *STEM_ALGORITHMS),
    )
    scan: bool | None = option(
        None,
        "run equal blocks as one loop, which compiles in less time; None: for nets too "
        "deep to unroll",
    )
    remat: bool = option(
        False, "compute a block's inside again for the gradient, to save memory"
    )
    conv_algorithm: str = option(
        "auto",
        "how convolutions are computed: auto is the faster one for the device",
        choices=ALGORITHMS,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and its preparation."""

    name: str = option(
        "digits", "a tfds name, or name:version; with a path, the name in reports"
    )
    path: str | None = option(
        None,
        "folder that prepare made, or of train/CLASS/IMAGE, CIFAR binary or idx files; "
        "None: tfds",
        operational=True,
    )
    data_dir: str | None = option(
        None,
        "where tfds data sets are prepared; None: ~/tensorflow_datasets",
        operational=True,
    )
    train_split: str = option("train", "split to train on, or a part: train[:90%]")
    test_split: str = option("test", "split for the reported error")
    holdout_split: str | None = option(
        None, "split for choosing, never trained on: train[90%:]"
    )
    holdout_examples: int = option(
        0,
        "so many examples drawn from train_split are kept aside for choosing instead",
        at_least=0,
    )
    partial_batch: str = option(
        "span",
        "what an epoch's last examples do where they fill no batch: span shares a "
        "batch with the next epoch, drop leaves them out",
        choices=PARTIAL_BATCHES,
    )
    image_size: int | None = option(
        None, "side of the net's input; None: as stored", at_least=1
    )
    eval_image_size: int | None = option(
        None, "side of the net's input in evaluation; None: image_size", at_least=1
    )
    eval_shorter_side: int | None = option(
        None,
        "shorter side before the centre crop of evaluation; None: its image size",
        at_least=1,
    )
    eval_interpolation: str = option(
        "bilinear",
        "of that resizing, antialiased; as PIL's",
        choices=INTERPOLATIONS,
    )
    normalization: str = option(
        "per_pixel_mean",
        "of pixels in [0, 1]: subtract the training set's mean image; or its channels' "
        "mean and divide by their standard deviation; or ImageNet's; or nothing",
        choices=NORMALIZATIONS,
    )
    statistics_examples: int | None = option(
        None, "training images the statistics are taken over; None: all", at_least=1
    )
    resident: bool | None = option(
        None,
        "keep the whole data set on the device; None: if it fits resident_mib",
        operational=True,
    )
    resident_mib: int = option(
        1024, "size up to which a data set is kept there", at_least=0, operational=True
    )
    num_threads: int | None = option(
        None,
        "threads that read and decode, in each process; None: a few more than cores, "
        "which suits local files; stores in a network want more",
        at_least=1,
        operational=True,
    )
    num_processes: int = option(
        0,
        "processes that read and decode, where one's threads are not enough; 0: none "
        "beside the run's own",
        at_least=0,
        operational=True,
    )
    prefetch_batches: int = option(
        4, "batches made ahead of the step", at_least=1, operational=True
    )
    on_error: str = option(
        "stop",
        "at a broken image: stop the run, or skip: replace it by another, and tell",
        choices=ON_ERROR,
        operational=True,
    )

    @property
    def threads(self) -> int:
        """``num_threads``, or what suits this machine.

        Measured on two cores: three or four threads read faster than two, and sixteen
        a fifth slower, for they hand Python's lock around.
        """
        return self.num_threads or usable_cores() // max(1, self.num_processes) + 2


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of the training images."""

    pad: int = option(0, "zero pixels a side before a random crop", at_least=0)
    flip: bool = option(False, "mirror half of the images")
    shorter_side: tuple[int, ...] | None = option(
        None, "(low, high): shorter side drawn from it before a random crop"
    )
    crop_area: tuple[float, ...] | None = option(
        None, "(low, high): share of the image that a random crop has (Inception's)"
    )
    crop_aspect: tuple[float, ...] = option(
        (3 / 4, 4 / 3), "(low, high): width over height of that crop"
    )
    policy: str | None = option(
        None, "random operations on the host's crops", choices=POLICIES
    )
    policy_operations: int = option(2, "randaugment: operations an image", at_least=0)
    policy_magnitude: float = option(
        9.0, "randaugment: their strength, of 10", at_least=0, below=10.001
    )
    policy_magnitude_std: float = option(
        0.5, "randaugment: standard deviation of the strength", at_least=0
    )
    repeats: int = option(
        1, "differently augmented copies of an image in its batch", at_least=1
    )
    color_jitter: tuple[float, ...] | None = option(
        None, "(brightness, contrast, saturation): largest relative change of each"
    )
    color_noise: float = option(
        0.0, "standard deviation of the PCA colour noise (AlexNet's: 0.1)", at_least=0
    )
    erasing_probability: float = option(
        0.0, "with which a rectangle of an image is erased", at_least=0, below=1.001
    )
    mixup_alpha: float = option(
        0.0,
        "of the beta distribution that mixes pairs of images; 0: no mixup. With cutmix "
        "too, each batch takes one of both",
        at_least=0,
    )
    cutmix_alpha: float = option(
        0.0, "the same for pasted rectangles; 0: no cutmix", at_least=0
    )

    @property
    def on_host(self) -> bool:
        """Whether the host changes images one by one; it then flips them too."""
        return (
            self.shorter_side is not None
            or self.crop_area is not None
            or self.policy is not None
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    kind: str = option(
        "softmax",
        "cross-entropy of the softmax, or binary ones of each class's sigmoid",
        choices=LOSSES,
    )
    label_smoothing: float = option(
        0.0, "probability spread evenly over all classes", at_least=0, below=1
    )
    target_threshold: float | None = option(
        None,
        "sigmoid: a class of larger weight in a mixed image has target 1, every other "
        "0; None: the weights are the targets",
        at_least=0,
        below=1,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent as in the paper, LARS or LAMB."""

    kind: str = option("sgd", "the rule of the update", choices=OPTIMIZERS)
    learning_rate: float = option(0.1, "its highest value", at_least=0)
    momentum: float = option(
        0.9, "decay of the velocity; lamb: of the first moment", at_least=0, below=1
    )
    second_momentum: float = option(
        0.999, "lamb: decay of the second moment", at_least=0, below=1
    )
    epsilon: float = option(1e-6, "lamb: added to that moment's root", at_least=0)
    trust_coefficient: float = option(
        0.001, "lars: times a layer's norm over its gradient's", at_least=0
    )
    nesterov: bool = option(False, "sgd, lars: Nesterov's momentum (the paper: no)")
    weight_decay: float = option(
        1e-4,
        "times each parameter, added to its gradient; lamb: to its update",
        at_least=0,
    )
    weight_decay_scope: str = option(
        "all",
        "what decays: all parameters, all but those of normalisation, or the kernels "
        "of convolutions and dense layers",
        choices=DECAY_SCOPES,
    )
    max_grad_norm: float | None = option(
        None, "longer gradients are scaled down to this global norm", at_least=0
    )
    ema_decay: float | None = option(
        None,
        "also average parameters and statistics with this decay, and evaluate those",
        at_least=0,
        below=1,
    )
    ema_every_steps: int = option(1, "steps between these averagings", at_least=1)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time."""

    kind: str = option("constant", "how the rate falls", choices=SCHEDULES)
    boundaries_steps: tuple[int, ...] | None = option(
        None, "piecewise: completed steps at which the rate is multiplied by factor"
    )
    boundaries_epochs: tuple[float, ...] | None = option(
        None, "piecewise: the same in epochs"
    )
    factor: float = option(0.1, "piecewise, plateau: the multiplier", at_least=0)
    power: float = option(
        2.0,
        "polynomial: of the share of steps after the warm-up that are left",
        at_least=0,
    )
    final_learning_rate: float = option(
        0.0, "cosine, polynomial: the rate at the end of the run", at_least=0
    )
    warmup_steps: int | None = option(
        None, "the rate rises linearly over these steps", at_least=1
    )
    warmup_epochs: float | None = option(None, "the same in epochs", at_least=0)
    warmup_initial_learning_rate: float = option(
        0.0, "the rate before the first step of that rise", at_least=0
    )
    warmup_learning_rate: float | None = option(
        None, "rate until the training error is below warmup_until_error", at_least=0
    )
    warmup_until_error: float | None = option(
        None, "training error that ends that warm-up for good", at_least=0, below=1
    )
    warmup_error_decay: float = option(
        0.9, "decay of the average of batch errors compared", at_least=0, below=1
    )
    plateau_patience: int = option(
        5, "plateau: evaluations without a better held-out error", at_least=1
    )
    plateau_min_improvement: float = option(
        0.001, "plateau: how much lower an error must be to count", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length of a run."""

    steps: int | None = option(None, "optimizer steps", at_least=1)
    epochs: float | None = option(None, "passes over the training set", at_least=0)
    global_batch_size: int = option(
        128, "examples a step, over all devices", at_least=1
    )
    micro_batches: int = option(
        1,
        "parts of the global batch computed one after another, their gradients "
        "averaged: less memory, the same step",
        at_least=1,
    )
    log_every_steps: int = option(100, "steps a row of metrics.jsonl", at_least=1)
    steps_per_call: int | None = option(
        None,
        "steps that one call of the compiled program runs, at most; None: 1 on the "
        "CPU, where a loop slows convolutions down, and for streamed data; else 128",
        at_least=1,
        operational=True,
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training."""

    every_steps: int | None = option(None, "None: once an epoch", at_least=1)
    batch_size: int | None = option(
        None,
        "examples a batch; None: as many as training computes at once",
        at_least=1,
        operational=True,
    )
    precise_statistics_examples: int = option(
        0,
        "training examples over which the batch statistics are taken anew at the end "
        "of the run, in whole batches; 0: the running averages stay",
        at_least=0,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every_steps: int | None = option(None, "None: once an epoch", at_least=1)
    keep_last: int = option(2, "newest checkpoints kept", at_least=1)
    keep_every_steps: int | None = option(
        None, "also keep those at multiples of this many steps", at_least=1
    )
    best: bool = option(False, "also keep the one with the lowest held-out error")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run lies on its devices and hosts."""

    fully_sharded: bool = option(
        False,
        "cut parameters and the optimizer's state over the devices, and gather them "
        "where they are used: less memory a device",
        operational=True,
    )
    peer_timeout_seconds: int = option(
        60,
        "with several processes: how long one may show no sign of life until the "
        "others stop",
        at_least=2,
        operational=True,
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profile for xprof, in the workdir."""

    steps: str | None = option(
        None,
        "FIRST:END traces steps from FIRST up to and without END; None: no trace",
        operational=True,
    )

    @property
    def range(self) -> range | None:
        """The steps to trace.

        Raises:
          UserError: they are not FIRST:END.
        """
        if self.steps is None:
            return None
        first, _, end = self.steps.partition(":")
        if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
            raise UserError(
                f"profile.steps is FIRST:END, such as 10:20, not {self.steps!r}"
            )
        return range(int(first), int(end))


@dataclasses.dataclass(frozen=True)
class Config:
    """A run, resolved and valid."""

    seed: int = option(
        0, "of initialisation, order and augmentation", at_least=0, below=2**31
    )
    seeds: int = option(
        1,
        "so many runs, of this seed and of those after it, each in a folder of the "
        "workdir; the result is their mean and standard deviation",
        at_least=1,
        operational=True,
    )
    compilation_cache: str | None = option(
        "cache",
        "folder for compiled programs, from the workdir on: a restart need not compile "
        "again; None: none",
        operational=True,
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augmentation: AugmentationConfig = dataclasses.field(
        default_factory=AugmentationConfig
    )
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the schema, by its dotted name."""

    name: str
    annotation: Any
    default: Any
    meaning: str
    choices: Sequence[str] | None
    at_least: float | None
    below: float | None
    operational: bool


def fields() -> dict[str, Field]:
    """The schema: dotted name to field, in order."""

    def walk(cls: type, prefix: str) -> Iterator[Field]:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            name = prefix + field.name
            if dataclasses.is_dataclass(hints[field.name]):
                yield from walk(hints[field.name], name + ".")
            else:
                yield Field(name, hints[field.name], field.default, **field.metadata)

    return {field.name: field for field in walk(Config, "")}


def flatten(config: Any) -> dict[str, Any]:
    """A Config, ConfigDict or nested dictionary as dotted name to value."""

    def walk(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in mapping.items():
            if hasattr(value, "items"):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    if isinstance(config, Config):
        config = dataclasses.asdict(config)
    return dict(walk(config, ""))


def default_config() -> "ml_collections.ConfigDict":
    """The defaults as a ConfigDict, for a config file to change."""
    # Imported here: what reads a Config, the train step included, does without it.
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def describe_type(annotation: Any) -> str:
    """A field's type in words, for error sentences and the help."""
    if isinstance(annotation, types.UnionType):
        inner, _ = typing.get_args(annotation)
        return f"{describe_type(inner)} or None"
    if typing.get_origin(annotation) is tuple:
        inner = typing.get_args(annotation)[0]
        kind = {int: "integers", float: "numbers", str: "strings"}[inner]
        return f"a tuple of {kind}"
    return {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a string",
    }[annotation]
