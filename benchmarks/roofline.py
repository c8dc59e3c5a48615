"""Work and memory traffic of a training step, by kind of operation, and its roofline.

    python -m benchmarks.roofline --tflops 790 --bandwidth 4300
    python -m benchmarks.roofline --model resnet18 --batch 8 --compile
        --dtype float32 --compare remat=remat:true --compare half=dtype:bfloat16

Nothing is run or timed. Per image of the batch it says, side by side for each switch:

  traced    what the step's program does, by the fusion rules of
            resnet_jax/planning/memory.py for an accelerator: fused elementwise work,
            reductions that compute their operand, kernels that read and write arrays
  compiled  with --compile: what this machine's compiler made of it, from its optimised
            HLO (benchmarks/hlo.py), beside the sums of XLA's own cost analysis. The
            CPU's fusions are not a GPU's; in bfloat16 it computes with float32 copies
  analytic  three times the forward pass's multiply-adds; the bytes of the net's maps,
            each read and written as often as ``PASSES`` says

With --inference it is evaluation's forward pass, and ``folded:true`` an option of its
switches, see ``resnet_jax.models.folding``.

The roofline gives each operation the longer of its arithmetic's and its traffic's time,
and adds these up: operations follow each other. It is a bound, and not a measurement.
A switch is NAME=OPTION:VALUE,...: an option of ``create_model``, or batch, image_size,
dtype or folded.
"""

import argparse
import collections
import dataclasses
import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks import hlo, record
from resnet_jax.analysis.complexity import count_multiply_adds
from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.transforms import to_unit
from resnet_jax.errors import UserError, nearest
from resnet_jax.models import catalog_entry, create_model, fold_batch_norm
from resnet_jax.models.blocks import ResidualBlock
from resnet_jax.models.conv import Conv
from resnet_jax.models.norm import BatchNorm
from resnet_jax.models.resnet import ResNet
from resnet_jax.planning.chips import CHIPS, Chip, find_chips
from resnet_jax.planning.memory import ACCELERATOR, REDUCTIONS, Memory
from resnet_jax.planning.program import flatten_program
from resnet_jax.planning.steps import operation_multiply_adds
from resnet_jax.training.benchmark import synthetic_step

KINDS = (
    "convolution",
    "product",
    "pooling",
    "reduction",
    "elementwise",
    "copy",
    "other",
)
"""Of operations; reductions and elementwise work are normalisation, ReLU, addition,
loss and optimizer."""


class Passes(NamedTuple):
    """How often a training step reads and writes a normalised map.

    Attributes:
      relu: a map that is normalised and rectified.
      join: the last of a block, which is added to the shortcut and rectified.
      projection: of a projecting shortcut, which ends in that addition.
      input: a block's input, for the sum of its two gradients.
    """

    relu: int
    join: int
    projection: int
    input: int


PASSES = {
    # Forward: statistics R, normalise R W, ReLU R W, addition R R W. Backward: ReLU
    # R R W, sums R R, gradient R R W, and R R W where two gradients meet.
    "layers apart": Passes(5 + 8, 8 + 8, 3 + 5, 3),
    # One fused pass: y (and the shortcut) to the output. Mean and variance R R. The
    # block's incoming gradient is a sum that is masked: R R R W; then R R and R R W.
    "fused": Passes(4 + 5, 5 + 9, 2 + 5, 0),
    # Mean and mean square in one pass.
    "fused, one-pass variance": Passes(3 + 5, 4 + 9, 1 + 5, 0),
    # A gradient written by hand: the sums are taken where the masked gradient is
    # written (R R R R W), a projection's in the same passes.
    "custom gradient": Passes(3 + 5, 4 + 8, 1 + 3, 0),
    # And the forward statistics are the convolution's epilogue.
    "statistics in convolutions": Passes(2 + 5, 3 + 8, 0 + 3, 0),
}
"""Reads (R) and writes (W) of maps outside of convolutions, forward and backward."""


class Maps(NamedTuple):
    """Elements of a net's maps for one image.

    Attributes:
      convolutions: twice or three times the input and output of each: forward, by the
        kernel and, but for the first, by the input.
      relu, join, projection, input: of the maps of these roles, see ``Passes``.
      pooling: read and written by it.
    """

    convolutions: int
    relu: int
    join: int
    projection: int
    input: int
    pooling: int

    def elements(self, passes: Passes) -> int:
        """Read and written in a training step."""
        return (
            self.convolutions
            + self.pooling
            + sum(
                getattr(self, role) * getattr(passes, role) for role in passes._fields
            )
        )


def count_maps(net: ResNet, image_shape: tuple[int, ...]) -> Maps:
    """The maps of a residual net for one image (h, w, c).

    Raises:
      UserError: the net is no residual net of blocks that end in the addition and a
        ReLU, or has no batch normalisation.
    """
    post_activated = isinstance(net, ResNet) and not net.preactivation
    if not post_activated or net.normalization != "batch":
        raise UserError(
            "maps are counted of residual nets with batch normalisation and "
            "post-activation only"
        )
    net = net.clone(scan=False, remat=False)
    sizes: collections.Counter[str] = collections.Counter()

    def record_call(method, args, kwargs, context):
        result = method(*args, **kwargs)
        module = context.module
        x: Any = args[0] if args else None
        if context.method_name != "__call__":
            return result
        if isinstance(module, Conv):
            # The images need no gradient.
            sizes["convolutions"] += (3 if sizes["convolutions"] else 2) * (
                x.size + result.size
            )
        elif isinstance(module, BatchNorm):
            sizes[_role(module)] += x.size
        elif isinstance(module, ResidualBlock):
            sizes["input"] += x.size
        elif module.name == "stem" and result[0] is not result[1]:
            # Forward C1 R, W; backward C1 R, the output and its gradient R, W.
            sizes["pooling"] += 3 * result[0].size + 3 * result[1].size
        return result

    def forward(key, images):
        with nn.intercept_methods(record_call):
            return net.init(key, images, train=False)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jax.eval_shape(forward, jax.random.key(0), images)
    return Maps(**{role: sizes[role] for role in Maps._fields})


def _role(norm: BatchNorm) -> str:
    block = norm.parent
    if norm.name == "shortcut_norm":
        return "projection"
    is_last = isinstance(block, ResidualBlock) and norm.name == (
        f"norm{len(block.layers())}"
    )
    return "join" if is_last else "relu"


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to look at.

    Attributes:
      name: of the switch.
      model: a name of the catalog.
      batch: images.
      image_size: side; None: the net's own.
      dtype: of the convolutions.
      options: of ``create_model``.
      inference: the forward pass of evaluation, not a training step.
      folded: in inference, without normalisation.
    """

    name: str
    model: str
    batch: int
    image_size: int | None
    dtype: str
    options: dict[str, Any]
    inference: bool = False
    folded: bool = False

    def switched(self, name: str, changes: dict[str, Any]) -> "Case":
        """With other fields or further options of the net."""
        own = {"batch", "image_size", "dtype", "folded"}
        fields = {key: value for key, value in changes.items() if key in own}
        options = {key: value for key, value in changes.items() if key not in own}
        return dataclasses.replace(
            self, name=name, options=self.options | options, **fields
        )

    @property
    def side(self) -> int:
        """Of the images."""
        return self.image_size or catalog_entry(self.model).image_size

    def trace(self) -> Any:
        """The step without augmentation, traced: ``jax.stages.Traced``."""
        if self.inference:
            return self._trace_inference()
        step, state, batch = synthetic_step(
            self.model,
            self.batch,
            self.side,
            self.dtype,
            AugmentationConfig(),
            devices=1,
            abstract=True,
            **self.options,
        )
        return step.trace(state, None, batch)

    def _trace_inference(self) -> Any:
        net = create_model(self.model, dtype=jnp.dtype(self.dtype), **self.options)
        shape = (self.batch, self.side, self.side, catalog_entry(self.model).channels)
        init = functools.partial(net.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *shape[1:])))
        if self.folded:
            net, variables = fold_abstractly(net, variables)

        def classify(variables: Any, images: jax.Array) -> jax.Array:
            return net.apply(variables, to_unit(images), train=False)

        images = jax.ShapeDtypeStruct(shape, jnp.uint8)
        return jax.jit(classify).trace(variables, images)


def fold_abstractly(net: Any, variables: Any) -> tuple[Any, Any]:
    """``fold_batch_norm`` of shapes."""
    nets = []

    def fold(variables: Any) -> Any:
        folded, params = fold_batch_norm(net, variables)
        nets.append(folded)
        return params

    params = jax.eval_shape(fold, variables)
    return nets[0], params


def traced_operations(jaxpr: Any) -> list[hlo.Operation]:
    """What an accelerator would run, by the rules of ``resnet_jax.planning.memory``."""
    memory = Memory(flatten_program(jaxpr, ACCELERATOR.keeps_barriers), ACCELERATOR)
    return [
        hlo.Operation(
            _kind_of_primitive(one.operation.name),
            f"{one.operation.name} {one.operation.equation.outvars[0].aval.dtype}",
            one.times * operation_multiply_adds(one.operation),
            one.nbytes,
        )
        for one in memory.passes()
    ]


def _kind_of_primitive(name: str) -> str:
    if name == "conv_general_dilated":
        return "convolution"
    if name == "dot_general":
        return "product"
    if name.startswith(("reduce_window", "select_and_")):
        return "pooling"
    if name in REDUCTIONS:
        return "reduction"
    loops = ("scan", "while", "cond", "sort", "random_bits", "threefry2x32")
    return "other" if name in loops or "scatter" in name else "elementwise"


def compiled_operations(compiled: Any) -> list[hlo.Operation]:
    """What a compiled program (``jax.stages.Compiled``) runs."""
    return list(hlo.operations(hlo.read(compiled.as_text())))


def bound_seconds(operations: Iterable[hlo.Operation], chip: Chip, dtype: str) -> float:
    """The roofline's time of operations that follow each other."""
    peak, bandwidth = chip.peak(dtype), 1e9 * chip.memory_gb_per_second
    return sum(
        max(2 * operation.multiply_adds / peak, operation.nbytes / bandwidth)
        for operation in operations
    )


def summarize(
    operations: Sequence[hlo.Operation], case: Case, chips: Sequence[Chip]
) -> dict[str, Any]:
    """Operations, multiply-adds and bytes an image by kind, and bounds by chip."""
    by_kind = {
        kind: {
            "operations": len(chosen),
            "multiply_adds": sum(o.multiply_adds for o in chosen) / case.batch,
            "bytes": sum(o.nbytes for o in chosen) / case.batch,
        }
        for kind in KINDS
        if (chosen := [o for o in operations if o.kind == kind])
    }
    return {
        "kinds": by_kind,
        "largest": largest(operations, case.batch, 12),
        "operations": len(operations),
        "multiply_adds": sum(row["multiply_adds"] for row in by_kind.values()),
        "bytes": sum(row["bytes"] for row in by_kind.values()),
        "images_per_second": {
            chip.name: case.batch / bound_seconds(operations, chip, case.dtype)
            for chip in chips
        },
    }


def largest(
    operations: Sequence[hlo.Operation], batch: int, count: int
) -> list[dict[str, Any]]:
    """The names whose operations move most: bytes an image, and how many they are."""
    sizes: collections.Counter[str] = collections.Counter()
    numbers: collections.Counter[str] = collections.Counter()
    for operation in operations:
        name = re.sub(r"[.\d]+$", "", operation.name)
        # A dtype's digits stay.
        name = operation.name if " " in operation.name else name
        sizes[name] += operation.nbytes
        numbers[name] += 1
    return [
        {"name": name, "operations": numbers[name], "bytes": size / batch}
        for name, size in sizes.most_common(count)
    ]


def analyse(case: Case, chips: Sequence[Chip], compiles: bool) -> dict[str, Any]:
    """All figures of one step; see the module."""
    if "conv_algorithm" not in case.options and not compiles:
        # What "auto" is on an accelerator, wherever this runs.
        case = dataclasses.replace(
            case, options=case.options | {"conv_algorithm": "xla"}
        )
    traced = case.trace()
    row = dataclasses.asdict(case) | {
        "image_size": case.side,
        "traced": summarize(traced_operations(traced.jaxpr), case, chips),
    }
    if compiles:
        compiled = traced.lower().compile()
        cost = compiled.cost_analysis()
        memory = compiled.memory_analysis()
        row["compiled"] = summarize(compiled_operations(compiled), case, chips) | {
            "backend": jax.default_backend(),
            # A multiply-add is two; elementwise arithmetic counts too.
            "xla_flops": cost["flops"] / case.batch,
            "xla_bytes": cost["bytes accessed"] / case.batch,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    return row


def analytic(case: Case, chips: Sequence[Chip]) -> dict[str, Any]:
    """Closed forms of the net without switches, an image; bytes of its maps alone.

    The bounds have the traced step's convolutions and products, with parameters, and
    behind them the traffic of all else by ``PASSES``.

    Raises:
      UserError: see ``count_maps``.
    """
    case = dataclasses.replace(case, options={"conv_algorithm": "xla"})
    entry = catalog_entry(case.model)
    net = create_model(case.model)
    shape = (case.side, case.side, entry.channels)
    maps = count_maps(net, shape)
    size = jnp.dtype(case.dtype).itemsize
    kernels = [
        operation
        for operation in traced_operations(case.trace().jaxpr)
        if operation.kind in ("convolution", "product")
    ]

    def images_per_second(passes: Passes, chip: Chip) -> float:
        rest = size * (maps.elements(passes) - maps.convolutions)
        seconds = bound_seconds(kernels, chip, case.dtype) / case.batch
        return 1 / (seconds + rest / (1e9 * chip.memory_gb_per_second))

    return {
        "multiply_adds": 3 * count_multiply_adds(net, shape),
        "convolution_bytes": size * maps.convolutions,
        "passes": {
            name: {
                "bytes": size * maps.elements(passes),
                "images_per_second": {
                    chip.name: images_per_second(passes, chip) for chip in chips
                },
            }
            for name, passes in PASSES.items()
        },
    }


def print_rows(rows: Sequence[dict[str, Any]], source: str) -> None:
    """Prints a table of ``traced`` or ``compiled``: a column a switch."""
    columns = [row[source] for row in rows]
    widths = [max(16, len(row["name"]) + 2) for row in rows]

    def line(name: str, values: Iterable[str]) -> None:
        cells = zip(values, widths, strict=True)
        print(f"{name:<26}" + "".join(f"{value:>{width}}" for value, width in cells))

    line(f"{source}, an image", [row["name"] for row in rows])
    for kind in KINDS:
        if any(kind in column["kinds"] for column in columns):
            sizes = [column["kinds"].get(kind, {"bytes": 0}) for column in columns]
            line(f"  {kind}, MB", [f"{size['bytes'] / 1e6:,.1f}" for size in sizes])
    line("  all, MB", [f"{column['bytes'] / 1e6:,.1f}" for column in columns])
    work = [f"{column['multiply_adds'] / 1e9:,.3f}" for column in columns]
    line("  G multiply-adds", work)
    line("  operations", [f"{column['operations']:,}" for column in columns])
    if source == "compiled":
        sizes = [f"{column['xla_bytes'] / 1e6:,.1f}" for column in columns]
        line("  XLA's own sum, MB", sizes)
        flops = [f"{column['xla_flops'] / 2e9:,.3f}" for column in columns]
        line("  XLA's G flops / 2", flops)
        temporary = [f"{c['temporary_bytes'] / 2**20:,.0f}" for c in columns]
        line("  temporaries, MiB", temporary)
        return
    for chip in columns[0]["images_per_second"]:
        speeds = [f"{column['images_per_second'][chip]:,.0f}" for column in columns]
        line(f"  images/s, {chip}", speeds)


def print_largest(row: dict[str, Any], source: str) -> None:
    """Prints what moves most."""
    print(f"{source}, {row['name']}: most bytes an image by")
    for one in row[source]["largest"]:
        print(
            f"  {one['name']:<34}{one['operations']:>6}{one['bytes'] / 1e6:>10.1f} MB"
        )


def print_analytic(found: dict[str, Any]) -> None:
    """Prints the closed forms."""
    print(
        f"analytic: {found['multiply_adds'] / 1e9:,.3f} G multiply-adds an image; maps "
        f"through convolutions {found['convolution_bytes'] / 1e6:,.1f} MB"
    )
    for name, row in found["passes"].items():
        bounds = ", ".join(
            f"{chip} {speed:,.0f}" for chip, speed in row["images_per_second"].items()
        )
        print(f"  {name:<28}{row['bytes'] / 1e6:>8,.1f} MB; at most {bounds} images/s")


def parse_switch(text: str) -> tuple[str, dict[str, Any]]:
    """A name and options, from NAME=OPTION:VALUE,OPTION:VALUE; values as in JSON.

    Raises:
      UserError: it has another form, or there is no such option.
    """
    name, _, rest = text.partition("=")
    pairs = [pair.partition(":") for pair in rest.split(",") if pair]
    if not (name and pairs and all(key and value for key, _, value in pairs)):
        raise UserError(
            f"{text!r} is no switch; it has the form NAME=OPTION:VALUE,OPTION:VALUE"
        )
    valid = list(inspect.signature(create_model).parameters)
    valid += ["batch", "image_size", "folded"]
    for key, _, _ in pairs:
        if key not in valid:
            raise UserError(f"there is no option {key}; {nearest(key, valid)}")
    return name, {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def chosen_chips(options: argparse.Namespace) -> list[Chip]:
    """The chips of the command line; one "given" where its peaks are."""
    if (options.tflops is None) != (options.bandwidth is None):
        raise UserError("--tflops and --bandwidth are given together")
    chips = find_chips(options.chips) if options.chips else [CHIPS["h200_sxm"]]
    if options.tflops is not None:
        peak, nothing = options.tflops, math.nan
        source = "the command line"
        chips.append(
            Chip("given", peak, peak / 2, nothing, options.bandwidth, nothing, source)
        )
    return chips


def main(arguments: Sequence[str]) -> None:
    """Analyses, prints the tables and writes the JSON."""
    options = _parse(arguments)
    chips = chosen_chips(options)
    content = record.circumstances("roofline", arguments)
    base = Case(
        "base",
        options.model,
        options.batch,
        options.image_size,
        options.dtype,
        {},
        options.inference,
    )
    if options.option:
        base = base.switched("base", parse_switch(f"base={options.option}")[1])
    cases = [base]
    cases += [base.switched(*parse_switch(text)) for text in options.compare]
    print(
        f"{base.model}, batch {base.batch}, {base.side} px, {base.dtype}; bounds and "
        "counts, nothing is measured"
    )
    rows = [analyse(case, chips, options.compile) for case in cases]
    print_rows(rows, "traced")
    if options.compile:
        print_rows(rows, "compiled")
    if options.largest:
        for row in rows:
            print_largest(row, "compiled" if options.compile else "traced")
    result: dict[str, Any] = {"rows": rows}
    try:
        if not base.inference:
            result["analytic"] = analytic(base, chips)
            print_analytic(result["analytic"])
    except UserError as error:
        print(f"analytic: {error}")
    record.write(options.json, content | result)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet50", help="default: resnet50")
    parser.add_argument("--batch", type=record.positive, default=128, metavar="N")
    parser.add_argument("--image-size", type=record.positive, metavar="PIXELS")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--option", metavar="OPTION:VALUE,...", help="of all, the first column too"
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=OPTION:VALUE,...",
        help="a further column; may be given again",
    )
    parser.add_argument(
        "--chip",
        action="append",
        default=[],
        dest="chips",
        metavar="NAME",
        help=f"one of {', '.join(CHIPS)} (default: h200_sxm); may be given again",
    )
    parser.add_argument(
        "--tflops", type=float, help="a chip's peak of the dtype, 10^12 a second"
    )
    parser.add_argument(
        "--bandwidth", type=float, help="and of its memory, 10^9 bytes a second"
    )
    parser.add_argument(
        "--inference", action="store_true", help="evaluation's forward pass alone"
    )
    parser.add_argument("--compile", action="store_true", help="count the HLO too")
    parser.add_argument(
        "--largest", action="store_true", help="also print what moves most bytes"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
