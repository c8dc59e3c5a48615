"""``create_model``: a net of the catalog, with options."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from resnet_jax.errors import UserError
from resnet_jax.models import shortcuts
from resnet_jax.models.catalog import catalog_entry
from resnet_jax.models.conv import INITIALIZATIONS
from resnet_jax.models.factories import class_of, field_names
from resnet_jax.models.highway import HighwayNet
from resnet_jax.models.mlp import HighwayMLP, PlainMLP
from resnet_jax.models.norm import NoNorm
from resnet_jax.models.resnet import ResNet, plan_strides
from resnet_jax.models.stages import OverlappingStage
from resnet_jax.models.vgg import VGG
from resnet_jax.models.wrappers import SqueezeExcite
from resnet_jax.options import ModelOptions, check, declared

Net = ResNet | VGG | HighwayNet | PlainMLP | HighwayMLP

_OPTIONS = {
    field.name: field
    for field in declared(ModelOptions)
    if field.name not in ("name", "dtype")
}
_NORM_FIELDS = {
    "batch_norm_groups": "groups",
    "batch_norm_momentum": "momentum",
    "batch_norm_epsilon": "epsilon",
    "fused_norm": "fused",
}
_BLOCK_FIELDS = {
    "stride_version": "stride_version",
    "block_convs": "num_convs",
    "squeeze_excite": "squeeze_excite",
    "zero_init_last": "zero_init_last",
}
_NAMES = {field: option for option, field in (_NORM_FIELDS | _BLOCK_FIELDS).items()}
_NAMES["kernel_init"] = "initialization"


def create_model(
    name: str,
    *,
    num_classes: int | Literal["published"] | None = "published",
    output_stride: int | None = None,
    batch_norm_frozen: bool | Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Net:
    """A Linen module by its name in the catalog.

    Options that are None or not given are the net's own, as published.

    Args:
      name: one of ``list_models()``, for example "resnet50" or "cifar_resnet56", or
        another depth of ``FAMILIES``.
      num_classes: classes of the classifier; None returns pooled features;
        "published" is the data set that the net was published for.
      output_stride: 8, 16 or 32 of an ImageNet net; below 32 the last stages dilate.
      batch_norm_frozen: True, or the parts ("stem", "stage1") whose normalisation
        keeps its running statistics in training.
      dtype: dtype of convolutions and maps; parameters, statistics and logits are
        always float32.
      **options: fields of ``resnet_jax.options.ModelOptions``:

    Raises:
      UserError: an unknown name, or an option that the net lacks or refuses.
    """
    unknown = [key for key in options if key not in _OPTIONS]
    if unknown:
        raise TypeError(f"create_model() got an unexpected option {unknown[0]!r}")
    entry = catalog_entry(name)
    net: Any = entry.net
    if num_classes == "published":
        num_classes = entry.num_classes
    is_whole = isinstance(num_classes, numbers.Integral)
    if num_classes is not None and (not is_whole or num_classes < 1):  # type: ignore[operator]
        raise UserError(
            f"num_classes must be an integer of at least 1, not {num_classes!r}"
        )
    given = {
        key: check(_OPTIONS[key], value)
        for key, value in options.items()
        if value is not None
    }
    frozen = {"batch_norm_frozen": batch_norm_frozen or False}
    _refuse_unnormalized(given | frozen)
    fields = _as_fields(name, net, given)
    if batch_norm_frozen is not None:
        fields["batch_norm_frozen"] = batch_norm_frozen
    if output_stride is not None:
        fields["output_stride"] = output_stride
    _refuse_unknown(name, fields, field_names(net))
    if isinstance(net, ResNet):
        _check_output_stride(net, output_stride)
        if class_of(net.stage) is OverlappingStage:
            _refuse_overlapping(name, given)
        elif "scan" not in fields:
            fields["scan"] = scans_by_default(sum(net.stage_sizes))
    return net.clone(num_classes=num_classes, dtype=dtype, **fields)


def scans_by_default(blocks: int) -> bool:
    """Whether a net with this many blocks runs them as loops by default.

    Compile time grows faster than depth: on a CPU 22 s for 110 layers (54 blocks) and
    more than 120 s for 302 (150 blocks), but 9 s as a loop. At depth 110 a step takes
    about as long in a loop at batch 8, and 1.4 (with remat) to 2.5 times as long at
    batch 128 (benchmarks/results/deep_nets*.json). The rule is the same for every
    device because it decides the layout of checkpoints.
    """
    return blocks > 100


def _as_fields(name: str, net: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The net's fields that the options set."""
    fields = dict(options)
    norm = {new: fields.pop(key) for key, new in _NORM_FIELDS.items() if key in fields}
    block = {
        new: fields.pop(key) for key, new in _BLOCK_FIELDS.items() if key in fields
    }
    if "shortcut" in fields:
        fields["shortcut"] = shortcuts.BY_NAME[fields["shortcut"]]
    if "initialization" in fields:
        fields["kernel_init"] = INITIALIZATIONS[fields.pop("initialization")]
    shortcut = fields.get("shortcut", getattr(net, "shortcut", None))
    if isinstance(shortcut, shortcuts.Gated) and "gate_bias" in fields:
        bias = fields.pop("gate_bias")
        fields["shortcut"] = dataclasses.replace(shortcut, bias=bias)
    if isinstance(net, ResNet):
        fields["block"] = _with_options(name, net.block, block)
        if fields.pop("normalization", None) == "none":
            return fields | {"norm": NoNorm}
    else:
        _refuse_unknown(name, block, ())
    if "norm" in field_names(net) and getattr(net, "batch_norm", True):
        fields["norm"] = functools.partial(net.norm, **norm) if norm else net.norm
    else:
        # A VGG without normalisation runs with the recipes of its relatives.
        ignored = ("groups", "momentum", "epsilon") if isinstance(net, VGG) else ()
        _refuse_unknown(name, norm, ignored)
    return fields


def _with_options(name: str, block: Any, options: dict[str, Any]) -> Any:
    """The block with its options set."""
    if "squeeze_excite" in options:
        options["squeeze_excite"] = SqueezeExcite if options["squeeze_excite"] else None
    known = field_names(block)
    if "stride_version" not in known:
        # Only one convolution of a basic block can stride: both versions agree.
        options.pop("stride_version", None)
    _refuse_unknown(name, options, known)
    return functools.partial(block, **options) if options else block


def _refuse_unnormalized(options: dict[str, Any]) -> None:
    if options.get("normalization") != "none":
        return
    for option in (*_NORM_FIELDS, "batch_norm_frozen", "zero_init_last"):
        if options.get(option, False) is not False:
            raise UserError(
                f"{option}={options[option]} acts on batch normalisation, but "
                f"normalization is none: leave {option} out, or at its default in a "
                "config"
            )


def _refuse_overlapping(name: str, options: dict[str, Any]) -> None:
    """Refuses options of blocks, which single layers lack."""
    rates = ("stochastic_depth_rate", "dropout_rate")
    of_blocks = ("scan", "remat", *rates, "block_convs", "zero_init_last")
    _refuse_unknown(name, [key for key in of_blocks if options.get(key)], ())


def _refuse_unknown(name: str, fields: Iterable[str], valid: Container[str]) -> None:
    for field in fields:
        if field not in valid:
            raise UserError(f"model {name} has no option {_NAMES.get(field, field)}")


def _check_output_stride(net: ResNet, output_stride: int | None) -> None:
    try:
        plan_strides(len(net.stage_sizes), class_of(net.stem).strides[1], output_stride)
    except ValueError as error:
        raise UserError(str(error)) from error


def _document(function: Any) -> None:
    """Adds the declared options to a function's signature and docstring."""
    signature = inspect.signature(function)
    *fixed, _ = signature.parameters.values()
    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
    for name, field in _OPTIONS.items():
        fixed.append(keyword(name, default=None, annotation=field.annotation))
    function.__signature__ = signature.replace(parameters=fixed)
    lines = [f"        {name}: {field.meaning}.\n" for name, field in _OPTIONS.items()]
    marker = "ModelOptions``:\n"
    function.__doc__ = (function.__doc__ or "").replace(marker, marker + "".join(lines))


_document(create_model)
