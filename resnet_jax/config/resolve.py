"""Resolves a config file, command line or dictionary to a valid ``Config``.

Every error is one sentence, raised before any device is touched.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import traceback
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_jax.config.checks import refuse_training_contradictions
from resnet_jax.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    fields,
    flatten,
)
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.options import Field, check


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> Config:
    """Reads a config file and resolves it.

    Args:
      spec: ``PATH`` or ``PATH:ARG``; the file defines ``get_config(arg)``.
      overrides: dotted field names to values as text, as on the command line.

    Raises:
      UserError: the file or a value is wrong.
    """
    config = _run_config_file(spec)
    for name, text in (overrides or {}).items():
        field = _known_field(name)
        target = config
        *sections, key = name.split(".")
        for section in sections:
            target = target[section]
        target[key] = _parse(field, text)
    return resolve(config)


def resolve(config: Any) -> Config:
    """The typed, valid config of a run.

    Args:
      config: a ConfigDict, a nested dictionary, or a Config, which is returned as
        it is.

    Raises:
      UserError: an unknown field, a wrong type, a value out of range or a
        contradiction, in one sentence.
    """
    if isinstance(config, Config):
        return config
    given = flatten(config)
    for name, default in _REMOVED.items():
        if given.pop(name, default) != default:
            raise UserError(
                f"config field {name} no longer exists; only its old default, "
                f"{default!r}, can be loaded"
            )
    for name in given:
        _known_field(name)
    values = {
        name: _checked(field, given.get(name, field.default))
        for name, field in fields().items()
    }
    resolved = _build(Config, values)
    _refuse_contradictions(resolved)
    return resolved


_REMOVED = {"model.norm_arithmetic": "wide", "model.stem_form": "conv"}
"""Fields of older runs and their defaults."""


def _checked(field: Field, value: Any) -> Any:
    return check(dataclasses.replace(field, name=f"config field {field.name}"), value)


def _build(cls: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A (nested) dataclass from dotted names and values."""
    return cls(
        **{
            field.name: _build(field.type, values, f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(field.type)
            else values[prefix + field.name]
            for field in dataclasses.fields(cls)
        }
    )


def _run_config_file(spec: str) -> Any:
    import ml_collections

    before, _, arg = spec.partition(".py:")
    path = Path(before + ".py" if arg else spec)
    if not path.is_file():
        raise UserError(
            f"config file {path} does not exist; give the path of a file such as "
            "configs/digits.py or configs/cifar10.py:cifar_resnet56"
        )
    module_spec = importlib.util.spec_from_file_location("resnet_jax_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"{path} defines no get_config(); see configs/digits.py")
        takes_arg = bool(inspect.signature(get_config).parameters)
        if arg and not takes_arg:
            raise UserError(f"{path}: its get_config takes no argument, not {arg!r}")
        config = get_config(arg) if arg else get_config()
    except UserError:
        raise
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {message}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"{path}: get_config must return a ConfigDict made by default_config(), "
            f"not {type(config).__name__}"
        )
    return config


def _known_field(name: str) -> Field:
    schema = fields()
    if name in schema:
        return schema[name]
    inside = [known for known in schema if known.startswith(name + ".")]
    if inside:
        raise UserError(
            f"config field {name} is a section; set one of {', '.join(inside)}"
        )
    section, _, key = name.rpartition(".")
    siblings = [known for known in schema if known.rpartition(".")[0] == section]
    keys = [known.rpartition(".")[2] for known in siblings]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if close:
        hint = f"did you mean {siblings[keys.index(close[0])]}?"
    else:
        elsewhere = [known for known in schema if known.rpartition(".")[2] == key]
        elsewhere += difflib.get_close_matches(name, schema, n=1, cutoff=0.8)
        listed = f"{section} has {', '.join(keys)}" if keys else "see train --help"
        hint = f"did you mean {elsewhere[0]}?" if elsewhere else listed
    raise UserError(f"unknown config field {name}; {hint}")


def _parse(field: Field, text: str) -> Any:
    """A command-line value, converted from text but not checked."""
    if text == "None":
        return None
    if "bool" in str(field.annotation) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if typing.get_origin(field.annotation) is tuple and "str" in str(field.annotation):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if "str" in str(field.annotation):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if "tuple" in str(field.annotation) and not isinstance(value, (tuple, list)):
        value = (value,)
    if "int" in str(field.annotation):
        value = _integral(value)
    return value


def _integral(value: Any) -> Any:
    """Converts a whole float such as 64e3 to an integer."""
    if isinstance(value, (tuple, list)):
        return tuple(_integral(item) for item in value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_contradictions(config: Config) -> None:
    """Raises UserError where fields contradict each other."""
    # Refuses unknown models and options that the model lacks.
    create_model(config.model.name, **model_options(config.model))
    if config.model.new_head and config.model.weights is None:
        raise UserError(
            "model.new_head replaces the classifier of model.weights: set it"
        )
    if config.seed + config.seeds > 2**31:
        raise UserError(
            f"the last of seeds={config.seeds} from seed={config.seed} on is not below "
            "2147483648: lower seed"
        )
    if config.model.initialization is not None and config.model.weights is not None:
        raise UserError(
            f"model.initialization={config.model.initialization} applies only to fresh "
            "weights, but model.weights is set: set one of them to None"
        )
    _refuse_durations(config)
    _refuse_schedule(config)
    _refuse_data(config)
    refuse_training_contradictions(config)
    batch, groups = config.training.global_batch_size, config.model.batch_norm_groups
    if batch % groups:
        raise UserError(
            f"model.batch_norm_groups={groups} does not divide "
            f"training.global_batch_size={batch}"
        )
    _refuse_cut_groups(config)
    if config.optimizer.nesterov and not config.optimizer.momentum:
        raise UserError("optimizer.nesterov needs optimizer.momentum above 0")
    if config.checkpoint.best and not _holds_out(config):
        raise UserError(
            "checkpoint.best chooses by the held-out error, never on the test set: "
            "set data.holdout_examples or data.holdout_split"
        )


def _refuse_cut_groups(config: Config) -> None:
    """Refuses micro-batches that would split batch normalisation groups."""
    parts, groups = config.training.micro_batches, config.model.batch_norm_groups
    if groups == 1 or groups % parts == 0:
        return
    choices = [str(count) for count in range(1, groups + 1) if groups % count == 0]
    raise UserError(
        f"training.micro_batches={parts} does not divide model.batch_norm_groups="
        f"{groups}, and a micro-batch holds whole groups: choose from "
        f"{', '.join(choices)}"
    )


def _holds_out(config: Config) -> bool:
    """Whether the run holds out examples for choosing."""
    return bool(config.data.holdout_examples or config.data.holdout_split)


def model_options(config: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of ``create_model`` that a config sets.

    Options at their default are left out: not every net has all of them.
    """
    not_the_nets = {"name", "dtype", "weights", "new_head", "frozen"}
    default = ModelConfig()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in not_the_nets
        and getattr(config, field.name) != getattr(default, field.name)
    }


def _refuse_durations(config: Config) -> None:
    training, schedule = config.training, config.schedule
    if training.steps is not None and training.epochs is not None:
        raise UserError(
            f"training.steps={training.steps} and training.epochs={training.epochs:g} "
            "are both set; give one and set the other to None"
        )
    if training.steps is None and not training.epochs:
        raise UserError("set training.steps or training.epochs: the length of the run")
    unit, other = (
        ("steps", "epochs") if training.epochs is None else ("epochs", "steps")
    )
    for name in ("boundaries", "warmup"):
        if getattr(schedule, f"{name}_{other}") is not None:
            raise UserError(
                f"schedule.{name}_{other} is set, but the run's length is given in "
                f"{unit}; use schedule.{name}_{unit}: one unit a run"
            )


def _refuse_schedule(config: Config) -> None:
    schedule = config.schedule
    boundaries = schedule.boundaries_steps or schedule.boundaries_epochs
    if (schedule.kind == "piecewise") != bool(boundaries):
        raise UserError(
            f"schedule.kind={schedule.kind} and schedule boundaries {boundaries} "
            "contradict each other: piecewise needs boundaries, other kinds take none"
        )
    if boundaries and list(boundaries) != sorted(set(boundaries)):
        raise UserError(f"schedule boundaries must increase, not {boundaries}")
    by_error = (schedule.warmup_learning_rate, schedule.warmup_until_error)
    if (by_error[0] is None) != (by_error[1] is None):
        raise UserError(
            "schedule.warmup_learning_rate and schedule.warmup_until_error go "
            "together: set both or neither"
        )
    if by_error[0] is not None and (schedule.warmup_steps or schedule.warmup_epochs):
        raise UserError(
            "schedule has a linear warm-up and one by the training error; give one"
        )
    if schedule.kind == "plateau" and not _holds_out(config):
        raise UserError(
            "schedule.kind=plateau watches the held-out error, never the test set: "
            "set data.holdout_examples or data.holdout_split"
        )


def _refuse_data(config: Config) -> None:
    data, augmentation = config.data, config.augmentation
    if data.holdout_split is not None and data.holdout_examples:
        raise UserError(
            f"data.holdout_split={data.holdout_split} and data.holdout_examples="
            f"{data.holdout_examples} are two ways to hold examples out; give one"
        )
    sides = augmentation.shorter_side
    if sides is not None:
        if len(sides) != 2 or sides[0] > sides[1]:
            raise UserError(f"augmentation.shorter_side is (low, high), not {sides}")
        if data.image_size is None or sides[0] < data.image_size:
            raise UserError(
                f"augmentation.shorter_side={sides} needs data.image_size, and no side "
                f"below it; data.image_size is {data.image_size}"
            )
        if augmentation.pad:
            raise UserError(
                "augmentation.shorter_side and augmentation.pad are two ways to crop; "
                "give one"
            )
        if data.resident:
            raise UserError(
                "augmentation.shorter_side crops on the host, image by image: "
                "data.resident cannot be true"
            )
    crops = sides is not None or augmentation.crop_area is not None
    _refuse_evaluation_sizes(data, crops)


def _refuse_evaluation_sizes(data: DataConfig, crops: bool) -> None:
    if data.eval_image_size is not None:
        if data.image_size is None:
            raise UserError(
                f"data.eval_image_size={data.eval_image_size} needs data.image_size, "
                "the size in training"
            )
        if data.normalization == "per_pixel_mean" and (
            data.eval_image_size != data.image_size
        ):
            raise UserError(
                f"data.eval_image_size={data.eval_image_size} is another size than "
                f"that of the mean image, data.image_size={data.image_size}: set "
                "data.normalization=per_channel or imagenet"
            )
        if data.eval_image_size != data.image_size and not crops:
            raise UserError(
                f"data.eval_image_size={data.eval_image_size} is another size than "
                f"data.image_size={data.image_size}, and training makes no crops of "
                "its own: set augmentation.crop_area or augmentation.shorter_side"
            )
    size = data.eval_image_size or data.image_size
    if data.eval_shorter_side is not None and (
        size is None or data.eval_shorter_side < size
    ):
        raise UserError(
            f"data.eval_shorter_side={data.eval_shorter_side} needs a data.image_size "
            f"(in evaluation data.eval_image_size) that is not larger; it is {size}"
        )
