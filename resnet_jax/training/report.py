"""report.html: one page that says what a run did, with its pictures inside."""

import html
import io
import os
from collections.abc import Collection
from typing import Any

import rich.console

from resnet_jax.analysis.plots import training_curves
from resnet_jax.config import fields, flatten
from resnet_jax.errors import UserError
from resnet_jax.evaluation.evaluator import describe_error
from resnet_jax.training.progress import describe_seconds, say
from resnet_jax.workdir import Workdir

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
.error {{ font-size: 1.35rem; font-weight: 600; }}
table {{ border-collapse: collapse; }}
td, th {{ text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; }}
th {{ font-weight: 400; color: #666; }}
td {{ overflow-wrap: anywhere; }}
.set {{ font-weight: 600; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>{title}</h1>
<p class="error">{error}</p>
<p>{how}</p>
{curves}
<h2>The run</h2>
{facts}
<h2>Config</h2>
<p>Bold: set otherwise than the default.</p>
{config}
<h2>Where it ran</h2>
{environment}
</html>
"""


def report(
    workdir: str | os.PathLike[str],
    *,
    figure: str | os.PathLike[str] | None = None,
    console: rich.console.Console | None = None,
) -> None:
    """Writes the report of a finished run again, and its curves as a picture.

    Args:
      workdir: of ``train``.
      figure: a .png, .svg or .pdf file for the training curves.
      console: where to print; standard output by default.

    Raises:
      UserError: there is no finished run, or the picture cannot be written.
    """
    console = console or rich.console.Console()
    folder = Workdir(workdir)
    result = folder.read_result()
    if result is None:
        raise UserError(
            f"workdir {folder.path} holds no finished run (no result.json); train one "
            "with resnet-jax train"
        )
    rows = folder.read_rows()
    write_report(folder, result, rows)
    say(console, f"report: {folder.report}")
    if figure is not None:
        try:
            training_curves(rows, _title(result)).savefig(figure, dpi=100)
        except (OSError, ValueError) as error:
            raise UserError(f"figure {figure} cannot be written: {error}") from error
        say(console, f"figure: {figure}")


def write_report(
    folder: Workdir, result: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes report.html: self-contained, its curves drawn as SVG.

    Args:
      folder: the workdir, for its config.
      result: the content of result.json.
      rows: of metrics.jsonl.
    """
    title = _title(result)
    config = folder.read_config()
    values = flatten(config) if config else {}
    defaults = {name: field.default for name, field in fields().items()}
    page = _PAGE.format(
        title=html.escape(title),
        error=html.escape(
            describe_error("test", result["test_errors"], result["test_count"])
        ),
        how=(
            f"The last checkpoint (step {result['step']:,}) on every test example, one "
            f"run of seed {result['seed']}. The test set chose no checkpoint."
        ),
        curves=_svg(training_curves(rows, title)),
        facts=_table(_facts(result)),
        config=_table(values, bold={n for n in values if values[n] != defaults[n]}),
        environment=_table(result["environment"]),
    )
    folder.write(folder.report, page)


def _title(result: dict[str, Any]) -> str:
    return f"{result['model']} on {result['data']}"


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    facts = {
        "length": f"{result['step']:,} steps of {result['global_batch_size']}, "
        f"{result['epoch']:.4g} epochs",
        "parameters": f"{result['parameters']:,}",
        "multiply-adds an image": f"{result['multiply_adds']:,}",
        "training examples": f"{result['training_examples']:,}",
        "training error": f"{100 * result['train_error']:.2f} %",
        "time": describe_seconds(result["seconds"]),
        "finished": result["finished"],
        "command": result["command"],
    }
    if "holdout_error" in result:
        facts["held-out error"] = describe_error(
            "held-out", result["holdout_errors"], result["holdout_count"]
        )
    if result.get("train_skipped"):
        facts["skipped"] = f"{result['train_skipped']:,} broken images replaced"
    if "test_top5_error" in result:
        facts["test top-5 error"] = f"{100 * result['test_top5_error']:.2f} %"
    if result["images_per_second"] is not None:
        facts["speed"] = f"{result['images_per_second']:,.0f} images/s (median)"
    return facts


def _table(values: dict[str, Any], bold: Collection[str] = ()) -> str:
    rows = []
    for name, value in values.items():
        mark = ' class="set"' if name in bold else ""
        cells = f"<th>{html.escape(name)}</th><td{mark}>{html.escape(str(value))}</td>"
        rows.append(f"<tr>{cells}</tr>")
    return "\n".join(["<table>", *rows, "</table>"])


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
