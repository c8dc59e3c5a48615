"""The combinations of fields that ``resolve`` refuses."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from resnet_jax.config.detection import DetectionConfig
from resnet_jax.config.schema import OPTIMIZERS, TRACKERS, Config, fields, flatten
from resnet_jax.errors import UserError, nearest

_ABOVE_ZERO = (
    "optimizer.trust_coefficient",
    "optimizer.max_grad_norm",
    "optimizer.layer_decay",
    "schedule.power",
)

_RANDAUGMENT = ("augmentation.policy", ("randaugment",))
_APPLIES_TO = {
    "augmentation.policy_operations": _RANDAUGMENT,
    "augmentation.policy_magnitude": _RANDAUGMENT,
    "augmentation.policy_magnitude_std": _RANDAUGMENT,
    "loss.target_threshold": ("loss.kind", ("sigmoid",)),
    "optimizer.momentum": ("optimizer.kind", OPTIMIZERS),
    "optimizer.nesterov": ("optimizer.kind", ("sgd", "lars")),
    "optimizer.second_momentum": ("optimizer.kind", ("lamb",)),
    "optimizer.epsilon": ("optimizer.kind", ("lamb",)),
    "optimizer.trust_coefficient": ("optimizer.kind", ("lars",)),
    "schedule.final_learning_rate": ("schedule.kind", ("cosine", "polynomial")),
    "schedule.power": ("schedule.kind", ("polynomial",)),
}
"""A field that may differ from its default only if another has one of these values."""

_NEEDS = (
    ("model.new_head", "model.weights"),
    ("model.frozen_statistics", "model.weights"),
    ("data.eval_image_size", "data.image_size"),
    ("data.eval_shorter_side", "data.image_size"),
    ("augmentation.shorter_side", "data.image_size"),
    ("augmentation.crop_area", "data.image_size"),
    ("augmentation.crop_aspect", "augmentation.crop_area"),
    ("optimizer.ema_every_steps", "optimizer.ema_decay"),
    ("schedule.warmup_learning_rate", "schedule.warmup_until_error"),
    ("schedule.warmup_until_error", "schedule.warmup_learning_rate"),
)
"""A field that may differ from its default only if the other is not None."""

_EXCLUSIVE = (
    ("model.initialization", "model.weights"),
    ("data.holdout_split", "data.holdout_examples"),
    ("augmentation.shorter_side", "augmentation.pad"),
    ("augmentation.shorter_side", "augmentation.crop_area"),
    ("augmentation.crop_area", "augmentation.pad"),
    # The host does these image by image, so the data cannot stay on the device.
    ("augmentation.shorter_side", "data.resident"),
    ("augmentation.crop_area", "data.resident"),
    ("augmentation.policy", "data.resident"),
    ("schedule.warmup_learning_rate", "schedule.warmup_steps"),
    ("schedule.warmup_learning_rate", "schedule.warmup_epochs"),
)
"""Fields of which at most one may be set."""


_MOST_BATCH_PIXELS = 2**38
"""Most pixels of a batch, as of 2**20 images of 512 x 512."""


def refuse_contradictions(config: Any) -> None:
    """Raises a UserError if fields contradict each other.

    It is one sentence, or a list if there are several contradictions.
    """
    checks: tuple[Callable[[Any], Iterator[str]], ...] = (
        *(_model, _optimizer, _profile, _tracking, _tables, _length, _schedule),
        *(_ranges, _held_out, _evaluation_size, _counts),
    )
    if isinstance(config, DetectionConfig):
        checks = (*checks[:7], _detection_weights, _detector, _detection_training)
    sentences = [sentence for check in checks for sentence in check(config)]
    if len(sentences) == 1:
        raise UserError(sentences[0])
    if sentences:
        raise UserError(
            "\n- ".join([f"{len(sentences)} faults in the config:", *sentences])
        )


def _model(config: Config) -> Iterator[str]:
    """Refuses unknown models and options that the model lacks."""
    from resnet_jax.config.build import model_options
    from resnet_jax.models import create_model

    try:
        create_model(config.model.name, **model_options(config.model))
    except UserError as error:
        yield str(error)


def _optimizer(config: Config) -> Iterator[str]:
    """Refuses unknown optimizers and arguments that the optimizer lacks."""
    kind, arguments = config.optimizer.kind, config.optimizer.arguments
    if kind not in OPTIMIZERS:
        from resnet_jax.config.build import build_optax

        try:
            build_optax(config.optimizer)
        except UserError as error:
            yield str(error)
    elif arguments:
        yield (
            f"optimizer.arguments={','.join(arguments)} is for an optimizer of optax, "
            f"but optimizer.kind is {kind}, whose options are fields of their own: "
            "train --help lists them"
        )


def _profile(config: Config) -> Iterator[str]:
    try:
        _ = config.profile.range
    except UserError as error:
        yield str(error)


def _tracking(config: Config) -> Iterator[str]:
    names = config.tracking.trackers
    for name in names:
        if name not in TRACKERS:
            yield (
                f"tracking.trackers takes {', '.join(TRACKERS)}, not {name[:40]!r}; "
                f"{nearest(name[:40], TRACKERS)}"
            )
    if len(set(names)) < len(names):
        yield f"tracking.trackers={','.join(names)[:80]} names a tracker twice"


def _tables(config: Config) -> Iterator[str]:
    schema: Any = type(config)
    defaults = {field.name: field.default for field in fields(schema).values()}
    values = flatten(config)
    changed = {
        name
        for name, value in values.items()
        if value != defaults[name] and value is not False
    }
    for one, other in _EXCLUSIVE:
        if {one, other} <= changed:
            yield (
                f"{one}={values[one]} and {other}={values[other]} exclude each other: "
                "set only one"
            )
    if (
        values.get("data.normalization") == "weights"
        and not {"model.weights", "model.new_head"} & changed
    ):
        yield "data.normalization=weights needs model.weights: set it too"
    for name, needed in _NEEDS:
        if name in changed and needed not in changed:
            yield f"{name}={values[name]} needs {needed}: set it too"
    for name, (other, valid) in _APPLIES_TO.items():
        if name in changed and values[other] not in valid:
            yield (
                f"{name}={values[name]} needs {other}={' or '.join(valid)}, but it is "
                f"{values[other]}: change it, or reset {name} to {defaults[name]}"
            )
    for name in _ABOVE_ZERO:
        if values.get(name) == 0:
            yield f"{name} must be above 0, not 0"


def _ranges(config: Config) -> Iterator[str]:
    augmentation = config.augmentation
    side, jitter = augmentation.shorter_side, augmentation.color_jitter
    area, aspect = augmentation.crop_area, augmentation.crop_aspect
    if side is not None and not _rising(side):
        yield f"augmentation.shorter_side is (low, high), not {side}"
    if side is not None and side[0] < (config.data.image_size or 0):
        yield (
            f"augmentation.shorter_side={side} must not be below data.image_size="
            f"{config.data.image_size}"
        )
    if not _rising(aspect):
        yield f"augmentation.crop_aspect is (low, high), not {aspect}"
    if area is not None and not _rising(area):
        yield f"augmentation.crop_area is (low, high), not {area}"
    if jitter is not None and len(jitter) != 3:
        yield (
            "augmentation.color_jitter is (brightness, contrast, saturation), not "
            f"{jitter}"
        )


_STEPS, _EPOCHS = "steps", "epochs"


def _length(config: Config) -> Iterator[str]:
    """Lengths are all counted in steps, or all in epochs."""
    training, schedule = config.training, config.schedule
    if training.steps and training.epochs:
        by_steps, by_epochs = _only(config, _STEPS), _only(config, _EPOCHS)
        yield (
            f"training.steps={training.steps} and training.epochs={training.epochs:g} "
            f"exclude each other: to count the run in steps, add {by_steps}; to count "
            f"it in epochs, add {by_epochs}"
        )
        return
    if training.steps is None and not training.epochs:
        yield "set training.steps or training.epochs: the length of the run"
        return
    unit, other = (_STEPS, _EPOCHS) if training.steps else (_EPOCHS, _STEPS)
    for name in ("boundaries", "warmup"):
        if getattr(schedule, f"{name}_{other}") is not None:
            yield (
                f"training.{unit} counts the run in {unit}: set schedule.{name}_{unit} "
                f"instead of schedule.{name}_{other}, or add {_only(config, unit)}"
            )


def _only(config: Config, unit: str) -> str:
    """The overrides without which lengths are counted in another unit."""
    values = flatten(config)
    other = _EPOCHS if unit == _STEPS else _STEPS
    names = ("training.", "schedule.boundaries_", "schedule.warmup_")
    reset = [name + other for name in names if values[name + other] is not None]
    overrides = [f"--config.{name}=None" for name in reset]
    falls = values["schedule.kind"] == "piecewise"
    if falls and not values[f"schedule.boundaries_{unit}"]:
        overrides.append("--config.schedule.kind=constant")
    starts = values["schedule.warmup_initial_learning_rate"] > 0
    if starts and not values[f"schedule.warmup_{unit}"]:
        overrides.append("--config.schedule.warmup_initial_learning_rate=0")
    return " ".join(overrides)


def _schedule(config: Config) -> Iterator[str]:
    schedule = config.schedule
    boundaries = schedule.boundaries_steps or schedule.boundaries_epochs
    if (schedule.kind == "piecewise") != bool(boundaries):
        yield (
            f"schedule.kind={schedule.kind} and schedule boundaries {boundaries} "
            "contradict each other: piecewise needs boundaries, other kinds take none"
        )
    if boundaries and list(boundaries) != sorted(set(boundaries)):
        yield f"schedule boundaries must increase, not {boundaries}"
    warm_up = schedule.warmup_steps or schedule.warmup_epochs
    if schedule.warmup_initial_learning_rate and not warm_up:
        yield (
            "schedule.warmup_initial_learning_rate needs schedule.warmup_steps or "
            "schedule.warmup_epochs: set one"
        )
    highest = config.optimizer.learning_rate
    for name in ("final_learning_rate", "warmup_initial_learning_rate"):
        if (value := getattr(schedule, name)) > highest:
            yield (
                f"schedule.{name}={value:g} is above optimizer.learning_rate="
                f"{highest:g}, the highest rate: lower it"
            )


def _held_out(config: Config) -> Iterator[str]:
    if config.data.holdout_examples or config.data.holdout_split:
        return
    for name, chosen in (
        ("schedule.kind=plateau", config.schedule.kind == "plateau"),
        ("checkpoint.best", config.checkpoint.best),
    ):
        if chosen:
            yield (
                f"{name} uses the held-out error, never the test error: set "
                "data.holdout_examples or data.holdout_split"
            )


def _evaluation_size(config: Config) -> Iterator[str]:
    data, augmentation = config.data, config.augmentation
    size = data.eval_image_size or data.image_size
    if data.eval_shorter_side is not None and data.eval_shorter_side < (size or 0):
        yield (
            f"data.eval_shorter_side={data.eval_shorter_side} is below the image size "
            f"of evaluation, {size}: raise it"
        )
    if size == data.image_size or data.image_size is None:
        return
    sizes = (
        f"data.eval_image_size={size} differs from data.image_size={data.image_size}"
    )
    if data.normalization == "per_pixel_mean":
        yield (
            f"{sizes}, the size of the mean image: set data.normalization=per_channel "
            "or imagenet"
        )
    if augmentation.crop_area is None and augmentation.shorter_side is None:
        yield (
            f"{sizes}, but training does not crop: set augmentation.crop_area or "
            "augmentation.shorter_side"
        )


def _counts(config: Config) -> Iterator[str]:
    batch, groups = config.training.global_batch_size, config.model.batch_norm_groups
    parts, augmentation = config.training.micro_batches, config.augmentation
    if batch % groups:
        yield (
            f"model.batch_norm_groups={groups} does not divide "
            f"training.global_batch_size={batch}"
        )
    if groups > 1 and groups % parts:
        choices = [str(count) for count in range(1, groups + 1) if groups % count == 0]
        yield (
            f"training.micro_batches={parts} does not divide model.batch_norm_groups="
            f"{groups}, and a micro-batch holds whole groups: choose from "
            f"{', '.join(choices)}"
        )
    side = config.data.image_size or 1
    if batch * side**2 > _MOST_BATCH_PIXELS:
        yield (
            f"training.global_batch_size={batch} images of {side} x {side} pixels "
            f"(data.image_size) are more than {_MOST_BATCH_PIXELS:,} pixels: lower one"
        )
    if augmentation.repeats > batch:
        yield (
            f"augmentation.repeats={augmentation.repeats} is above "
            f"training.global_batch_size={batch}: lower it"
        )
    if batch < 2 and (augmentation.mixup_alpha or augmentation.cutmix_alpha):
        yield "mixup and cutmix mix pairs: set training.global_batch_size above 1"
    if config.optimizer.nesterov and not config.optimizer.momentum:
        yield "optimizer.nesterov needs optimizer.momentum above 0"
    if config.seed + config.seeds > 2**31:
        yield (
            f"seed={config.seed} and seeds={config.seeds} reach beyond 2147483647: "
            "lower seed"
        )


def _detection_weights(config: DetectionConfig) -> Iterator[str]:
    """Frozen random weights would train to nothing, without an error."""
    model = config.model
    if model.weights is None and model.frozen:
        yield (
            f"model.frozen={','.join(model.frozen)} would freeze random weights: set "
            "model.weights too, or leave model.frozen at None"
        )
    proposer = config.training.proposals or model.weights
    if config.training.procedure == "fast_rcnn" and proposer is None:
        yield (
            "training.procedure=fast_rcnn trains on the proposals of a finished run: "
            "set training.proposals or model.weights to its workdir"
        )


def _detector(config: DetectionConfig) -> Iterator[str]:
    detector, data = config.detector, config.data
    for low, high in (
        ("rpn_low", "rpn_high"),
        ("roi_low", "roi_high"),
        ("test_proposals", "test_candidates"),
        ("train_proposals", "train_candidates"),
    ):
        if getattr(detector, low) > getattr(detector, high):
            yield (
                f"detector.{low}={getattr(detector, low)} is above detector.{high}="
                f"{getattr(detector, high)}: lower it"
            )
    for name in ("anchor_sizes", "anchor_ratios"):
        if not getattr(detector, name):
            yield f"detector.{name} must name at least one"
    if data.shorter_side > data.longer_side:
        yield (
            f"data.shorter_side={data.shorter_side} is above data.longer_side="
            f"{data.longer_side}: lower it"
        )
    scales = detector.test_scales
    rises = all(a < b for a, b in itertools.pairwise(scales))
    if scales and not (rises and data.shorter_side in scales):
        yield (
            f"detector.test_scales={','.join(map(str, scales))} must rise and contain "
            f"data.shorter_side={data.shorter_side}, at which regions are proposed: "
            "change them"
        )


def _detection_training(config: DetectionConfig) -> Iterator[str]:
    if config.schedule.kind == "plateau" or config.checkpoint.best:
        yield (
            "schedule.kind=plateau and checkpoint.best use a held-out error, which "
            "detection does not measure: choose others"
        )
    if config.schedule.warmup_until_error is not None:
        yield (
            "schedule.warmup_until_error uses the training error, which detection does "
            "not measure: use schedule.warmup_steps"
        )
    if config.seeds > 1 and config.training.procedure == "rpn":
        yield (
            f"seeds={config.seeds} compares precisions, which training.procedure=rpn "
            "lacks: train each seed on its own"
        )
    if config.training.proposals and config.training.procedure != "fast_rcnn":
        yield (
            "training.proposals needs training.procedure=fast_rcnn, but it is "
            f"{config.training.procedure}: change it"
        )


def _rising(values: Sequence[Any]) -> bool:
    return len(values) == 2 and values[0] <= values[1]
