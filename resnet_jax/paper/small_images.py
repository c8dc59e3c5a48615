"""The experiments on small images: section 4.2, and what readers set beside it.

Published errors are those of the sources named, in percent.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from resnet_jax.paper.entries import Experiment, Panel, PaperRun, Published, TableRow

_HE2015 = "He et al. 2015"
_HE2016 = "He et al. 2016"
_WRN = "Zagoruyko & Komodakis 2016"

_ONE_VIEW = (
    "The test set's single view of each image at the last checkpoint, 64k steps."
)
_WARM_UP = {
    "schedule.warmup_learning_rate": "0.01",
    "schedule.warmup_until_error": "0.8",
}
"""The paper's for depth 110: a small rate until the training error is below 80 %."""


def _cifar(net: str, options: Mapping[str, str] = MappingProxyType({})) -> PaperRun:
    """A net and its options with the recipe of section 4.2."""
    name = "-".join([net, *(f"{key}={value}" for key, value in options.items())])
    fields = {f"model.{key}": value for key, value in options.items()}
    if options.get("normalization") == "none":
        # The recipe's groups are of batch normalisation.
        fields["model.batch_norm_groups"] = "1"
    return PaperRun(name, f"cifar10.py:{net}", fields)


def _deep(net: str, options: Mapping[str, str] = MappingProxyType({})) -> PaperRun:
    """The same with the warm-up of depth 110."""
    run = _cifar(net, options)
    return dataclasses.replace(run, overrides={**run.overrides, **_WARM_UP})


def _gated(shortcut: str, bias: str) -> PaperRun:
    return _deep("cifar_resnet110", {"shortcut": shortcut, "gate_bias": bias})


def _wide(net: str, options: Mapping[str, str] = MappingProxyType({})) -> PaperRun:
    """A wide net with its own recipe."""
    return dataclasses.replace(_cifar(net, options), config=f"cifar10_wide.py:{net}")


def _five(run: PaperRun) -> PaperRun:
    """Published from five seeds."""
    return dataclasses.replace(run, seeds=5)


PLAIN = {depth: _cifar(f"cifar_plain{depth}") for depth in (20, 32, 44, 56)}
RESNET = {
    **{depth: _cifar(f"cifar_resnet{depth}") for depth in (20, 32, 44, 56)},
    110: _five(_cifar("cifar_resnet110")),
    1202: _cifar("cifar_resnet1202"),
}

FIGURE1 = Experiment(
    name="figure1",
    title="Figure 1: training and test error of plain nets of 20 and 56 layers",
    source=_HE2015,
    shows="The deeper plain net has the higher training error, and so the higher test "
    "error: degradation, not overfitting.",
    protocol=_ONE_VIEW,
    entries=tuple(TableRow(f"plain-{depth}", PLAIN[depth]) for depth in (20, 56)),
    figure="train_and_test",
    panels=(Panel("", ("plain-20", "plain-56")),),
)

TABLE6 = Experiment(
    name="table6",
    title="Table 6: classification error by depth (published: CIFAR-10)",
    source=_HE2015,
    shows="Residual nets gain from depth up to 110 layers; 1202 layers train without "
    "trouble and overfit.",
    protocol=f"{_ONE_VIEW} ResNet-110: best (mean \u00b1 deviation) of 5 runs.",
    entries=(
        TableRow("Maxout", None, Published(9.38)),
        TableRow("NIN", None, Published(8.81)),
        TableRow("DSN", None, Published(8.22)),
        TableRow("FitNet, 19 layers", None, Published(8.39)),
        TableRow(
            "Highway, 19 layers",
            _cifar("cifar_highway19"),
            Published(7.54, 7.72, 0.16, note="with a recipe of its own"),
        ),
        TableRow(
            "Highway, 32 layers",
            _cifar("cifar_highway32"),
            Published(8.80, note="with a recipe of its own"),
        ),
        TableRow("ResNet-20", RESNET[20], Published(8.75)),
        TableRow("ResNet-32", RESNET[32], Published(7.51)),
        TableRow("ResNet-44", RESNET[44], Published(7.17)),
        TableRow("ResNet-56", RESNET[56], Published(6.97)),
        TableRow("ResNet-110", RESNET[110], Published(6.43, 6.61, 0.16)),
        TableRow("ResNet-1202", RESNET[1202], Published(7.93)),
        *(TableRow(f"plain-{depth}", run) for depth, run in PLAIN.items()),
    ),
    figure="depth",
    panels=(
        Panel("plain", tuple(f"plain-{depth}" for depth in PLAIN)),
        Panel("ResNet", tuple(f"ResNet-{depth}" for depth in RESNET)),
    ),
)

FIGURE6 = Experiment(
    name="figure6",
    title="Figure 6: training of plain and residual nets, 20 to 1202 layers",
    source=_HE2015,
    shows="Plain nets degrade with depth; residual nets do not; 110 and 1202 layers.",
    protocol=f"{_ONE_VIEW} The paper leaves out plain-110, above 60 %.",
    entries=(
        *(TableRow(f"plain-{depth}", run) for depth, run in PLAIN.items()),
        *(TableRow(f"ResNet-{depth}", run) for depth, run in RESNET.items()),
    ),
    figure="curves",
    panels=(
        Panel("plain nets", tuple(f"plain-{depth}" for depth in PLAIN)),
        Panel("ResNets", tuple(f"ResNet-{depth}" for depth in (20, 32, 44, 56, 110))),
        Panel("110 and 1202 layers", ("ResNet-110", "ResNet-1202")),
    ),
)

_FIGURE7 = (
    ("plain-20", PLAIN[20]),
    ("plain-56", PLAIN[56]),
    ("ResNet-20", RESNET[20]),
    ("ResNet-56", RESNET[56]),
    ("ResNet-110", RESNET[110]),
)
FIGURE7 = Experiment(
    name="figure7",
    title="Figure 7: standard deviations of layer responses",
    source=_HE2015,
    shows="Residual functions are closer to zero than what plain layers compute, and "
    "deeper nets change the signal less in each layer.",
    protocol="Outputs of the 3x3 layers on the test set, after batch normalisation and "
    "before ReLU and addition, at the last checkpoint.",
    entries=tuple(TableRow(label, run) for label, run in _FIGURE7),
    figure="responses",
    panels=(Panel("", tuple(label for label, _ in _FIGURE7)),),
    analysis="responses",
)


def _gradient_entries() -> tuple[TableRow, ...]:
    variants: Sequence[tuple[str, dict[str, str]]] = (
        ("BN, He", {}),
        ("no BN, He", {"normalization": "none"}),
        (
            "no BN, N(0, 0.01)",
            {"normalization": "none", "initialization": "normal_0.01"},
        ),
    )
    return tuple(
        TableRow(f"{kind}-{depth}, {name}", _cifar(f"cifar_{net}{depth}", options))
        for kind, net in (("plain", "plain"), ("ResNet", "resnet"))
        for depth in (20, 56)
        for name, options in variants
    )


GRADIENTS = Experiment(
    name="gradients",
    title="Gradient norms by layer, with and without BN and He initialisation",
    source=f"{_HE2015}, sections 1 and 4.1 (said there, not drawn)",
    shows="With batch normalisation, or with He initialisation alone at these depths, "
    "gradients of plain nets do not vanish: degradation is something else.",
    protocol="The loss's gradient by each convolution's kernel before the first step, "
    "over batches of training images.",
    entries=_gradient_entries(),
    figure="gradients",
    panels=tuple(
        Panel(
            f"{kind}-{depth}",
            tuple(
                f"{kind}-{depth}, {name}"
                for name in ("BN, He", "no BN, He", "no BN, N(0, 0.01)")
            ),
        )
        for kind in ("plain", "ResNet")
        for depth in (20, 56)
    ),
    analysis="gradients",
    trains=False,
)

IDENTITY = Experiment(
    name="identity",
    title="A solution by construction: trained nets deepened by identity layers",
    source=f"{_HE2015}, section 1 (argued there, not measured)",
    shows="A net of 56 layers that is as good as one of 20 exists: the 20 layers, and "
    "identities. It is the training that does not find it.",
    protocol="A trained net of 20 layers deepened to 56 without further training; its "
    "test error before and after.",
    entries=(TableRow("plain-20", PLAIN[20]), TableRow("ResNet-20", RESNET[20])),
    analysis="deepened",
)

BLOCK_CONVS = Experiment(
    name="block_convs",
    title="Blocks of 1, 2 and 3 convolutions, at equal depth and parameters",
    source=f"{_HE2015}, section 3.2 (said there, not measured)",
    shows="A shortcut around one layer is y = W x + x and brings nothing; around two "
    "or more it does.",
    protocol="20 layers: 18 convolutions in 18, 9 and 6 blocks.",
    entries=(
        TableRow("plain-20", PLAIN[20]),
        TableRow("1 convolution", _cifar("cifar_resnet38", {"block_convs": "1"})),
        TableRow("2 convolutions", RESNET[20]),
        TableRow("3 convolutions", _cifar("cifar_resnet14", {"block_convs": "3"})),
    ),
)

SHORTCUTS = Experiment(
    name="shortcuts",
    title="Shortcut options A, B and C on CIFAR nets",
    source=f"{_HE2015}, Table 3 (for ImageNet; on CIFAR only A)",
    shows="Projections are not needed against degradation.",
    protocol=_ONE_VIEW,
    entries=tuple(
        TableRow(
            f"ResNet-{depth} {option}",
            RESNET[depth]
            if option == "A"
            else _cifar(f"cifar_resnet{depth}_{option.lower()}"),
        )
        for depth in (20, 56)
        for option in "ABC"
    ),
)

HIGHWAY = Experiment(
    name="highway",
    title="Highway gates against shortcuts that never close",
    source=f"{_HE2015}, Table 6; Srivastava et al. 2015",
    shows="Shortcuts without gates and parameters do as well or better.",
    protocol=f"{_ONE_VIEW} All nets with the recipe of {_HE2015}; the highway nets' "
    "published errors are of recipes of their own.",
    entries=(
        *(entry for entry in TABLE6.entries if entry.label.startswith("Highway")),
        TableRow("ResNet-20", RESNET[20], Published(8.75)),
        TableRow("ResNet-32", RESNET[32], Published(7.51)),
    ),
)

PREACTIVATION = Experiment(
    name="preactivation",
    title="Pre-activation: batch normalisation and ReLU before each convolution",
    source=_HE2016,
    shows="Clean identity paths help, the more the deeper the net.",
    protocol=f"{_ONE_VIEW} Published: median of 5 runs for 110 and 164. Their warm-up "
    "is 400 steps at 0.01; ours ends at 80 % training error, as in the paper before.",
    entries=(
        TableRow("ResNet-110", RESNET[110], Published(6.61)),
        TableRow(
            "ResNet-110, pre-activation",
            _five(_deep("cifar_preact_resnet110")),
            Published(6.37),
        ),
        TableRow("ResNet-164", _five(_deep("cifar_resnet164")), Published(5.93)),
        TableRow(
            "ResNet-164, pre-activation",
            _five(_deep("cifar_preact_resnet164")),
            Published(5.46),
        ),
        TableRow("ResNet-1001", _deep("cifar_resnet1001"), Published(7.61)),
        TableRow(
            "ResNet-1001, pre-activation",
            _deep("cifar_preact_resnet1001"),
            Published(4.92),
        ),
    ),
)

WIDE = Experiment(
    name="wide",
    title="Wide residual nets: width against depth",
    source=_WRN,
    shows="16 layers that are wide do better than a thousand thin ones.",
    protocol="200 epochs with the wide nets' own recipe.",
    entries=(
        TableRow("WRN-40-4", _wide("cifar_wide_resnet40_4"), Published(4.53)),
        TableRow("WRN-16-8", _wide("cifar_wide_resnet16_8"), Published(4.27)),
        TableRow("WRN-28-10", _wide("cifar_wide_resnet28_10"), Published(4.00)),
        TableRow(
            "WRN-28-10, dropout 0.3",
            _wide("cifar_wide_resnet28_10", {"dropout_rate": "0.3"}),
            Published(3.89),
        ),
    ),
)

WIDE_CONVS = Experiment(
    name="wide_convs",
    title="Convolutions in a block of WRN-40-2",
    source=f"{_WRN}, Table 3",
    shows="Of equal parameters, two 3x3 convolutions in a block are best.",
    protocol="200 epochs with the wide nets' own recipe. With l convolutions a block "
    "the net has 12 / l blocks a stage, so that depth and parameters are about equal.",
    entries=tuple(
        TableRow(
            f"l = {convs}",
            _wide(f"cifar_wide_resnet{depth}_2", {"block_convs": str(convs)}),
            Published(error),
        )
        for convs, depth, error in (
            (1, 76, 6.69),
            (2, 40, 5.43),
            (3, 28, 5.65),
            (4, 22, 5.93),
        )
    ),
)

_MNIST_DEPTHS = (10, 20, 50, 100)
MNIST_DEPTH = Experiment(
    name="mnist_depth",
    title="Depth on MNIST: plain and highway nets of dense layers",
    source="Srivastava et al. 2015, Figure 1",
    shows="Plain nets degrade with depth on MNIST-like data too; gated ones do not.",
    protocol="Published as curves of the training loss alone. One recipe for all nets "
    "here; theirs were found by a random search for each.",
    entries=tuple(
        TableRow(
            f"{kind}-{depth}",
            PaperRun(f"mnist_{kind}{depth}", f"mnist.py:mnist_{kind}{depth}"),
        )
        for kind in ("plain", "highway")
        for depth in _MNIST_DEPTHS
    ),
    figure="depth",
    panels=tuple(
        Panel(kind, tuple(f"{kind}-{depth}" for depth in _MNIST_DEPTHS))
        for kind in ("plain", "highway")
    ),
)

SHORTCUT_VARIANTS = Experiment(
    name="shortcut_variants",
    title="What is on the shortcut: scaling, gates, convolutions, dropout",
    source=f"{_HE2016}, Table 1",
    shows="Whatever stands on the shortcut makes it worse than the identity.",
    protocol=f"{_ONE_VIEW} ResNet-110.",
    entries=(
        TableRow("identity", RESNET[110], Published(6.61)),
        TableRow(
            "scaled by 0.5",
            _deep("cifar_resnet110", {"shortcut": "scaled"}),
            Published(note="above 20 %"),
        ),
        TableRow(
            "both scaled by 0.5",
            _deep("cifar_resnet110", {"shortcut": "scaled_both"}),
            Published(12.35),
        ),
        *(
            TableRow(
                f"exclusive gate, bias {bias}",
                _gated("exclusive_gate", bias),
            )
            for bias in ("0", "-6", "-7")
        ),
        TableRow(
            "gate on the shortcut alone, bias 0",
            _gated("shortcut_gate", "0"),
            Published(12.86),
        ),
        TableRow(
            "gate on the shortcut alone, bias -6",
            _gated("shortcut_gate", "-6"),
            Published(6.91),
        ),
        TableRow(
            "1x1 convolution",
            _deep("cifar_resnet110", {"shortcut": "C"}),
            Published(12.22),
        ),
        TableRow(
            "dropout 0.5",
            _deep("cifar_resnet110", {"shortcut": "dropout"}),
            Published(note="above 20 %"),
        ),
    ),
)

_DEGRADATION = ("plain", "ResNet")
DEGRADATION = Experiment(
    name="degradation",
    title="Degradation in small: plain and residual nets on handwritten digits",
    source="after Figures 1 and 6 of He et al. 2015, on other data",
    shows="After equal steps the deeper plain net has the higher training error; the "
    "deeper residual net has not.",
    protocol="One recipe for all four nets, without augmentation. The training error "
    "is the mean over the batches since the row before, as they were trained on.",
    entries=tuple(
        TableRow(
            f"{kind}-{depth}",
            PaperRun(
                f"degradation-cifar_{kind.lower()}{depth}",
                f"degradation.py:cifar_{kind.lower()}{depth}",
            ),
        )
        for kind in _DEGRADATION
        for depth in (20, 56)
    ),
    figure="curves",
    panels=tuple(
        Panel(title, tuple(f"{kind}-{depth}" for depth in (20, 56)))
        for kind, title in zip(
            _DEGRADATION, ("plain nets", "residual nets"), strict=True
        )
    ),
)

OVERLAPPING = Experiment(
    name="overlapping",
    title="Overlapping shortcuts, at equal parameters",
    source="not published; asked by readers of the paper",
    shows="Whether shortcuts that overlap, from every layer over two, do better than "
    "those of blocks.",
    protocol=_ONE_VIEW,
    entries=(
        TableRow("ResNet-20", RESNET[20], Published(8.75)),
        TableRow("overlapping, 20 layers", _cifar("cifar_overlapping_resnet20")),
        TableRow("ResNet-56", RESNET[56], Published(6.97)),
        TableRow("overlapping, 56 layers", _cifar("cifar_overlapping_resnet56")),
    ),
)

EXPERIMENTS = (
    FIGURE1,
    FIGURE6,
    TABLE6,
    FIGURE7,
    GRADIENTS,
    IDENTITY,
    BLOCK_CONVS,
    SHORTCUTS,
    HIGHWAY,
    PREACTIVATION,
    SHORTCUT_VARIANTS,
    WIDE,
    WIDE_CONVS,
    OVERLAPPING,
    MNIST_DEPTH,
    DEGRADATION,
)
