"""Barriers that keep XLA:CPU from fusing too much; other platforms have none.

An exported program is compiled elsewhere, so its own platform decides, not the one that
traces it.
"""

import jax
import jax.numpy as jnp
from jax import lax


def apart(x: jax.Array) -> jax.Array:
    """``x``; XLA:CPU fuses no later operation with it if it is a narrow float.

    From jaxlib 0.11 on, XLA:CPU fuses a reduction or pooling with the layers around it.
    Two bfloat16 ReLUs in one such fusion return garbage and NaN. Programs for other
    backends and in float32 do not change.
    """
    if jnp.finfo(x.dtype).bits >= 32:
        return x
    return _on_cpu(x)


@jax.custom_jvp
def computed_once(x: jax.Array) -> jax.Array:
    """``x``; in inference XLA:CPU computes it once, not again for each use.

    A sum of a block and its shortcut is cheap, so XLA:CPU computes it again for each
    later sum of the stage, from the maps of all blocks before. Training programs do
    not change. Has no effect before jaxlib 0.11, which drops the barrier too early.
    """
    return _on_cpu(x)


@computed_once.defjvp
def _computed_once_jvp(primals, tangents):
    return primals[0], tangents[0]


def _on_cpu(x):
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
