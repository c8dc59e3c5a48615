"""LARS against its equations in NumPy, optax.lars and timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config.schema import OptimizerConfig
from resnet_jax.training.optimizer import decay_mask, make_optimizer
from tests.training.test_optimizer import (
    ALL,
    GRADIENTS,
    KERNELS,
    PARAMS,
    RATES,
    SCOPES,
    assert_same,
    clipped,
    leaves,
    run,
)

DECAY = 0.05
TRUST = 0.3


def lars(decays, trust=TRUST, limit=None, nesterov=False, parts=ALL):
    """Local rate, velocity, learning rate; SGD where nothing decays."""
    params = leaves(PARAMS)
    velocity = dict.fromkeys(parts, 0)
    for gradients, rate in zip(GRADIENTS, RATES):
        gradients = clipped(leaves(gradients), limit, parts)
        for part in parts:
            g, w = gradients[part], params[part]
            if part in decays:
                norms = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
                local = 1.0
                if min(norms) > 0:
                    local = trust * norms[0] / (norms[1] + DECAY * norms[0])
                g = local * (g + DECAY * w)
            velocity[part] = 0.9 * velocity[part] + g
            step = g + 0.9 * velocity[part] if nesterov else velocity[part]
            params[part] = w - rate * step
    return params


def config_of(**fields):
    return OptimizerConfig(
        kind="lars", weight_decay=DECAY, trust_coefficient=TRUST, **fields
    )


@pytest.mark.parametrize("scope", list(SCOPES))
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_follows_its_equations(scope, nesterov):
    found = run(config_of(weight_decay_scope=scope, nesterov=nesterov))
    # With "all", a bias of zeros has no local rate: its first step is SGD's.
    assert not leaves(PARAMS)[("norm", "bias")].any()
    assert_same(found, lars(SCOPES[scope], nesterov=nesterov))


def test_a_limit_on_the_gradient_comes_first():
    config = config_of(weight_decay_scope="kernels", max_grad_norm=1.0)
    assert_same(run(config), lars(KERNELS, limit=1.0))


def test_frozen_parts_stay():
    config = config_of(weight_decay_scope="kernels", max_grad_norm=1.0)
    found = run(config, frozen=("norm",))
    assert_same(found, lars(KERNELS, limit=1.0, parts=SCOPES["all_but_norm"]))
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(found[("norm", name)], PARAMS["norm"][name])


def run_optax(gradients, rate, weight_decay):
    mask = decay_mask(PARAMS, "kernels")
    optimizer = optax.lars(
        rate,
        weight_decay=weight_decay,
        weight_decay_mask=mask,
        trust_coefficient=TRUST,
        trust_ratio_mask=mask,
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return leaves(params)


def run_ours(gradients, rate, weight_decay):
    optimizer = make_optimizer(
        OptimizerConfig(
            kind="lars",
            weight_decay=weight_decay,
            weight_decay_scope="kernels",
            trust_coefficient=TRUST,
        )
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return leaves(params)


def test_at_a_constant_rate_it_is_optaxs():
    """Without decay; with it where |g + wd w| = |g| + wd |w|: g along w."""
    assert_same(run_ours(GRADIENTS, 0.1, 0.0), run_optax(GRADIENTS, 0.1, 0.0))
    along = [jax.tree.map(lambda p, s=s: s * p, PARAMS) for s in (0.5, 2.0, 1.0)]
    assert_same(run_ours(along, 0.1, DECAY), run_optax(along, 0.1, DECAY))
    # Elsewhere optax's denominator is another one.
    ours, theirs = run_ours(GRADIENTS, 0.1, 1.0), run_optax(GRADIENTS, 0.1, 1.0)
    assert not np.allclose(ours["conv", "kernel"], theirs["conv", "kernel"], rtol=1e-3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_timms(nesterov):
    torch = pytest.importorskip("torch")
    from tests.torch_peers import import_peer

    peer = import_peer("timm.optim")
    parameters = {
        part: torch.nn.Parameter(torch.from_numpy(value.copy()))
        for part, value in leaves(PARAMS).items()
    }
    groups = [
        {
            "params": [p for part, p in parameters.items() if (part in KERNELS) == own],
            "weight_decay": DECAY if own else 0.0,
        }
        for own in (True, False)
    ]
    optimizer = peer.Lars(
        groups, lr=0.1, momentum=0.9, trust_coeff=TRUST, nesterov=nesterov
    )
    for gradients, rate in zip(GRADIENTS, RATES):
        for part, gradient in leaves(gradients).items():
            parameters[part].grad = torch.from_numpy(gradient.copy())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    expected = {part: p.detach().numpy() for part, p in parameters.items()}
    found = run(config_of(weight_decay_scope="kernels", nesterov=nesterov))
    assert_same(found, expected)


def test_each_block_of_a_scanned_stage_is_a_layer():
    first, second = ({"conv": g["conv"]} for g in GRADIENTS[:2])
    weights = {"block1": {"conv": PARAMS["conv"]}, "block2": first}
    gradients = {"block1": second, "block2": {"conv": GRADIENTS[2]["conv"]}}

    def stacked(tree):
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree.values())
        return {"stage1": {"blocks": blocks}}

    optimizer = make_optimizer(config_of(weight_decay_scope="kernels"))

    def updates(gradients, params):
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    expected = stacked(updates(gradients, weights))
    found = updates(stacked(gradients), stacked(weights))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
    )


def test_a_layers_first_step_has_the_trust_coefficients_length():
    """|w - w'| = rate eta |w| whatever the gradient's length; less with decay."""
    optimizer = make_optimizer(
        OptimizerConfig(kind="lars", weight_decay=0.0, trust_coefficient=0.001)
    )
    weight = {"kernel": jnp.asarray(PARAMS["conv"]["kernel"])}
    for scale in (1e-6, 1.0, 1e6):
        gradient = {"kernel": scale * GRADIENTS[0]["conv"]["kernel"]}
        updates, _ = optimizer.update(gradient, optimizer.init(weight), weight)
        length = np.linalg.norm(updates["kernel"])
        expected = 0.001 * np.linalg.norm(weight["kernel"])
        assert length == pytest.approx(expected, rel=1e-5)
