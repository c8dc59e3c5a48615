"""The schema of a run: every field, its default and its meaning."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from resnet_jax.environment import usable_cores
from resnet_jax.errors import UserError
from resnet_jax.options import (
    BELOW_ONE,
    Field,
    ModelOptions,
    declared,
    option,
)

if TYPE_CHECKING:
    import ml_collections

NORMALIZATIONS = ("per_pixel_mean", "per_channel", "imagenet", "weights", "none")
INTERPOLATIONS = ("bilinear", "bicubic")
PARTIAL_BATCHES = ("span", "drop")
ON_ERROR = ("stop", "skip")
POLICIES = ("randaugment", "trivialaugment")
TRACKERS = ("tensorboard", "wandb", "mlflow")
OPTIMIZERS = ("sgd", "lars", "lamb")
"""Defined here; other names are optax's."""
DECAY_SCOPES = ("all", "all_but_norm", "kernels")
LOSSES = ("softmax", "sigmoid")
SCHEDULES = ("constant", "piecewise", "cosine", "polynomial", "plateau")

# Limits for numbers of a kind, far above what research needs. Their products fit 64
# bits, and steps fit the 32 bits that devices count with.
MOST_STEPS = 10**9
MOST_EPOCHS = 10**6
MOST_EXAMPLES = 10**10
MOST_PIXELS = 8192
"""Longest side of an image."""
MOST_BATCH = 2**20
MOST_RATE = 1e38
"""The range of float32: a rate may be absurd, to see a run diverge."""
MOST_SEEDS = 10_000
MAX_IMAGE_PIXELS = 89_478_485
"""Pillow's limit too: 256 MiB of RGB."""


@dataclasses.dataclass(frozen=True)
class ModelConfig(ModelOptions):
    """The net: the options of ``create_model``, and the weights to start from."""

    weights: str | None = option(
        None, "file or hub name of initial weights; None: random"
    )
    new_head: bool = option(
        False, "replace the classifier of model.weights by a new one"
    )
    frozen: tuple[str, ...] = option((), "parts not trained, such as stem,stage1")
    frozen_statistics: bool = option(
        False, "keep the batch statistics of model.weights in all parts"
    )


@dataclasses.dataclass(frozen=True)
class ReadingConfig:
    """How images are read, for classifiers and detectors."""

    prefetch_batches: int = option(
        4,
        "batches prepared ahead of the step",
        at_least=1,
        operational=True,
        at_most=1000,
    )
    on_error: str = option(
        "stop",
        "at a broken image: stop the run, or skip it: use another and report it",
        choices=ON_ERROR,
        operational=True,
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "an image whose header states more pixels is broken; bounds the memory",
        at_least=1,
        at_most=2**40,
        operational=True,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(ReadingConfig):
    """The data set and its preparation."""

    name: str = option(
        "digits", "a tfds name, or name:version; with a path, the name in reports"
    )
    path: str | None = option(
        None,
        "output of prepare, or folder of train/CLASS/IMAGE, CIFAR or idx files; None: "
        "tfds",
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
        None, "split that choices may use, never trained on: train[90%:]"
    )
    holdout_examples: int = option(
        0,
        "random examples of train_split to hold out instead",
        at_least=0,
        at_most=MOST_EXAMPLES,
    )
    partial_batch: str = option(
        "span",
        "last examples of an epoch that fill no batch: span shares a batch with the "
        "next epoch, drop leaves them out",
        choices=PARTIAL_BATCHES,
    )
    image_size: int | None = option(
        None,
        "side of the net's input; None: as stored",
        at_least=1,
        at_most=MOST_PIXELS,
    )
    eval_image_size: int | None = option(
        None,
        "side of the net's input in evaluation; None: image_size",
        at_least=1,
        at_most=MOST_PIXELS,
    )
    eval_shorter_side: int | None = option(
        None,
        "shorter side before evaluation's centre crop; None: image size",
        at_least=1,
        at_most=MOST_PIXELS,
    )
    eval_interpolation: str = option(
        "bilinear",
        "antialiased filter of that resize, as PIL's",
        choices=INTERPOLATIONS,
    )
    normalization: str = option(
        "per_pixel_mean",
        "of pixels in [0, 1]: subtract the training set's mean image; or subtract its "
        "channel means and divide by their deviations; or use ImageNet's, or those of "
        "model.weights; or nothing",
        choices=NORMALIZATIONS,
    )
    statistics_examples: int | None = option(
        None,
        "training images for these statistics; None: all",
        at_least=1,
        at_most=MOST_EXAMPLES,
    )
    resident: bool | None = option(
        None,
        "keep the whole data set on the device; None: if it fits resident_mib",
        operational=True,
    )
    resident_mib: int = option(
        1024,
        "largest data set kept on the device, MiB",
        at_least=0,
        operational=True,
        at_most=10**9,
    )
    num_threads: int | None = option(
        None,
        "threads per process that read and decode; None: a few more than cores, which "
        "suits local files; network storage needs more",
        at_least=1,
        operational=True,
        at_most=1024,
    )
    num_processes: int = option(
        0,
        "processes that read and decode, if one process is not enough; 0: only the run",
        at_least=0,
        operational=True,
        at_most=256,
    )

    @property
    def threads(self) -> int:
        """``num_threads``, or a number that suits this machine.

        On two cores, three or four threads read faster than two, and sixteen a fifth
        slower because they contend for Python's lock.
        """
        return self.num_threads or usable_cores() // max(1, self.num_processes) + 2


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Random augmentation of the training images."""

    pad: int = option(
        0, "zero pixels added per side before a random crop", at_least=0, at_most=1024
    )
    flip: bool = option(False, "mirror each image with probability one half")
    shorter_side: tuple[int, ...] | None = option(
        None,
        "(low, high): range of the shorter side before a random crop",
        at_least=1,
        at_most=MOST_PIXELS,
    )
    crop_area: tuple[float, ...] | None = option(
        None,
        "(low, high): range of a random crop's share of the image (Inception)",
        at_least=1e-4,
        at_most=1,
    )
    crop_aspect: tuple[float, ...] = option(
        (3 / 4, 4 / 3),
        "(low, high): range of that crop's width over height",
        at_least=0.01,
        at_most=100,
    )
    policy: str | None = option(
        None, "random operations on the crops, on the host", choices=POLICIES
    )
    policy_operations: int = option(
        2, "randaugment: operations per image", at_least=0, at_most=100
    )
    policy_magnitude: float = option(
        9.0, "randaugment: strength, from 0 to 10", at_least=0, at_most=10
    )
    policy_magnitude_std: float = option(
        0.5, "randaugment: standard deviation of the strength", at_least=0, at_most=100
    )
    repeats: int = option(
        1,
        "differently augmented copies of each image in a batch",
        at_least=1,
        at_most=1000,
    )
    color_jitter: tuple[float, ...] | None = option(
        None,
        "(brightness, contrast, saturation): largest relative change of each",
        at_least=0,
        at_most=1,
    )
    color_noise: float = option(
        0.0,
        "standard deviation of the PCA colour noise (AlexNet's: 0.1)",
        at_least=0,
        at_most=100,
    )
    erasing_probability: float = option(
        0.0, "probability of erasing a rectangle of an image", at_least=0, at_most=1
    )
    mixup_alpha: float = option(
        0.0,
        "parameter of mixup's beta distribution; 0: no mixup. With cutmix too, each "
        "batch uses one of them",
        at_least=0,
        at_most=1000,
    )
    cutmix_alpha: float = option(
        0.0, "the same for cutmix; 0: no cutmix", at_least=0, at_most=1000
    )

    @property
    def on_host(self) -> bool:
        """Whether the host augments each image; it then flips them too."""
        options = (self.shorter_side, self.crop_area, self.policy)
        return any(option is not None for option in options)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss."""

    kind: str = option(
        "softmax",
        "softmax cross-entropy, or sigmoid: binary cross-entropy per class",
        choices=LOSSES,
    )
    label_smoothing: float = option(
        0.0, "probability spread evenly over all classes", at_least=0, at_most=BELOW_ONE
    )
    target_threshold: float | None = option(
        None,
        "sigmoid: classes of a mixed image with a larger weight get target 1, others "
        "0; None: the weights are the targets",
        at_least=0,
        at_most=BELOW_ONE,
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent as in the paper, LARS, LAMB, or one of optax."""

    kind: str = option(
        "sgd", "sgd, lars or lamb; or an optimizer of optax by its name, such as adamw"
    )
    arguments: tuple[str, ...] = option(
        (), "of an optimizer of optax, by their names there, such as b2=0.95,eps=1e-6"
    )
    learning_rate: float = option(
        0.1, "highest learning rate", at_least=0, at_most=MOST_RATE
    )
    momentum: float = option(
        0.9,
        "sgd, lars: decay of the velocity; lamb: of the first moment",
        at_least=0,
        at_most=BELOW_ONE,
    )
    second_momentum: float = option(
        0.999, "lamb: decay of the second moment", at_least=0, at_most=BELOW_ONE
    )
    epsilon: float = option(
        1e-6, "lamb: added to the root of the second moment", at_least=0, at_most=1
    )
    trust_coefficient: float = option(
        0.001,
        "lars: factor of a layer's norm over its gradient's norm",
        at_least=0,
        at_most=1000,
    )
    nesterov: bool = option(False, "sgd, lars: Nesterov's momentum (the paper: no)")
    weight_decay: float = option(
        1e-4,
        "factor of each parameter added to its gradient; lamb, optax: to its update",
        at_least=0,
        at_most=1000,
    )
    weight_decay_scope: str = option(
        "all",
        "what decays: all parameters, all but normalisation's, or only kernels of "
        "convolutions and dense layers",
        choices=DECAY_SCOPES,
    )
    max_grad_norm: float | None = option(
        None,
        "scale gradients down to this global norm; None: never",
        at_least=0,
        at_most=10**9,
    )
    layer_decay: float = option(
        1.0,
        "factor of the learning rate from each part of the net to the one before it: "
        "the head has the full rate, the last stage layer_decay times that, and so on",
        at_least=0,
        at_most=1,
    )
    ema_decay: float | None = option(
        None,
        "decay of averages of parameters and statistics, which are then evaluated; "
        "None: no averages",
        at_least=0,
        at_most=BELOW_ONE,
    )
    ema_every_steps: int = option(
        1, "steps per update of these averages", at_least=1, at_most=MOST_STEPS
    )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time."""

    kind: str = option("constant", "how the rate falls", choices=SCHEDULES)
    boundaries_steps: tuple[int, ...] | None = option(
        None,
        "piecewise: completed steps after which the rate is multiplied by factor",
        at_least=0,
        at_most=MOST_STEPS,
    )
    boundaries_epochs: tuple[float, ...] | None = option(
        None, "piecewise: the same in epochs", at_least=0, at_most=MOST_EPOCHS
    )
    factor: float = option(
        0.1, "piecewise, plateau: the multiplier", at_least=0, at_most=1000
    )
    power: float = option(
        2.0,
        "polynomial: power of the remaining share of the steps after the warm-up",
        at_least=0,
        at_most=100,
    )
    final_learning_rate: float = option(
        0.0,
        "cosine, polynomial: the rate at the end of the run",
        at_least=0,
        at_most=MOST_RATE,
    )
    warmup_steps: int | None = option(
        None, "length of a linear warm-up", at_least=1, at_most=MOST_STEPS
    )
    warmup_epochs: float | None = option(
        None, "the same in epochs", at_least=0, at_most=MOST_EPOCHS
    )
    warmup_initial_learning_rate: float = option(
        0.0, "learning rate at the start of the warm-up", at_least=0, at_most=MOST_RATE
    )
    warmup_learning_rate: float | None = option(
        None,
        "rate until the training error is below warmup_until_error",
        at_least=0,
        at_most=MOST_RATE,
    )
    warmup_until_error: float | None = option(
        None, "training error that ends this warm-up", at_least=0, at_most=BELOW_ONE
    )
    warmup_error_decay: float = option(
        0.9,
        "decay of the running average of batch errors",
        at_least=0,
        at_most=BELOW_ONE,
    )
    plateau_patience: int = option(
        5,
        "plateau: evaluations without improvement of the held-out error",
        at_least=1,
        at_most=MOST_STEPS,
    )
    plateau_min_improvement: float = option(
        0.001,
        "plateau: smallest decrease of the error that counts",
        at_least=0,
        at_most=1,
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length of a run."""

    steps: int | None = option(None, "optimizer steps", at_least=1, at_most=MOST_STEPS)
    epochs: float | None = option(
        None, "passes over the training set", at_least=0, at_most=MOST_EPOCHS
    )
    global_batch_size: int = option(
        128, "examples per step, in all", at_least=1, at_most=MOST_BATCH
    )
    micro_batches: int = option(
        1,
        "parts of the batch computed in turn, with averaged gradients: the same step "
        "with less memory",
        at_least=1,
        at_most=MOST_BATCH,
    )
    log_every_steps: int | None = option(
        None,
        "steps per row of metrics.jsonl; None: 100, or a 20th of a shorter run",
        at_least=1,
        at_most=MOST_STEPS,
        operational=True,
    )
    steps_per_call: int | None = option(
        None,
        "most steps per call of the compiled program; None: 1 for streamed data and on "
        "the CPU, where a loop slows convolutions down, else 128",
        at_least=1,
        operational=True,
        at_most=10_000,
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training."""

    every_steps: int | None = option(
        None, "None: once per epoch", at_least=1, at_most=MOST_STEPS
    )
    batch_size: int | None = option(
        None,
        "examples per batch; None: as many as training computes at once",
        at_least=1,
        operational=True,
        at_most=MOST_BATCH,
    )
    precise_statistics_examples: int = option(
        0,
        "training examples, in whole batches, that give the final batch statistics; 0: "
        "keep the running averages",
        at_least=0,
        at_most=MOST_EXAMPLES,
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept."""

    every_steps: int | None = option(
        None, "None: once per epoch", at_least=1, at_most=MOST_STEPS
    )
    keep_last: int = option(
        2, "number of newest checkpoints to keep", at_least=1, at_most=10**6
    )
    keep_every_steps: int | None = option(
        None,
        "also keep checkpoints at multiples of this",
        at_least=1,
        at_most=MOST_STEPS,
    )
    best: bool = option(False, "also keep the checkpoint of the lowest held-out error")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is distributed over devices and hosts."""

    fully_sharded: bool = option(
        False,
        "shard parameters and optimizer state over the devices, and gather them where "
        "used: less memory per device",
        operational=True,
    )
    peer_timeout_seconds: int = option(
        60,
        "stop if another process of the run gives no sign of life for this long",
        at_least=2,
        operational=True,
        at_most=7 * 24 * 3600,
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profile for xprof, written to the workdir."""

    steps: str | None = option(
        None,
        "FIRST:END traces steps FIRST to END - 1; None: none",
        operational=True,
    )

    @property
    def range(self) -> range | None:
        """The steps to trace.

        Raises:
          UserError: the text is not FIRST:END.
        """
        if self.steps is None:
            return None
        match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", self.steps)
        first, end = map(int, match.groups()) if match else (0, 0)
        if not 0 < first < end <= MOST_STEPS:
            raise UserError(
                f"profile.steps is FIRST:END, such as 10:20, not {self.steps[:40]!r}"
            )
        return range(first, end)


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where the curves of a run go, beside metrics.jsonl."""

    trackers: tuple[str, ...] = option(
        ("tensorboard",),
        f"any of {', '.join(TRACKERS)}; () for none",
        operational=True,
    )
    project: str = option(
        "resnet_jax",
        "the project of wandb, the experiment of mlflow",
        operational=True,
    )
    images_every_steps: int | None = option(
        None,
        "also track an augmented batch and histograms of the parameters at this "
        "interval; None: never",
        at_least=1,
        at_most=MOST_STEPS,
        operational=True,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """The valid configuration of a run."""

    seed: int = option(
        0,
        "seed of initialisation, order and augmentation",
        at_least=0,
        at_most=2**31 - 1,
    )
    seeds: int = option(
        1,
        "number of runs, with this seed and the next ones, each in a folder of the "
        "workdir; reports mean and standard deviation",
        at_least=1,
        operational=True,
        at_most=MOST_SEEDS,
    )
    compilation_cache: str | None = option(
        "cache",
        "folder of compiled programs, relative to the workdir, so restarts need not "
        "compile again; None: none",
        operational=True,
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    profile: ProfileConfig = ProfileConfig()
    tracking: TrackingConfig = TrackingConfig()


@functools.cache
def fields(schema: type = Config) -> Mapping[str, Field]:
    """The fields of ``Config`` or ``DetectionConfig`` by dotted name, in order."""
    return {field.name: field for field in declared(schema)}


def flatten(config: Any) -> dict[str, Any]:
    """A Config, ConfigDict or nested dictionary as dotted name to value."""

    def walk(mapping: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in mapping.items():
            if hasattr(value, "items"):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return dict(walk(config, ""))


def changed_fields(config: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, by dotted name."""
    defaults = flatten(type(config)())
    return {
        name: value
        for name, value in flatten(config).items()
        if value != defaults[name]
    }


def default_config(schema: Any = Config) -> "ml_collections.ConfigDict":
    """The defaults of a schema as a ConfigDict, for a config file to change."""
    # Imported here because the training step must not need it.
    import ml_collections

    return ml_collections.ConfigDict(dataclasses.asdict(schema()), type_safe=False)
