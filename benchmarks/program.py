"""What the compiled training step or inference of a net launches and moves.

    JAX_PLATFORMS=cpu python -m benchmarks.program resnet50 --target h200 --batch 256
    python -m benchmarks.program cifar_resnet20 --work loop --target h200 \
        --forms default fused_norm=false conv_algorithm=xla flax
    python -m benchmarks.program resnet50 --target tpu:v5e:1x1 --work inference

compiles each form for a chip that need not be here (``resnet-jax plan --compile`` says
which wheels that takes) and counts its operations by kind; see ``hlo.py``. A form is
"default", options of our net (OPTION=VALUE,...), or "flax": the net of Flax's example.
The work is a training step, a step of the loop over resident images, or inference.
Without the device, the compiler cannot time algorithms and takes default ones, so
copies and scratch memory can differ on it.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import contenders, hlo, record
from resnet_jax import parallel
from resnet_jax.data.transforms import PixelStatistics, normalize, to_unit
from resnet_jax.errors import UserError
from resnet_jax.models import create_model, fold_batch_norm
from resnet_jax.targets.compile import lower, target_mesh
from resnet_jax.training.benchmark import abstract_batch, synthetic_learner
from resnet_jax.training.step import make_train_step, make_train_steps

LOOP_STEPS = 128
_RESIDENT_IMAGES = 50_000


def compiled(
    model: str, form: str, mesh: Mesh, batch: int, dtype: str, work: str = "step"
) -> jax.stages.Compiled:
    """The program of a form for the devices of a mesh; see the module."""
    build = {"step": _step, "loop": _loop, "inference": _inference}[work]
    if form == "flax":
        if work != "step":
            raise SystemExit("flax's example is compiled as a training step alone")
        build = _flax_step
    function, *arguments = build(model, form, mesh, batch, dtype)
    return lower(function, mesh, *arguments).compile()


def _step(model, form, mesh, batch, dtype):
    learner = synthetic_learner(
        model, batch, dtype=dtype, mesh=mesh, **contenders.parse_options(form)
    )
    state, inputs = learner.abstract_state(), abstract_batch(learner)
    return make_train_step(learner), state, None, inputs


def _loop(model, form, mesh, batch, dtype):
    learner = synthetic_learner(
        model, batch, dtype=dtype, mesh=mesh, **contenders.parse_options(form)
    )
    same, cut = parallel.replicated(mesh), parallel.steps_sharding(mesh)
    images = (_RESIDENT_IMAGES, *learner.image_shape)
    resident = {
        "image": jax.ShapeDtypeStruct(images, jnp.uint8, sharding=same),
        "label": jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=same),
    }
    indices = jax.ShapeDtypeStruct((LOOP_STEPS, batch), jnp.int32, sharding=cut)
    return make_train_steps(learner), learner.abstract_state(), resident, indices


def _inference(model, form, mesh, batch, dtype):
    net: Any = create_model(
        model, dtype=jnp.dtype(dtype), **contenders.parse_options(form)
    )
    side = contenders.LAYOUTS[model].image_size
    variables = contenders.fresh_variables(net, model)
    net, variables = fold_batch_norm(net, variables)
    half = PixelStatistics(mean=jnp.full((1, 1, 3), 0.5), std=jnp.ones((1, 1, 3)))

    def classify(variables, images):
        return net.apply(variables, normalize(to_unit(images), half), train=False)

    same, cut = parallel.replicated(mesh), parallel.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8, sharding=cut)
    return jax.jit(classify), _on(same, variables), images


def _flax_step(model, form, mesh, batch, dtype):
    init, train_step = contenders.flax_training(model, dtype)
    state = jax.eval_shape(init, jax.random.key(0))
    side = contenders.LAYOUTS[model].image_size
    cut = parallel.batch_sharding(mesh)
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8, sharding=cut)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=cut)
    return train_step, _on(parallel.replicated(mesh), state), images, labels


def _on(sharding, tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
    )


def counted(
    program: jax.stages.Compiled, batch: int, work: str, largest: int
) -> dict[str, Any]:
    """Launches and MB per image by kind, memory, and the largest operations.

    A step of the loop is the mean over its steps.
    """
    steps = LOOP_STEPS if work == "loop" else 1
    found = list(hlo.operations(hlo.read(program.as_text() or "")))
    kinds = {
        kind: {
            "operations": count / steps,
            "megabytes_per_image": nbytes / steps / batch / 1e6,
        }
        for kind, (count, nbytes) in sorted(hlo.by_kind(found).items())
    }
    kinds["all"] = {
        key: sum(row[key] for row in kinds.values())
        for key in ("operations", "megabytes_per_image")
    }
    found.sort(key=lambda operation: -operation.nbytes)
    memory: Any = program.memory_analysis()
    return {
        "kinds": kinds,
        "temporary_bytes": memory.temp_size_in_bytes,
        "largest": [
            {"operation": o.name, "kind": o.kind, "megabytes": o.nbytes / 1e6}
            for o in found[:largest]
        ],
    }


def print_table(rows: dict[str, dict[str, Any]], largest: int) -> None:
    """Kinds down, forms across: operations, and MB per image."""
    kinds = dict.fromkeys(kind for row in rows.values() for kind in row["kinds"])
    kinds["all"] = kinds.pop("all")
    print(" " * 12 + "".join(f"{form[:22]:>24}" for form in rows))
    for kind in kinds:
        cells = [row["kinds"].get(kind) for row in rows.values()]
        shown = [
            f"{cell['operations']:>12,.0f}{cell['megabytes_per_image']:>9.2f} MB"
            if cell
            else " " * 24
            for cell in cells
        ]
        print(f"{kind:<12}" + "".join(shown))
    for form, row in rows.items() if largest else ():
        print(f"\n{form}")
        for operation in row["largest"]:
            print(
                f"{operation['megabytes']:>10.1f} MB  {operation['kind']:<12}"
                f"{operation['operation']}"
            )


def main(arguments: Sequence[str]) -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.program",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=contenders.LAYOUTS)
    parser.add_argument("--forms", nargs="+", default=["default"], metavar="FORM")
    parser.add_argument("--target", default="cpu", metavar="CHIP")
    parser.add_argument("--batch", type=record.positive, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--work", default="step", choices=("step", "loop", "inference"))
    parser.add_argument("--largest", type=record.positive, default=0, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args(arguments)
    content = record.circumstances("program", arguments)
    rows = {}
    try:
        mesh = target_mesh(given.target)
        for form in given.forms:
            program = compiled(
                given.model, form, mesh, given.batch, given.dtype, given.work
            )
            images = given.batch // mesh.size
            rows[form] = counted(program, images, given.work, given.largest)
    except (UserError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print_table(rows, given.largest)
    record.write(given.json, content | {"forms": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
