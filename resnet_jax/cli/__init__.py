"""The command ``resnet-jax``: each subcommand is one call of a public function."""

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from typing import Any

import resnet_jax
from resnet_jax.cli.overrides import as_flags
from resnet_jax.cli.parser import Parser
from resnet_jax.errors import Preempted, UserError, printable

_DESCRIPTION = """Deep residual learning (He et al. 2015) in JAX.

  resnet-jax train --config digits --workdir runs/digits
  resnet-jax evaluate --workdir runs/digits
  resnet-jax predict --weights torchvision:resnet50 pictures/ --html pictures.html
  resnet-jax report --workdir runs/digits --figure digits.png
  resnet-jax show-data --config digits --out batch.png
  resnet-jax sweep --config digits --workdir runs/sweep \\
      --grid optimizer.learning_rate=0.05,0.1 --config.seeds=3
  resnet-jax paper list
  resnet-jax paper run figure6 --workdir runs/paper --dataset digits --scale small
  resnet-jax summary --compare resnet34 plain34
  resnet-jax plan --config imagenet:resnet50 --devices 256 --hosts 32
  resnet-jax prepare /data/imagenet prepared --splits train,val
  resnet-jax features --weights resnet50.safetensors /data/mine/train --out mine.npz
  resnet-jax convert resnet50.pth resnet50.safetensors --model resnet50
  resnet-jax export --weights resnet50.safetensors resnet50.jax
  resnet-jax detect train --config detection/bccd --workdir runs/bccd
  resnet-jax benchmark step --model cifar_resnet20 --batch 128
  resnet-jax doctor
"""

_COMMANDS = (
    *("train", "evaluate", "predict", "features", "report", "sweep", "paper"),
    *("show_data", "summary", "plan", "prepare", "convert", "export", "benchmark"),
    *("detect", "configs", "doctor"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Returns:
      The exit status: 0 if it finished, or saved on SIGTERM; 1 on an error; 130 if it
      saved on Ctrl-C. A command line that cannot be parsed exits with 2.
    """
    parser = command_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unknown argument {rest[0]}")
    options.rest = rest
    import absl.logging

    # Orbax logs the tracebacks of its threads beside the one sentence printed here.
    absl.logging.set_verbosity(absl.logging.FATAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _hide_late_writes
    try:
        options.run(options)
    except (UserError, OSError) as error:
        sentence = str(error)
        if getattr(options, "takes_overrides", False):
            sentence = as_flags(sentence)
        print(printable(f"resnet-jax: error: {sentence}"), file=sys.stderr)
        return 1
    except Preempted as stopped:
        return stopped.exit_status
    return 0


def command_parser() -> Parser:
    """The parser of ``resnet-jax``, with all commands. Needs no jax."""
    parser = Parser(prog="resnet-jax", description=_DESCRIPTION)
    versions = (
        f"resnet_jax {resnet_jax.__version__} (jax {importlib.metadata.version('jax')},"
        f" Python {platform.python_version()})"
    )
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name in _COMMANDS:
        importlib.import_module(f"resnet_jax.cli.{name}").add_parser(commands)
    return parser


def _hide_late_writes(unraisable: Any) -> None:
    """Python's own hook, except for one kind of traceback.

    If a save fails, Orbax closes its event loop while TensorStore still writes other
    arrays. Each of these writes then fails too, after the save's own error.
    """
    late = str(unraisable.exc_value) == "Event loop is closed"
    if unraisable.object is not None or not late:
        sys.__unraisablehook__(unraisable)
