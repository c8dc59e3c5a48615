"""What the benchmarks run: our training step, Flax's example's and torch's.

Each function builds one contender on the first device. All train on random uint8
images on the device, scale them to [0, 1], subtract 0.5, and use SGD with learning rate
0.1, momentum 0.9 and weight decay 1e-4 on every parameter. ``dtype`` is that of
convolutions and maps in JAX, and of torch's autocast.
"""

import dataclasses
import functools
import importlib
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.peers import LAYOUTS, FlaxResNet
from resnet_jax import parallel
from resnet_jax.analysis.complexity import count_parameters
from resnet_jax.config import Config
from resnet_jax.config.schema import AugmentationConfig
from resnet_jax.data.order import Order
from resnet_jax.evaluation.metrics import cross_entropy
from resnet_jax.models import create_model, fold_batch_norm
from resnet_jax.options import ModelOptions, declared
from resnet_jax.training.benchmark import synthetic_inputs, synthetic_learner
from resnet_jax.training.step import make_train_step, make_train_steps

OURS = "resnet_jax"
_MEAN = 0.5
_PAD = 4
_OPTIONS = [
    field.name
    for field in declared(ModelOptions)
    if field.name not in ("name", "dtype")
]
_RECIPE = Config().optimizer


@dataclasses.dataclass
class Contender:
    """One implementation, ready to run.

    Attributes:
      name: in the table.
      run: makes a number of steps, waits for the device, and returns whether the losses
        are finite. It continues from its last state.
      facts: for the result: parameters, implementation.
      unit: the steps of one call; ``run`` rounds up to whole calls.
      program: the compiled step, if it is ours.
    """

    name: str
    run: Callable[[int], bool]
    facts: dict[str, Any]
    unit: int = 1
    program: jax.stages.Compiled | None = None


def synthetic(model: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images (count, h, w, 3) uint8 and labels (count,) int32."""
    layout, rng = LAYOUTS[model], np.random.default_rng(0)
    shape = (count, layout.image_size, layout.image_size, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    return images, rng.integers(0, layout.num_classes, count).astype(np.int32)


def parse_options(form: str) -> dict[str, Any]:
    """Options of the net from OPTION=VALUE,...; values as in JSON, else text."""
    options: dict[str, Any] = {}
    for pair in form.split(",") if form != "default" else ():
        name, separator, text = pair.partition("=")
        if not separator:
            raise SystemExit(f"{form!r} is no form: give default or OPTION=VALUE,...")
        if name not in _OPTIONS:
            raise SystemExit(f"{name!r} is no option; there are {', '.join(_OPTIONS)}")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def our_step(
    model: str, batch: int, dtype: str = "float32", name: str = OURS, **options: Any
) -> Contender:
    """The library's training step without augmentation, on one fixed batch.

    Args:
      model: of ``LAYOUTS``.
      batch: images per step.
      dtype: "float32" or "bfloat16".
      name: in the table.
      **options: fields of the config's ``model`` section.
    """
    learner = synthetic_learner(
        model,
        batch,
        dtype=dtype,
        augmentation=AugmentationConfig(),
        mesh=parallel.data_mesh(1),
        **options,
    )
    state, inputs = synthetic_inputs(learner)
    compiled = make_train_step(learner).lower(state, None, inputs).compile()

    def run(steps: int) -> bool:
        nonlocal state
        for _ in range(steps):
            state = compiled(state, None, inputs)
        jax.block_until_ready(state)
        return int(state.first_bad_step) < 0

    memory = compiled.memory_analysis()
    facts = _jax_facts("resnet_jax", state.params) | {
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None)
    }
    return Contender(name, run, facts, program=compiled)


def our_resident_steps(
    model: str,
    batch: int,
    dtype: str,
    *,
    steps: int,
    num_images: int,
    name: str = OURS,
    **options: Any,
) -> Contender:
    """The library's step with crops and flips, ``steps`` of them per call.

    The images are on the device; the host sends the indices of each call's batches, as
    training does.
    """
    learner = synthetic_learner(
        model, batch, dtype=dtype, mesh=parallel.data_mesh(1), **options
    )
    state, _ = synthetic_inputs(learner)
    images, labels = synthetic(model, num_images)
    same = parallel.replicated(learner.mesh)
    resident = parallel.place({"image": images, "label": labels}, same)
    order, program = Order(num_images, seed=0), make_train_steps(learner)
    position = 0

    def run(count: int) -> bool:
        nonlocal state, position
        for _ in range(-(-count // steps)):
            indices = order.examples(position, steps * batch).reshape(steps, batch)
            sharding = parallel.steps_sharding(learner.mesh)
            state = program(state, resident, parallel.place(indices, sharding))
            position += steps * batch
        jax.block_until_ready(state)
        return int(state.first_bad_step) < 0

    return Contender(name, run, _jax_facts("resnet_jax", state.params), steps)


def our_inference(
    model: str,
    batch: int,
    folded: bool,
    name: str = OURS,
    dtype: str = "bfloat16",
) -> Contender:
    """The forward pass of evaluation, with or without folded normalisations."""
    net: Any = create_model(model, dtype=jnp.dtype(dtype))
    variables = fresh_variables(net, model)
    if folded:
        net, variables = fold_batch_norm(net, variables)
    return _jax_inference(name, net, variables, model, batch, "resnet_jax")


def flax_inference(model: str, batch: int, dtype: str = "bfloat16") -> Contender:
    """The forward pass of evaluation of Flax's example, whose norms are not folded."""
    net = FlaxResNet(LAYOUTS[model], dtype=jnp.dtype(dtype))
    variables = fresh_variables(net, model)
    source = "benchmarks/peers.py"
    return _jax_inference("flax_example", net, variables, model, batch, source)


def fresh_variables(net: nn.Module, model: str) -> Any:
    """Random variables of a net for the images of ``LAYOUTS``."""
    side = LAYOUTS[model].image_size
    init = functools.partial(net.init, train=False)
    return jax.jit(init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))


def _jax_inference(
    name: str, net: Any, variables: Any, model: str, batch: int, implementation: str
) -> Contender:
    images = jax.device_put(synthetic(model, batch)[0])

    @jax.jit
    def classify(variables, images):
        return net.apply(variables, _normalized(images), train=False)

    def run(steps: int) -> bool:
        for _ in range(steps):
            logits = classify(variables, images)
        return bool(jnp.isfinite(logits).all())  # waits for the device

    return Contender(name, run, _jax_facts(implementation, variables["params"]))


def flax_training(model: str, dtype: str) -> tuple[Callable[..., Any], Any]:
    """The net of Flax's ImageNet example in a plain jitted step.

    Returns:
      A function of a key to the first state: params, batch_stats, opt_state; and one of
      (state, images, labels) to the next state and the loss.
    """
    layout = LAYOUTS[model]
    net = FlaxResNet(layout, dtype=jnp.dtype(dtype))
    optimizer = optax.chain(
        optax.add_decayed_weights(_RECIPE.weight_decay),
        optax.sgd(_RECIPE.learning_rate, momentum=_RECIPE.momentum),
    )

    def init(key):
        side = layout.image_size
        variables = net.init(key, jnp.zeros((1, side, side, 3)))
        params = variables["params"]
        return params, variables["batch_stats"], optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, images, labels):
        params, batch_stats, opt_state = state
        loss, batch_stats, gradients = _gradient(
            net, params, batch_stats, images, labels
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), loss

    return init, train_step


def flax_step(model: str, batch: int, dtype: str = "float32") -> Contender:
    """``flax_training`` on one fixed batch."""
    init, train_step = flax_training(model, dtype)
    images, labels = jax.device_put(synthetic(model, batch))
    state = jax.jit(init)(jax.random.key(0))

    def run(steps: int) -> bool:
        nonlocal state
        for _ in range(steps):
            state, loss = train_step(state, images, labels)
        return math.isfinite(jax.block_until_ready((state, loss))[1])

    facts = _jax_facts("benchmarks/peers.py", state[0])
    return Contender("flax_example", run, facts)


def jax_gradient(
    name: str, net: nn.Module, model: str, batch: int, implementation: str
) -> Contender:
    """Loss, gradients and new running statistics of a Linen net; no update."""
    images, labels = jax.device_put(synthetic(model, batch))
    variables: Any = jax.jit(net.init)(
        jax.random.key(0), jnp.zeros((1, *images.shape[1:]))
    )
    gradient = jax.jit(functools.partial(_gradient, net))

    def run(steps: int) -> bool:
        for _ in range(steps):
            found = gradient(
                variables["params"], variables["batch_stats"], images, labels
            )
        return math.isfinite(jax.block_until_ready(found)[0])

    return Contender(name, run, _jax_facts(implementation, variables["params"]))


def torch_step(
    model: str,
    batch: int,
    dtype: str = "float32",
    *,
    name: str = "torch",
    device: str = "cpu",
    channels_last: bool = True,
    compiled: bool = False,
    updates: bool = True,
) -> Contender:
    """Torch's training step; without ``updates`` loss and gradients alone."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net, implementation = torch_net(model)
    net = net.to(device, memory_format=layout).train()
    host_images, host_labels = synthetic(model, batch)
    images = torch.from_numpy(host_images).to(device).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=layout)
    labels = torch.from_numpy(host_labels).long().to(device)
    optimizer = _torch_optimizer(net, device)

    def loss_of() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(images.float() / 255 - _MEAN)
        return functional.cross_entropy(logits.float(), labels)

    if compiled:
        loss_of = torch.compile(loss_of)

    def run(steps: int) -> bool:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            if updates:
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return math.isfinite(loss.item())

    return Contender(name, run, _torch_facts(net, implementation))


def torch_resident_steps(
    model: str,
    batch: int,
    precision: str,
    *,
    num_images: int,
    device: str,
    compiled: bool,
    name: str = "torch",
) -> Contender:
    """Torch's step with crops and flips on images on the device.

    Compiled with mode="reduce-overhead", which records CUDA graphs.
    """
    import torch
    from torch.nn import functional

    from benchmarks.peers_torch import TorchResNet

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    net: Any = TorchResNet(LAYOUTS[model])
    net = net.to(device, memory_format=torch.channels_last)
    host_images, host_labels = synthetic(model, num_images)
    images = torch.from_numpy(host_images).to(device)
    labels = torch.from_numpy(host_labels).long().to(device)
    optimizer = _torch_optimizer(net, device)
    side = torch.arange(images.shape[1], device=device)
    places = torch.arange(batch, device=device)[:, None, None]

    def augmented(indices: Any) -> Any:
        """A batch (n, 3, h, w), channels last."""
        x = images[indices].float() / 255 - _MEAN
        mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
        x = torch.where(mirrored, x.flip(2), x)
        x = functional.pad(x, (0, 0, _PAD, _PAD, _PAD, _PAD))
        corners = torch.randint(0, 2 * _PAD + 1, (2, batch, 1), device=device)
        rows, columns = (corner + side for corner in corners)
        return x[places, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def loss_of(indices: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, precision == "bfloat16"):
            logits = net(augmented(indices))
        return functional.cross_entropy(logits.float(), labels[indices])

    if compiled:
        loss_of = torch.compile(loss_of, mode="reduce-overhead")
    order = torch.randperm(num_images, device=device)
    batches = order[: num_images // batch * batch].split(batch)

    def run(steps: int) -> bool:
        for step in range(steps):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            loss = loss_of(batches[step % len(batches)])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return math.isfinite(loss.item())  # waits for the device

    return Contender(name, run, _torch_facts(net, "benchmarks/peers_torch.py"))


def torch_inference(
    model: str,
    batch: int,
    device: str,
    compiled: bool,
    name: str = "torch",
    dtype: str = "bfloat16",
    channels_last: bool = True,
) -> Contender:
    """Torch's forward pass with folded normalisations."""
    import torch

    with warnings.catch_warnings():
        # The module defines classes for MKL-DNN in a way that torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.fx.experimental.optimization import fuse

    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    precision = getattr(torch, dtype)
    plain, implementation = torch_net(model)
    folded: Any = fuse(plain.eval())
    net = folded.to(device, dtype=precision, memory_format=layout)
    images = torch.from_numpy(synthetic(model, batch)[0]).to(device)
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=layout)

    def classify() -> Any:
        return net((images.float() / 255 - _MEAN).to(precision))

    call = torch.compile(classify) if compiled else classify

    def run(steps: int) -> bool:
        with torch.inference_mode():
            for _ in range(steps):
                logits = call()
            return bool(logits.isfinite().all())  # waits for the device

    return Contender(name, run, _torch_facts(net, implementation))


def torch_net(model: str) -> tuple[Any, str]:
    """Torchvision's net if it is installed, else the peer; and its source."""
    # A torchvision that does not fit the installed torch fails in other ways too.
    try:
        found = importlib.import_module("torchvision")
        return getattr(found.models, model)(), f"torchvision {found.__version__}"
    except (ImportError, AttributeError, RuntimeError):
        from benchmarks.peers_torch import TorchResNet

        return TorchResNet(LAYOUTS[model]), "benchmarks/peers_torch.py"


def _gradient(net, params, batch_stats, images, labels):
    """Loss, new running statistics and gradients."""
    images = _normalized(images)

    def loss_fn(params):
        logits, updates = net.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, labels).mean(), updates["batch_stats"]

    (loss, stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, stats, gradients


def _normalized(images):
    return images.astype(jnp.float32) / 255 - _MEAN


def _torch_optimizer(net: Any, device: str) -> Any:
    import torch

    return torch.optim.SGD(
        net.parameters(),
        lr=_RECIPE.learning_rate,
        momentum=_RECIPE.momentum,
        weight_decay=_RECIPE.weight_decay,
        fused=device == "cuda",
    )


def _jax_facts(implementation: str, params: Any) -> dict[str, Any]:
    return {"implementation": implementation, "parameters": count_parameters(params)}


def _torch_facts(net: Any, implementation: str) -> dict[str, Any]:
    import torch

    return {
        "implementation": f"{implementation}, torch {torch.__version__}",
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
    }
