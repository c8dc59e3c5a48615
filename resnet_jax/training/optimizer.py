"""Optimizers without the learning rate: the step multiplies their update by it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from resnet_jax.config.build import build_optax
from resnet_jax.config.schema import OptimizerConfig
from resnet_jax.errors import UserError
from resnet_jax.models.trees import STACKED, parts_in_order, trainable_mask


def make_optimizer(
    config: OptimizerConfig, frozen: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The update that the step multiplies by the learning rate and subtracts.

    ``max_grad_norm`` first scales down gradients that are longer, by their norm over
    all trained parameters. ``layer_decay`` last scales the update of each part by its
    depth. Parameters of ``frozen`` parts (see ``trainable_mask``) do not change.
    """
    kinds = {"sgd": _sgd, "lars": _lars, "lamb": _lamb}
    steps = kinds.get(config.kind, _of_optax)(config)
    if config.max_grad_norm is not None:
        steps = (optax.clip_by_global_norm(config.max_grad_norm), *steps)
    if config.layer_decay != 1:
        steps = (*steps, _scale_by_depth(config.layer_decay))
    optimizer = optax.chain(*steps)
    if not frozen:
        return optimizer
    return optax.multi_transform(
        {True: optimizer, False: optax.set_to_zero()},
        lambda params: trainable_mask(params, frozen),
    )


def _sgd(config: OptimizerConfig) -> tuple[optax.GradientTransformation, ...]:
    """SGD as in the paper and torch: v = m v + g + wd w, w -= rate v."""
    return (
        optax.add_decayed_weights(config.weight_decay, _mask(config)),
        optax.trace(decay=config.momentum, nesterov=config.nesterov),
    )


def _lars(config: OptimizerConfig) -> tuple[optax.GradientTransformation, ...]:
    """LARS (You, Gitman & Ginsburg 2017), as in NVIDIA's Apex and in timm.

    v = m v + eta |w| / (|g| + wd |w|) (g + wd w), w -= rate v. The paper's algorithm 1,
    optax.lars and MLPerf's later reference put the rate inside the momentum, which is
    the same at a constant rate. Here a falling rate also acts on the velocity, as in
    ``_sgd``. Parameters without weight decay are not adapted: they get SGD's update.
    """
    mask = _mask(config)
    adapted = _adapt_rates(config.weight_decay, config.trust_coefficient)
    return (
        adapted if mask is None else optax.masked(adapted, mask),
        optax.trace(decay=config.momentum, nesterov=config.nesterov),
    )


def _adapt_rates(
    weight_decay: float, trust_coefficient: float
) -> optax.GradientTransformation:
    """Adds weight decay and multiplies by each parameter's local learning rate.

    The rate follows algorithm 1 of the paper; optax.scale_by_trust_ratio divides by the
    norm of the sum, |g + wd w|. If a norm is zero the rate is 1, as in TensorFlow's
    LARSOptimizer; otherwise a parameter that starts at zero would stay there. In a
    scanned stage each block has its own rate.
    """

    def adapt(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        length, slope = (jnp.linalg.norm(a.ravel()) for a in (parameter, gradient))
        known = (length > 0) & (slope > 0)
        norms = jnp.where(known, slope + weight_decay * length, 1.0)
        rate = jnp.where(known, trust_coefficient * length / norms, 1.0)
        return rate * (gradient + weight_decay * parameter)

    def adapt_at(path: Any, gradient: jax.Array, parameter: jax.Array) -> jax.Array:
        is_stacked = jax.tree_util.DictKey(STACKED) in path
        return (jax.vmap(adapt) if is_stacked else adapt)(gradient, parameter)

    return optax.stateless(
        lambda updates, params: jax.tree.map_with_path(adapt_at, updates, params)
    )


def _lamb(config: OptimizerConfig) -> tuple[optax.GradientTransformation, ...]:
    """LAMB (You et al. 2019, algorithm 2), as in timm and NVIDIA's NVLAMB.

    u = m / (sqrt(v) + epsilon) + wd w, with Adam's bias-corrected moments;
    w -= rate |w| / |u| u. If a norm is zero the ratio is 1. Parameters without weight
    decay are not adapted: they get Adam's update.
    """
    mask = _mask(config)
    adapted = optax.scale_by_trust_ratio()
    return (
        optax.scale_by_adam(
            b1=config.momentum, b2=config.second_momentum, eps=config.epsilon
        ),
        optax.add_decayed_weights(config.weight_decay, mask),
        adapted if mask is None else optax.masked(adapted, mask),
    )


def _of_optax(config: OptimizerConfig) -> tuple[optax.GradientTransformation, ...]:
    """An optimizer of optax by its name. It subtracts by itself; the step does here."""
    _refuse_other_updates(config)
    return (build_optax(config, _mask(config)), optax.scale(-1.0))


def _refuse_other_updates(config: OptimizerConfig) -> None:
    """Tries two steps with two learning rates.

    Raises:
      UserError: the update needs more than gradients and parameters, or is not
        proportional to the learning rate, by which the step multiplies it.
    """

    def second_update(rate: float) -> jax.Array:
        optimizer = build_optax(config, learning_rate=rate)
        parameter = jnp.array([[1.0, -2.0], [3.0, 0.5]])
        state = optimizer.init(parameter)
        for gradient in (parameter / 4, parameter**2 / 8):
            update, state = optimizer.update(gradient, state, parameter)
        return update

    try:
        single, double = second_update(0.01), second_update(0.02)
    except TypeError as error:
        raise UserError(
            f"optax.{config.kind} needs more than gradients and parameters, which is "
            f"all that training gives: take another optimizer.kind ({error})"
        ) from error
    if not jnp.allclose(double, 2 * single, rtol=1e-4):
        raise UserError(
            f"the update of optax.{config.kind} is not proportional to its learning "
            "rate, as training assumes: take another optimizer.kind"
        )


def _scale_by_depth(layer_decay: float) -> optax.GradientTransformation:
    """Multiplies a part's update by layer_decay ** (its distance from the head).

    As the whole update is scaled, weight decay included, this is the same as a learning
    rate for each part. Frozen parts keep their place in the count.
    """

    def scale(updates: Any, params: Any) -> Any:
        del params
        parts = parts_in_order(updates)
        factors = {
            part: layer_decay**distance for distance, part in enumerate(parts[::-1])
        }
        return {
            part: jax.tree.map(lambda u, factor=factors[part]: factor * u, tree)
            for part, tree in updates.items()
        }

    return optax.stateless(scale)


def _mask(config: OptimizerConfig) -> Any:
    scope = config.weight_decay_scope
    return None if scope == "all" else lambda params: decay_mask(params, scope)


def decay_mask(params: Any, scope: str) -> Any:
    """A tree of booleans like ``params``: whether each parameter decays.

    Args:
      params: the net's; a module with a ``scale`` is a normalisation.
      scope: ``all``, ``all_but_norm`` or ``kernels``.
    """

    def inside(tree: Any, name: str, is_norm: bool) -> Any:
        if isinstance(tree, Mapping):
            return {key: inside(tree[key], key, "scale" in tree) for key in tree}
        kinds = {"all": True, "all_but_norm": not is_norm, "kernels": name == "kernel"}
        # Frozen parts are empty nodes, and stay empty.
        return jax.tree.map(lambda leaf: kinds[scope], tree)

    return inside(params, "", False)
