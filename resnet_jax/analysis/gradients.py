"""Gradient norms layer by layer: do they vanish or explode (section 4.1)?"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from resnet_jax.analysis.convolutions import (
    Path,
    is_convolution,
    is_stacked,
    leaf,
    unrolled,
)
from resnet_jax.errors import UserError

QUANTITIES = ("kernels", "outputs")


class GradientNorm(NamedTuple):
    """The strength of the gradient at a convolution.

    Attributes:
      layer: its name in the unrolled net: "stem/conv", "stage1/block1/conv2".
      norm: l2 norm of the gradient of the batch's mean loss.
    """

    layer: str
    norm: float


def gradient_norms(
    model: nn.Module,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    *,
    of: str = "kernels",
    train: bool = True,
) -> list[GradientNorm]:
    """The l2 norm of the loss' gradient at every convolution of a net.

    The loss is the batch's mean cross-entropy, without weight decay. Norms are exact
    down to the smallest float32, about 1e-38.

    Args:
      model: a net, unrolled or scanned, with or without normalisation.
      variables: its params and, if it has any, batch_stats; fresh or trained.
      images: (n, h, w, c), normalised as the net expects them.
      labels: (n,), integers.
      of: "kernels": the gradient with respect to each kernel. "outputs": with respect
        to each convolution's output map (n, h', w', c'), before any normalisation, of
        all images together.
      train: normalise with the batch's statistics, as a training step does, with
        dropout and stochastic depth from one fixed key; False runs as in evaluation.

    Returns:
      All convolutions, including 1x1 and shortcuts, in the order in which the net
      computes them.

    Raises:
      UserError: an unknown ``of``, or no convolution in the net.
    """
    if of not in QUANTITIES:
        raise UserError(f"gradients are of {' or '.join(QUANTITIES)}, not {of!r}")
    found = _norms(model, variables, images, labels, of, train)
    return list(map(GradientNorm, found.layers, found.values.tolist()))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _norms(model, variables, images, labels, of, train):
    def apply(interceptor, variables, mutable):
        with nn.intercept_methods(interceptor):
            return model.apply(
                variables,
                images,
                train=train,
                mutable=mutable,
                rngs={"dropout": jax.random.key(0)},
            )

    probes, paths = _probes(apply, variables)
    if not paths:
        raise UserError(f"{type(model).__name__} has no convolution")

    def loss(params, probes):
        inputs = variables | {"params": params, "intermediates": probes}
        logits, _ = apply(_pass_probe, inputs, ["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    if of == "outputs":
        gradients = jax.grad(loss, 1)(variables["params"], probes)
        return unrolled({path: leaf(gradients, (*path, "probe")) for path in paths})
    gradients = jax.grad(loss)(variables["params"], probes)
    kernels = {path: leaf(gradients, (*path, "kernel")) for path in paths}
    return unrolled(
        {
            path: jax.vmap(_l2_norm)(kernel) if is_stacked(path) else _l2_norm(kernel)
            for path, kernel in kernels.items()
        }
    )


def _probes(apply: Any, variables: Any) -> tuple[Any, list[Path]]:
    """A zero for each convolution, as variables, and the convolutions in order.

    They are in the collection that nets carry through their loops.
    """
    paths: dict[Path, None] = {}

    def place(method, args, kwargs, context):
        y = method(*args, **kwargs)
        if is_convolution(context):
            paths[context.module.path] = None
            probe = jnp.zeros((), _wide(y))
            context.module.put_variable("intermediates", "probe", probe)
        return y

    mutable = ["batch_stats", "intermediates"]
    _, updates = jax.eval_shape(lambda: apply(place, variables, mutable))
    shapes = updates.get("intermediates", {})
    zeros = jax.tree.map(lambda probe: jnp.zeros(probe.shape, probe.dtype), shapes)
    return zeros, list(paths)


def _pass_probe(method, args, kwargs, context):
    y = method(*args, **kwargs)
    if not is_convolution(context):
        return y
    return _with_probe(y, context.module.get_variable("intermediates", "probe"))


@jax.custom_vjp
def _with_probe(y, probe):
    """``y``; the probe's gradient is the norm of the gradient of ``y``.

    So each layer returns a scalar, even from inside loops, and no map is kept.
    """
    del probe
    return y


_with_probe.defvjp(
    lambda y, probe: (y, None), lambda _, gradient: (gradient, _l2_norm(gradient))
)


def _l2_norm(x: jax.Array) -> jax.Array:
    """The l2 norm, without underflow or overflow of squares."""
    x = x.astype(_wide(x))
    largest = jnp.abs(x).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * jnp.sqrt(jnp.square(x / scale).sum())


def _wide(x: jax.Array) -> Any:
    """Float32, or the array's dtype if that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)
