"""Contradictions in augmentation, loss, optimizer and schedule; see ``resolve``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from resnet_jax.config.schema import AugmentationConfig, Config, OptimizerConfig
from resnet_jax.errors import UserError


def refuse_training_contradictions(config: Config) -> None:
    """Raises a one-sentence UserError if these sections contradict each other."""
    _refuse_crops(config)
    _refuse_policy(config)
    _refuse_device_changes(config)
    _refuse_optimizer(config.optimizer)
    _refuse_rates(config)
    _ = config.profile.range
    loss = config.loss
    if loss.target_threshold is not None and loss.kind != "sigmoid":
        raise UserError(
            f"loss.target_threshold={loss.target_threshold:g} needs binary targets, "
            f"but loss.kind is {loss.kind}: set it to sigmoid, or the threshold to None"
        )


def _refuse_crops(config: Config) -> None:
    augmentation, data = config.augmentation, config.data
    area, aspect = augmentation.crop_area, augmentation.crop_aspect
    if not _rising(aspect) or aspect[0] <= 0:
        raise UserError(
            f"augmentation.crop_aspect is (low, high), both above 0, not {aspect}"
        )
    if area is not None:
        if not _rising(area) or not 0 < area[0] <= area[1] <= 1:
            raise UserError(
                "augmentation.crop_area is (low, high), shares of an image above 0 and "
                f"up to 1, not {area}"
            )
        if data.image_size is None:
            raise UserError(
                "augmentation.crop_area needs data.image_size: the size of its crops"
            )
        for name in ("shorter_side", "pad"):
            if getattr(augmentation, name):
                raise UserError(
                    f"augmentation.crop_area and augmentation.{name} are two ways to "
                    "crop; give one"
                )
    elif aspect != AugmentationConfig.crop_aspect:
        raise UserError(
            f"augmentation.crop_aspect={aspect} applies only to crops: "
            "set augmentation.crop_area too"
        )
    for name in ("crop_area", "policy"):
        if getattr(augmentation, name) is not None and data.resident:
            raise UserError(
                f"augmentation.{name} works on the host, image by image: data.resident "
                "cannot be true"
            )


def _refuse_policy(config: Config) -> None:
    augmentation = config.augmentation
    if augmentation.policy != "randaugment":
        _refuse_changed(
            augmentation,
            ("policy_operations", "policy_magnitude", "policy_magnitude_std"),
            "augmentation",
            f"applies to randaugment, but augmentation.policy is {augmentation.policy}",
        )
    if augmentation.policy_magnitude > 10:
        raise UserError(
            "augmentation.policy_magnitude is at most 10, not "
            f"{augmentation.policy_magnitude:g}"
        )
    batch = config.training.global_batch_size
    if augmentation.repeats > batch:
        raise UserError(
            f"augmentation.repeats={augmentation.repeats} copies of an image do not "
            f"fit into training.global_batch_size={batch}: lower repeats"
        )


def _refuse_device_changes(config: Config) -> None:
    augmentation = config.augmentation
    jitter = augmentation.color_jitter
    if jitter is not None and (
        len(jitter) != 3 or not all(0 <= strength <= 1 for strength in jitter)
    ):
        raise UserError(
            "augmentation.color_jitter is (brightness, contrast, saturation), each "
            f"between 0 and 1, not {jitter}"
        )
    if augmentation.erasing_probability > 1:
        raise UserError(
            "augmentation.erasing_probability is at most 1, not "
            f"{augmentation.erasing_probability:g}"
        )
    for name in ("mixup_alpha", "cutmix_alpha"):
        if getattr(augmentation, name) and config.training.global_batch_size < 2:
            raise UserError(
                f"augmentation.{name} mixes pairs of a batch: "
                "training.global_batch_size must be at least 2, not 1"
            )


def _refuse_optimizer(optimizer: OptimizerConfig) -> None:
    if optimizer.kind == "lamb" and optimizer.nesterov:
        raise UserError(
            "optimizer.nesterov applies to sgd and lars, but optimizer.kind is lamb: "
            "set it to false"
        )
    if optimizer.kind != "lamb":
        _refuse_changed(
            optimizer,
            ("second_momentum", "epsilon"),
            "optimizer",
            f"applies to lamb, but optimizer.kind is {optimizer.kind}",
        )
    if optimizer.kind != "lars":
        _refuse_changed(
            optimizer,
            ("trust_coefficient",),
            "optimizer",
            f"applies to lars, but optimizer.kind is {optimizer.kind}",
        )
    if not optimizer.trust_coefficient:
        raise UserError(
            "optimizer.trust_coefficient=0 updates no weight: set it above 0"
        )
    if optimizer.max_grad_norm == 0:
        raise UserError(
            "optimizer.max_grad_norm=0 removes every gradient: set it above 0, or to "
            "None for no limit"
        )
    if optimizer.ema_decay is None:
        _refuse_changed(
            optimizer,
            ("ema_every_steps",),
            "optimizer",
            "needs optimizer.ema_decay, which is None",
        )


def _refuse_rates(config: Config) -> None:
    schedule, highest = config.schedule, config.optimizer.learning_rate
    if schedule.final_learning_rate and schedule.kind not in ("cosine", "polynomial"):
        raise UserError(
            f"schedule.final_learning_rate={schedule.final_learning_rate:g} needs a "
            f"cosine or polynomial schedule, but schedule.kind is {schedule.kind}: set "
            "it to 0"
        )
    if schedule.kind != "polynomial":
        _refuse_changed(
            schedule,
            ("power",),
            "schedule",
            f"applies to polynomial, but schedule.kind is {schedule.kind}",
        )
    if not schedule.power:
        raise UserError(
            "schedule.power=0 never lowers the rate: set it above 0, or schedule.kind "
            "to constant"
        )
    if schedule.warmup_initial_learning_rate and not (
        schedule.warmup_steps or schedule.warmup_epochs
    ):
        raise UserError(
            "schedule.warmup_initial_learning_rate needs a linear warm-up: "
            "set schedule.warmup_steps or schedule.warmup_epochs too"
        )
    for name in ("final_learning_rate", "warmup_initial_learning_rate"):
        value = getattr(schedule, name)
        if value > highest:
            raise UserError(
                f"schedule.{name}={value:g} is above optimizer.learning_rate="
                f"{highest:g}, the highest rate; lower it"
            )


def _refuse_changed(
    section: Any, names: Sequence[str], prefix: str, reason: str
) -> None:
    """Refuses fields without effect that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    for name in names:
        value = getattr(section, name)
        if value != defaults[name]:
            raise UserError(
                f"{prefix}.{name}={value:g} {reason}: reset it to {defaults[name]:g}"
            )


def _rising(values: Sequence[float]) -> bool:
    return len(values) == 2 and values[0] <= values[1]
