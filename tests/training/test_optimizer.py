import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.config.schema import OptimizerConfig
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.training.optimizer import decay_mask, make_optimizer
from tests.models.reference import assert_trees_equal

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)},
    "norm": {"scale": RNG.normal(size=4), "bias": np.zeros(4)},
}
PARAMS = jax.tree.map(np.float32, PARAMS)
GRADIENTS = [
    jax.tree.map(lambda p: (3 * RNG.normal(size=p.shape)).astype(np.float32), PARAMS)
    for _ in range(5)
]
RATES = (0.1, 0.2, 0.1, 0.05, 0.1)
KERNELS = {("conv", "kernel")}
NO_NORM = KERNELS | {("conv", "bias")}
ALL = NO_NORM | {("norm", "scale"), ("norm", "bias")}
SCOPES = {"kernels": KERNELS, "all_but_norm": NO_NORM, "all": ALL}


def leaves(tree):
    return {
        (module, name): np.asarray(value)
        for module, parameters in tree.items()
        for name, value in parameters.items()
    }


def run(config, frozen=()):
    optimizer = make_optimizer(config, frozen)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for gradients, rate in zip(GRADIENTS, RATES):
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(lambda p, u, rate=rate: p - rate * u, params, updates)
    return leaves(params)


def clipped(gradients, limit, parts):
    norm = np.sqrt(sum((gradients[part] ** 2).sum() for part in parts))
    factor = 1 if limit is None else min(1, limit / norm)
    return {part: factor * gradients[part] for part in parts}


def sgd(decays, weight_decay=0.0, limit=None, parts=ALL):
    """v = m v + g + wd w, w -= rate v."""
    params = leaves(PARAMS)
    velocity = dict.fromkeys(parts, 0)
    for gradients, rate in zip(GRADIENTS, RATES):
        gradients = clipped(leaves(gradients), limit, parts)
        for part in parts:
            decay = weight_decay * params[part] if part in decays else 0
            velocity[part] = 0.9 * velocity[part] + gradients[part] + decay
            params[part] = params[part] - rate * velocity[part]
    return params


def lamb(decays, weight_decay, limit=None, parts=ALL):
    """Algorithm 2 of You et al. 2019 with bias correction, where there is decay."""
    params = leaves(PARAMS)
    first = dict.fromkeys(parts, 0)
    second = dict.fromkeys(parts, 0)
    for step, (gradients, rate) in enumerate(zip(GRADIENTS, RATES), start=1):
        gradients = clipped(leaves(gradients), limit, parts)
        for part in parts:
            g, w = gradients[part], params[part]
            first[part] = 0.9 * first[part] + 0.1 * g
            second[part] = 0.999 * second[part] + 0.001 * g**2
            m, v = first[part] / (1 - 0.9**step), second[part] / (1 - 0.999**step)
            update = m / (np.sqrt(v) + 1e-6)
            if part in decays:
                update = update + weight_decay * w
                norms = np.linalg.norm(w), np.linalg.norm(update)
                update = update * (norms[0] / norms[1] if min(norms) > 0 else 1)
            params[part] = w - rate * update
    return params


def assert_same(found, expected):
    for part, value in expected.items():
        np.testing.assert_allclose(found[part], value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("scope", list(SCOPES))
@pytest.mark.parametrize("limit", [None, 1.0, 1e6])
def test_sgd_decays_its_scope_and_clips(scope, limit):
    config = OptimizerConfig(
        weight_decay=0.1, weight_decay_scope=scope, max_grad_norm=limit
    )
    assert_same(run(config), sgd(SCOPES[scope], 0.1, limit))


@pytest.mark.parametrize("scope", list(SCOPES))
@pytest.mark.parametrize("limit", [None, 1.0])
def test_lamb_follows_its_equations(scope, limit):
    config = OptimizerConfig(
        kind="lamb", weight_decay=0.02, weight_decay_scope=scope, max_grad_norm=limit
    )
    assert_same(run(config), lamb(SCOPES[scope], 0.02, limit))


def test_lamb_is_timms():
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
            "weight_decay": 0.02 if own else 0.0,
        }
        for own in (True, False)
    ]
    optimizer = peer.Lamb(groups, lr=0.1)
    for gradients, rate in zip(GRADIENTS, RATES):
        for part, gradient in leaves(gradients).items():
            parameters[part].grad = torch.from_numpy(gradient.copy())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    config = OptimizerConfig(
        kind="lamb",
        weight_decay=0.02,
        weight_decay_scope="kernels",
        max_grad_norm=1.0,
    )
    expected = {part: p.detach().numpy() for part, p in parameters.items()}
    assert_same(run(config), expected)


@pytest.mark.parametrize("kind", ["sgd", "lamb"])
def test_frozen_parts_stay_and_count_for_no_norm(kind):
    config = OptimizerConfig(
        kind=kind,
        weight_decay=0.02,
        weight_decay_scope="kernels",
        max_grad_norm=1.0,
    )
    rule = lamb if kind == "lamb" else sgd
    expected = rule(KERNELS, 0.02, 1.0, parts=NO_NORM)
    found = run(config, frozen=("norm",))
    assert_same(found, expected)
    for part in ALL - NO_NORM:
        np.testing.assert_array_equal(found[part], leaves(PARAMS)[part])


def test_the_default_is_the_papers_chain():
    """The state's tree is in every checkpoint: it may not change."""
    ours = make_optimizer(OptimizerConfig()).init(PARAMS)
    chain = optax.chain(optax.add_decayed_weights(1e-4), optax.trace(decay=0.9)).init(
        PARAMS
    )
    assert jax.tree.structure(ours) == jax.tree.structure(chain)


NET = {
    name: {"kernel": RNG.normal(size=(3, 4)).astype(np.float32)}
    for name in ("stem", "stage1", "stage2", "norm", "head")
}
RATE_BY_DEPTH = {
    "head": 1,
    "norm": 0.7,
    "stage2": 0.49,
    "stage1": 0.343,
    "stem": 0.2401,
}


@pytest.mark.parametrize("frozen", [(), ("stage1",)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_layer_decay_is_a_rate_per_group_of_torch(nesterov, frozen):
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(weight_decay=0.1, nesterov=nesterov, layer_decay=0.7)
    ours, optimizer = jax.tree.map(jnp.asarray, NET), make_optimizer(config, frozen)
    state = optimizer.init(ours)
    theirs = {
        part: torch.nn.Parameter(torch.from_numpy(tree["kernel"].copy()))
        for part, tree in NET.items()
    }
    groups = [{"params": [theirs[p]], "part": p} for p in NET if p not in frozen]
    peer = torch.optim.SGD(
        groups, lr=1.0, momentum=0.9, weight_decay=0.1, nesterov=nesterov
    )
    for rate in RATES:
        gradients = {part: RNG.normal(size=(3, 4)).astype(np.float32) for part in NET}
        tree = {part: {"kernel": g} for part, g in gradients.items()}
        updates, state = jax.jit(optimizer.update)(tree, state, ours)
        ours = jax.tree.map(lambda p, u, rate=rate: p - rate * u, ours, updates)
        for group in peer.param_groups:
            group["lr"] = rate * RATE_BY_DEPTH[group["part"]]
            theirs[group["part"]].grad = torch.from_numpy(gradients[group["part"]])
        peer.step()
    for part, parameter in theirs.items():
        found = np.asarray(ours[part]["kernel"])
        np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=0, atol=1e-6)
        assert np.array_equal(found, NET[part]["kernel"]) == (part in frozen)


@pytest.mark.parametrize("kind", ["sgd", "lars", "lamb"])
def test_layer_decay_scales_the_whole_update_and_keeps_the_state(kind):
    found = {}
    for decay in (1.0, 0.5):
        config = OptimizerConfig(kind=kind, max_grad_norm=1.0, layer_decay=decay)
        optimizer = make_optimizer(config)
        found[decay] = optimizer.update(NET, optimizer.init(NET), NET)
    (plain, state), (scaled, scaled_state) = found.values()
    assert_trees_equal(state, scaled_state[:-1])
    assert not jax.tree.leaves(scaled_state[-1])
    for distance, part in enumerate(["head", "norm", "stage2", "stage1", "stem"]):
        expected = jax.tree.map(lambda u, d=distance: u * 0.5**d, plain[part])
        assert_trees_equal(scaled[part], expected)


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_highway19", "seresnet50"])
def test_scopes_know_the_parameters_of_the_nets(name):
    """Kernels have two axes or more, all else one: as timm tells them apart."""
    model = create_model(name)
    shape = (1, 32, 32, 3)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False)
    )["params"]
    kernels = decay_mask(params, "kernels")
    jax.tree.map(
        lambda leaf, decays: _assert(decays == (leaf.ndim > 1)), params, kernels
    )
    flat = jax.tree_util.tree_flatten_with_path(decay_mask(params, "all_but_norm"))[0]
    for path, decays in flat:
        names = [entry.key for entry in path]
        is_norm = any(part.startswith("norm") or "_norm" in part for part in names)
        assert decays != is_norm, names


def _assert(condition):
    assert condition


def adamw(decays, weight_decay, beta_1, beta_2, epsilon):
    """Loshchilov & Hutter 2019, algorithm 2."""
    params = leaves(PARAMS)
    first, second = dict.fromkeys(params, 0), dict.fromkeys(params, 0)
    for step, (gradients, rate) in enumerate(zip(GRADIENTS, RATES), start=1):
        for part, g in leaves(gradients).items():
            first[part] = beta_1 * first[part] + (1 - beta_1) * g
            second[part] = beta_2 * second[part] + (1 - beta_2) * g**2
            mean = first[part] / (1 - beta_1**step)
            root = np.sqrt(second[part] / (1 - beta_2**step))
            decay = weight_decay * params[part] if part in decays else 0
            params[part] = params[part] - rate * (mean / (root + epsilon) + decay)
    return params


@pytest.mark.parametrize("scope", SCOPES)
def test_adamw_of_optax_follows_its_equations(scope):
    config = OptimizerConfig(
        kind="adamw",
        arguments=("b1=0.8", "b2=0.95", "eps=1e-3"),
        weight_decay=0.05,
        weight_decay_scope=scope,
    )
    expected = adamw(SCOPES[scope], 0.05, 0.8, 0.95, 1e-3)
    for part, value in run(config).items():
        np.testing.assert_allclose(value, expected[part], rtol=2e-5, err_msg=str(part))


@pytest.mark.parametrize("kind", ["adan", "lion", "rmsprop", "yogi"])
def test_others_of_optax_take_the_steps_they_take_there(kind):
    """With a rate that changes, which optax itself would take from a schedule."""
    takes_decay = kind in ("adan", "lion")
    config = OptimizerConfig(kind=kind, weight_decay=0.1 if takes_decay else 0.0)
    theirs = getattr(optax, kind)(
        lambda count: jnp.asarray(RATES)[count],
        **({"weight_decay": 0.1} if takes_decay else {}),
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = theirs.init(params)
    for gradients in GRADIENTS:
        updates, state = theirs.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    for part, value in run(config).items():
        np.testing.assert_allclose(value, leaves(params)[part], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("fromage", "optax.fromage is not proportional to its learning rate"),
        ("lbfgs", "optax.lbfgs needs more than gradients and parameters"),
    ],
)
def test_updates_of_another_form_are_refused(kind, sentence):
    with pytest.raises(UserError, match=sentence):
        make_optimizer(OptimizerConfig(kind=kind, weight_decay=0.0))
