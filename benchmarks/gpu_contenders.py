"""What ``gpu_training`` measures: our net, Flax's and torch's, ready to run."""

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_RATE, _MOMENTUM, _DECAY = 0.1, 0.9, 1e-4
_MEAN, _STD = 0.5, 0.25


@dataclasses.dataclass(frozen=True)
class Switch:
    """A way to build or compile our step.

    Attributes:
      options: of ``create_model``; and dtype.
      flags: of XLA, added to those that are set.
      candidate: also with the fused gradient's mask computed twice, and the
        max-pooling's own gradient.
    """

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: str = ""
    candidate: bool = False

    def set(self) -> None:
        """Switches what is no option of the net."""
        from resnet_jax.models import fused, resnet

        fused.RECOMPUTES_MASK = resnet.POOLS_BY_HAND = self.candidate


SWITCHES = {
    "default": Switch(),
    "pointwise": Switch({"conv_algorithm": "pointwise"}),
    "products": Switch({"conv_algorithm": "products"}),
    "remat": Switch({"remat": True}),
    "fused norm": Switch({"fused_norm": True}),
    "fast variance": Switch({"norm_variance": "fast"}),
    "fused, fast": Switch({"fused_norm": True, "norm_variance": "fast"}),
    "candidate": Switch({"fused_norm": True, "norm_variance": "fast"}, candidate=True),
    "candidate, pointwise": Switch(
        {"fused_norm": True, "norm_variance": "fast", "conv_algorithm": "pointwise"},
        candidate=True,
    ),
    "fast, pool": Switch({"norm_variance": "fast"}, candidate=True),
    "float32": Switch({"dtype": "float32"}),
    "no graphs": Switch(flags="--xla_gpu_enable_command_buffer="),
    "graphs": Switch(flags="--xla_gpu_enable_command_buffer=+CONVOLUTION"),
    "conv fusion": Switch(flags="--xla_gpu_experimental_enable_conv_fusion=true"),
    "runtime fusion": Switch(flags="--xla_gpu_use_runtime_fusion=true"),
    "no autotuning": Switch(flags="--xla_gpu_autotune_level=0"),
    "fusion autotuner": Switch(
        flags="--xla_gpu_experimental_enable_fusion_autotuner=true"
    ),
}
"""By name; JAX's float32 lets products round their factors on a GPU (TF32)."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
      framework: of ``FRAMEWORKS``.
      model: the net.
      batch: images a step.
      way: ours: a key of ``SWITCHES``, "inference" or "folded", "end to end" or "input
        alone"; torch: "eager" or "compiled", behind "folded, " for inference; flax:
        jitted.
      images: for the last two of ours: folder of CLASS/IMAGE.
    """

    framework: str
    model: str
    batch: int
    way: str
    images: str | None = None

    @property
    def flags(self) -> str:
        """Of XLA."""
        return SWITCHES[self.way].flags if self.way in SWITCHES else ""


@dataclasses.dataclass
class Running:
    """An implementation, ready to run.

    Attributes:
      run: does so many steps, waits for them, and says whether all is finite.
      facts: of the row.
      peak: bytes on the device at the fullest moment; None where it does not tell.
      program: the compiled program, of JAX.
    """

    run: Callable[[int], bool]
    facts: dict[str, Any]
    peak: Callable[[], int | None]
    program: Any = None


def prepared(case: Case) -> Running:
    """Builds what the case measures; nothing is compiled yet."""
    if case.framework == "torch":
        is_inference = case.way.startswith("folded")
        return torch_inference(case) if is_inference else torch_running(case)
    if case.framework == "flax":
        return flax_running(case)
    if case.way in SWITCHES:
        return our_running(case)
    return fed_running(case) if case.images else our_inference(case)


def our_running(case: Case) -> Running:
    """The library's step with a switch, and what XLA says of the program."""
    import jax

    from resnet_jax.analysis.complexity import count_parameters
    from resnet_jax.config.schema import AugmentationConfig
    from resnet_jax.models import catalog_entry
    from resnet_jax.training.benchmark import synthetic_step

    SWITCHES[case.way].set()
    options = dict(SWITCHES[case.way].options)
    step, state, batch = synthetic_step(
        case.model,
        case.batch,
        catalog_entry(case.model).image_size,
        options.pop("dtype", "bfloat16"),
        AugmentationConfig(),
        devices=1,
        **options,
    )
    start = time.perf_counter()
    compiled = step.lower(state, None, batch).compile()
    facts = {
        "implementation": "resnet_jax",
        "parameters": count_parameters(state.params),
        "compile_seconds": time.perf_counter() - start,
        **_account(compiled, case.batch),
    }

    def run(steps: int) -> bool:
        nonlocal state
        for _ in range(steps):
            state = compiled(state, None, batch)
        jax.block_until_ready(state)
        return int(state.first_bad_step) < 0

    return Running(run, facts, _jax_peak, compiled)


def _account(compiled: Any, batch: int) -> dict[str, Any]:
    """XLA's own sums for a program; None where a backend gives none."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    nbytes = (cost or {}).get("bytes accessed")
    return {
        "xla_bytes_an_image": None if nbytes is None else nbytes / batch,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def our_inference(case: Case) -> Running:
    """The forward pass of evaluation, on request with folded normalisations."""
    import jax
    import jax.numpy as jnp

    from resnet_jax.analysis.complexity import count_parameters
    from resnet_jax.data.transforms import normalize, to_unit
    from resnet_jax.models import create_model, fold_batch_norm

    net = create_model(case.model, dtype=jnp.bfloat16)
    images = jax.device_put(synthetic(case)[0])
    init = functools.partial(net.init, train=False)
    variables = jax.jit(init)(jax.random.key(0), jnp.zeros(images.shape, jnp.float32))
    if case.way == "folded":
        net, variables = fold_batch_norm(net, variables)
    pixels = _pixels()

    def classify(variables: Any, images: Any) -> Any:
        return net.apply(variables, normalize(to_unit(images), pixels), train=False)

    start = time.perf_counter()
    compiled = jax.jit(classify).lower(variables, images).compile()
    facts = {
        "implementation": "resnet_jax",
        "parameters": count_parameters(variables["params"]),
        "compile_seconds": time.perf_counter() - start,
        **_account(compiled, case.batch),
    }

    def run(steps: int) -> bool:
        for _ in range(steps):
            logits = compiled(variables, images)
        return bool(jnp.isfinite(logits).all())  # which waits for the device

    return Running(run, facts, _jax_peak)


def fed_running(case: Case) -> Running:
    """The step on images that the pipeline reads, or the pipeline without a step."""
    import jax

    from resnet_jax import parallel
    from resnet_jax.config import resolve
    from resnet_jax.models import catalog_entry
    from resnet_jax.training.setup import prepare

    folder = Path(str(case.images)).resolve()
    config = resolve(
        {
            "model.name": case.model,
            "model.dtype": "bfloat16",
            "data.name": "images",
            "data.path": str(folder.parent),
            "data.train_split": f"{folder.name}[:90%]",
            "data.test_split": f"{folder.name}[90%:]",  # not read
            "data.image_size": catalog_entry(case.model).image_size,
            "data.normalization": "imagenet",
            "data.resident": False,
            "augmentation.crop_area": (0.08, 1.0),
            "augmentation.flip": True,
            "training.steps": 10**6,
            "training.global_batch_size": case.batch,
        }
    )
    setup = prepare(config, parallel.data_mesh(1))
    train = setup.dataset.train
    stream = setup.feed(train).training_batches(0, case.batch, config.seed)
    facts = {
        "implementation": "resnet_jax",
        "images": len(train),
        "classes": setup.dataset.num_classes,
        "threads": config.data.threads,
    }

    def read(steps: int) -> bool:
        for _ in range(steps):
            jax.block_until_ready(next(stream))
        return True

    if case.way == "input alone":
        return Running(read, facts, _jax_peak)
    step, state = setup.train_step(), setup.fresh_state()

    def run(steps: int) -> bool:
        nonlocal state
        for _ in range(steps):
            state = step(state, None, next(stream))
        jax.block_until_ready(state)
        return int(state.first_bad_step) < 0

    return Running(run, facts, _jax_peak)


def flax_running(case: Case) -> Running:
    """Flax's example's net; see benchmarks/train_step.py."""
    from benchmarks.train_step import Work, flax_contender

    work = Work(case.model, *synthetic(case), _pixels())
    contender = flax_contender(work, "bfloat16")

    def run(steps: int) -> bool:
        contender.run(steps)
        return bool(contender.is_finite())

    facts = {"implementation": "flax", "parameters": contender.parameters}
    return Running(run, facts, _jax_peak)


def torch_running(case: Case) -> Running:
    """Torch's step, eager or compiled."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    net, implementation = torch_net(case.model)
    net = net.to(device, memory_format=torch.channels_last).train()
    host_images, host_labels = synthetic(case)
    # (n, h, w, c) in memory, seen as (n, c, h, w): channels_last.
    images = torch.from_numpy(host_images).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(host_labels).long().to(device)
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=_RATE,
        momentum=_MOMENTUM,
        weight_decay=_DECAY,
        fused=device == "cuda",
    )

    def loss_of() -> Any:
        batch = (images.float() / 255 - _MEAN) / _STD
        with torch.autocast(device, torch.bfloat16):
            logits = net(batch)
        return functional.cross_entropy(logits.float(), labels)

    if case.way == "compiled":
        loss_of = torch.compile(loss_of)

    def run(steps: int) -> bool:
        for _ in range(steps):
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return math.isfinite(loss.item())  # which waits for the device

    return Running(run, _torch_facts(net, implementation), _torch_peak)


def torch_inference(case: Case) -> Running:
    """Torch's forward pass with folded normalisations, eager or compiled."""
    import torch
    from torch.fx.experimental.optimization import fuse

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    plain, implementation = torch_net(case.model)
    folded: Any = fuse(plain.eval())
    net = folded.to(device, dtype=torch.bfloat16, memory_format=torch.channels_last)
    images = torch.from_numpy(synthetic(case)[0]).to(device).permute(0, 3, 1, 2)

    def classify() -> Any:
        return net(((images.float() / 255 - _MEAN) / _STD).to(torch.bfloat16))

    call = torch.compile(classify) if case.way.endswith("compiled") else classify

    def run(steps: int) -> bool:
        with torch.inference_mode():
            for _ in range(steps):
                logits = call()
            return bool(logits.isfinite().all())  # which waits for the device

    return Running(run, _torch_facts(net, implementation), _torch_peak)


def torch_net(model: str) -> tuple[Any, str]:
    """A net of torchvision or timm, else that of the peers, and whose it is."""
    for library, make in (
        ("torchvision", lambda found: getattr(found.models, model)()),
        ("timm", lambda found: found.create_model(model)),
    ):
        # One that does not fit the installed torch fails in other ways too.
        try:
            found = importlib.import_module(library)
            return make(found), f"{library} {found.__version__}"
        except (ImportError, AttributeError, RuntimeError):
            continue
    from benchmarks.peers import LAYOUTS
    from benchmarks.peers_torch import TorchResNet

    return TorchResNet(LAYOUTS[model]), "benchmarks/peers_torch.py"


def synthetic(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images (n, h, w, 3) uint8 and labels (n,) int32."""
    from benchmarks.peers import LAYOUTS

    layout = LAYOUTS[case.model]
    rng = np.random.default_rng(0)
    shape = (case.batch, layout.image_size, layout.image_size, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    return images, rng.integers(0, layout.num_classes, case.batch).astype(np.int32)


def _pixels() -> Any:
    from resnet_jax.data.transforms import PixelStatistics

    mean, std = (np.full((1, 1, 3), value, np.float32) for value in (_MEAN, _STD))
    return PixelStatistics(mean, std)


def _torch_facts(net: Any, implementation: str) -> dict[str, Any]:
    import torch

    return {
        "implementation": implementation,
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
    }


def _torch_peak() -> int | None:
    import torch

    available = torch.cuda.is_available()
    return torch.cuda.max_memory_allocated() if available else None


def _jax_peak() -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
