"""Experiments on small images: section 4.2 of the paper, and follow-up papers.

Published errors are in percent, from the source of each experiment.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from resnet_jax.paper.entries import Experiment, Panel, PaperRun, row

_HE2015 = "He et al. 2015"
_HE2016 = "He et al. 2016"
_WRN = "Zagoruyko & Komodakis 2016"
_ONE_VIEW = "Test error on one view per image at the last checkpoint."


def _cifar(
    net: str,
    file: str = "cifar10.py",
    seeds: int = 1,
    **options: str,
) -> PaperRun:
    """A net trained with the recipe of a file, with options of the net changed."""
    name = "-".join([net, *(f"{key}={value}" for key, value in options.items())])
    overrides = {f"model.{key}": value for key, value in options.items()}
    if options.get("normalization") == "none":
        # The recipe sets groups of batch normalisation.
        overrides["model.batch_norm_groups"] = "1"
    return PaperRun(name, f"{file}:{net}", overrides, seeds)


_resnet110 = partial(_cifar, "cifar_resnet110")
_wide = partial(_cifar, file="cifar10_wide.py")


def _panel(title: str, kind: str, depths: Iterable[int]) -> Panel:
    return Panel(title, tuple(f"{kind}-{depth}" for depth in depths))


_DEPTHS = (20, 32, 44, 56)
_MNIST_DEPTHS = (10, 20, 50, 100)
_PLAIN = {depth: _cifar(f"cifar_plain{depth}") for depth in _DEPTHS}
_RESNET = {depth: _cifar(f"cifar_resnet{depth}") for depth in _DEPTHS}
_RESNET |= {
    110: _cifar("cifar_resnet110", seeds=5),
    1202: _cifar("cifar_resnet1202"),
}

_OWN_RECIPE = "with a recipe of its own"
_HIGHWAY19, _HIGHWAY32 = _cifar("cifar_highway19"), _cifar("cifar_highway32")
_HIGHWAY_ROWS = (
    row("Highway, 19 layers", _HIGHWAY19, 7.54, 7.72, 0.16, note=_OWN_RECIPE),
    row("Highway, 32 layers", _HIGHWAY32, 8.80, note=_OWN_RECIPE),
)
_PLAIN_ROWS = tuple(row(f"plain-{depth}", run) for depth, run in _PLAIN.items())
_RESNET20 = row("ResNet-20", _RESNET[20], 8.75)
_RESNET32 = row("ResNet-32", _RESNET[32], 7.51)
_RESNET56 = row("ResNet-56", _RESNET[56], 6.97)

_INITIAL: dict[str, dict[str, Any]] = {
    "BN, He": {},
    "no BN, He": {"normalization": "none"},
    "no BN, N(0, 0.01)": {"normalization": "none", "initialization": "normal_0.01"},
}
_FOUR_NETS = [(kind, depth) for kind in ("plain", "ResNet") for depth in (20, 56)]

EXPERIMENTS = (
    Experiment(
        name="figure1",
        title="Figure 1: training and test error of plain nets of 20 and 56 layers",
        source=_HE2015,
        shows="The deeper plain net has the higher training error, and so the higher "
        "test error: this is degradation, not overfitting.",
        protocol=_ONE_VIEW,
        entries=(row("plain-20", _PLAIN[20]), row("plain-56", _PLAIN[56])),
        figure="train_and_test",
        panels=(_panel("", "plain", (20, 56)),),
    ),
    Experiment(
        name="figure6",
        title="Figure 6: training of plain and residual nets, 20 to 1202 layers",
        source=_HE2015,
        shows="Plain nets get worse with depth; residual nets do not.",
        protocol=f"{_ONE_VIEW} The paper leaves out plain-110, whose error is above "
        "60 %.",
        entries=(
            *_PLAIN_ROWS,
            *(row(f"ResNet-{depth}", run) for depth, run in _RESNET.items()),
        ),
        figure="curves",
        panels=(
            _panel("plain nets", "plain", _DEPTHS),
            _panel("ResNets", "ResNet", (*_DEPTHS, 110)),
            _panel("110 and 1202 layers", "ResNet", (110, 1202)),
        ),
    ),
    Experiment(
        name="table6",
        title="Table 6: classification error by depth (published: CIFAR-10)",
        source=_HE2015,
        shows="Residual nets improve up to 110 layers. With 1202 layers they train "
        "without difficulty and overfit.",
        protocol=f"{_ONE_VIEW} ResNet-110: best (mean \u00b1 deviation) of 5 runs.",
        entries=(
            row("Maxout", None, 9.38),
            row("NIN", None, 8.81),
            row("DSN", None, 8.22),
            row("FitNet, 19 layers", None, 8.39),
            *_HIGHWAY_ROWS,
            _RESNET20,
            _RESNET32,
            row("ResNet-44", _RESNET[44], 7.17),
            _RESNET56,
            row("ResNet-110", _RESNET[110], 6.43, 6.61, 0.16),
            row("ResNet-1202", _RESNET[1202], 7.93),
            *_PLAIN_ROWS,
        ),
        figure="depth",
        panels=(_panel("plain", "plain", _PLAIN), _panel("ResNet", "ResNet", _RESNET)),
    ),
    Experiment(
        name="figure7",
        title="Figure 7: standard deviations of layer responses",
        source=_HE2015,
        shows="Residual functions have smaller responses than plain layers, and each "
        "layer of a deeper ResNet changes the signal less.",
        protocol="Outputs of the 3x3 layers on the test set, after batch normalisation "
        "and before ReLU and addition, at the last checkpoint.",
        entries=(
            row("plain-20", _PLAIN[20]),
            row("plain-56", _PLAIN[56]),
            *(row(f"ResNet-{depth}", _RESNET[depth]) for depth in (20, 56, 110)),
        ),
        figure="responses",
        panels=(
            Panel("", ("plain-20", "plain-56", "ResNet-20", "ResNet-56", "ResNet-110")),
        ),
        analysis="responses",
    ),
    Experiment(
        name="gradients",
        title="Gradient norms by layer, with and without BN and He initialisation",
        source=f"{_HE2015}, sections 1 and 4.1 (stated, not drawn)",
        shows="With batch normalisation, or at these depths with He initialisation "
        "alone, gradients of plain nets do not vanish: they do not explain "
        "degradation.",
        protocol="Gradient of the loss with respect to each kernel before the first "
        "step, on a batch of training images.",
        entries=tuple(
            row(f"{kind}-{depth}, {name}", _cifar(f"cifar_{kind.lower()}{depth}", **v))
            for kind, depth in _FOUR_NETS
            for name, v in _INITIAL.items()
        ),
        figure="gradients",
        panels=tuple(
            Panel(net, tuple(f"{net}, {name}" for name in _INITIAL))
            for net in (f"{kind}-{depth}" for kind, depth in _FOUR_NETS)
        ),
        analysis="gradients",
        trains=False,
    ),
    Experiment(
        name="identity",
        title="A solution by construction: trained nets deepened by identity layers",
        source=f"{_HE2015}, section 1 (argued, not measured)",
        shows="A net of 56 layers as good as one of 20 exists: the 20 layers and "
        "identity layers. Training does not find it.",
        protocol="A trained net of 20 layers, deepened to 56 without further training: "
        "test error before and after.",
        entries=(row("plain-20", _PLAIN[20]), row("ResNet-20", _RESNET[20])),
        analysis="deepened",
    ),
    Experiment(
        name="block_convs",
        title="Blocks of 1, 2 and 3 convolutions, at equal depth and parameters",
        source=f"{_HE2015}, section 3.2 (stated, not measured)",
        shows="A shortcut around one layer, y = W x + x, does not help; around two or "
        "more layers it does.",
        protocol="20 layers: 18 convolutions in 18, 9 and 6 blocks.",
        entries=(
            row("plain-20", _PLAIN[20]),
            row("1 convolution", _cifar("cifar_resnet38", block_convs="1")),
            row("2 convolutions", _RESNET[20]),
            row("3 convolutions", _cifar("cifar_resnet14", block_convs="3")),
        ),
    ),
    Experiment(
        name="shortcuts",
        title="Shortcut options A, B and C on CIFAR nets",
        source=f"{_HE2015}, Table 3 (for ImageNet; on CIFAR only A)",
        shows="Projections are not needed against degradation.",
        protocol=_ONE_VIEW,
        entries=tuple(
            row(f"ResNet-{depth} {option}", run)
            for depth in (20, 56)
            for option, run in (
                ("A", _RESNET[depth]),
                ("B", _cifar(f"cifar_resnet{depth}_b")),
                ("C", _cifar(f"cifar_resnet{depth}_c")),
            )
        ),
    ),
    Experiment(
        name="highway",
        title="Highway gates against shortcuts that never close",
        source=f"{_HE2015}, Table 6; Srivastava et al. 2015",
        shows="Shortcuts without gates and parameters do as well or better.",
        protocol=f"{_ONE_VIEW} All nets use the recipe of {_HE2015}; the published "
        "highway nets had recipes of their own.",
        entries=(*_HIGHWAY_ROWS, _RESNET20, _RESNET32),
    ),
    Experiment(
        name="preactivation",
        title="Pre-activation: batch normalisation and ReLU before each convolution",
        source=_HE2016,
        shows="Clean identity paths help, and help deeper nets more.",
        protocol=f"{_ONE_VIEW} Published: median of 5 runs for 110 and 164 layers. "
        "Their warm-up lasts 400 steps at 0.01; ours ends at 80 % training error, as "
        f"in {_HE2015}.",
        entries=(
            row("ResNet-110", _RESNET[110], 6.61),
            row(
                "ResNet-110, pre-activation",
                _cifar("cifar_preact_resnet110", seeds=5),
                6.37,
            ),
            row("ResNet-164", _cifar("cifar_resnet164", seeds=5), 5.93),
            row(
                "ResNet-164, pre-activation",
                _cifar("cifar_preact_resnet164", seeds=5),
                5.46,
            ),
            row("ResNet-1001", _cifar("cifar_resnet1001"), 7.61),
            row("ResNet-1001, pre-activation", _cifar("cifar_preact_resnet1001"), 4.92),
        ),
    ),
    Experiment(
        name="shortcut_variants",
        title="Other shortcuts: scaling, gates, convolutions, dropout",
        source=f"{_HE2016}, Table 1",
        shows="Anything but the identity on the shortcut makes the net worse.",
        protocol=f"{_ONE_VIEW} ResNet-110.",
        entries=(
            row("identity", _RESNET[110], 6.61),
            row("scaled by 0.5", _resnet110(shortcut="scaled"), note="above 20 %"),
            row("both scaled by 0.5", _resnet110(shortcut="scaled_both"), 12.35),
            *(
                row(
                    f"exclusive gate, bias {bias}",
                    _resnet110(shortcut="exclusive_gate", gate_bias=bias),
                    error,
                    note="" if error else "above 20 %",
                )
                for bias, error in (("0", None), ("-6", 8.70), ("-7", 9.81))
            ),
            *(
                row(
                    f"gate on the shortcut alone, bias {bias}",
                    _resnet110(shortcut="shortcut_gate", gate_bias=bias),
                    error,
                )
                for bias, error in (("0", 12.86), ("-6", 6.91))
            ),
            row("1x1 convolution", _resnet110(shortcut="C"), 12.22),
            row("dropout 0.5", _resnet110(shortcut="dropout"), note="above 20 %"),
        ),
    ),
    Experiment(
        name="wide",
        title="Wide residual nets: width against depth",
        source=_WRN,
        shows="16 wide layers do better than a thousand thin ones.",
        protocol="200 epochs with the wide nets' own recipe.",
        entries=(
            row("WRN-40-4", _wide("cifar_wide_resnet40_4"), 4.53),
            row("WRN-16-8", _wide("cifar_wide_resnet16_8"), 4.27),
            row("WRN-28-10", _wide("cifar_wide_resnet28_10"), 4.00),
            row(
                "WRN-28-10, dropout 0.3",
                _wide("cifar_wide_resnet28_10", dropout_rate="0.3"),
                3.89,
            ),
        ),
    ),
    Experiment(
        name="wide_convs",
        title="Convolutions in a block of WRN-40-2",
        source=f"{_WRN}, Table 3",
        shows="At equal parameters, two 3x3 convolutions per block are best.",
        protocol="200 epochs with the wide nets' own recipe. With l convolutions per "
        "block, a stage has 12 / l blocks, so depth and parameters are about equal.",
        entries=tuple(
            row(
                f"l = {convs}",
                _wide(f"cifar_wide_resnet{n}_2", block_convs=str(convs)),
                error,
            )
            for convs, n, error in (
                (1, 76, 6.69),
                (2, 40, 5.43),
                (3, 28, 5.65),
                (4, 22, 5.93),
            )
        ),
    ),
    Experiment(
        name="overlapping",
        title="Overlapping shortcuts, at equal parameters",
        source="not published; readers of the paper asked for it",
        shows="Whether shortcuts that start at every layer and skip two do better than "
        "those of blocks.",
        protocol=_ONE_VIEW,
        entries=(
            _RESNET20,
            row("overlapping, 20 layers", _cifar("cifar_overlapping_resnet20")),
            _RESNET56,
            row("overlapping, 56 layers", _cifar("cifar_overlapping_resnet56")),
        ),
    ),
    Experiment(
        name="mnist_depth",
        title="Depth on MNIST: plain and highway nets of dense layers",
        source="Srivastava et al. 2015, Figure 1",
        shows="On MNIST too, plain nets get worse with depth and highway nets do not.",
        protocol="Published only as curves of the training loss. All nets share one "
        "recipe here; the paper searched at random for one per net.",
        entries=tuple(
            row(f"{kind}-{depth}", PaperRun(net, f"mnist.py:{net}"))
            for kind in ("plain", "highway")
            for depth in _MNIST_DEPTHS
            for net in (f"mnist_{kind}{depth}",)
        ),
        figure="depth",
        panels=tuple(_panel(k, k, _MNIST_DEPTHS) for k in ("plain", "highway")),
    ),
    Experiment(
        name="degradation",
        title="Degradation in small: plain and residual nets on handwritten digits",
        source="after Figures 1 and 6 of He et al. 2015, on other data",
        shows="After equal steps the deeper plain net has the higher training error; "
        "the deeper residual net does not.",
        protocol="One recipe for all four nets, without augmentation. The training "
        "error is the mean over the batches since the previous row of metrics.",
        entries=tuple(
            row(
                f"{kind}-{depth}",
                PaperRun(f"degradation-{net}", f"degradation.py:{net}"),
            )
            for kind, depth in _FOUR_NETS
            for net in (f"cifar_{kind.lower()}{depth}",)
        ),
        figure="curves",
        panels=(
            _panel("plain nets", "plain", (20, 56)),
            _panel("residual nets", "ResNet", (20, 56)),
        ),
    ),
)
