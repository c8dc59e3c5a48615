"""mkdocs hooks: the reference pages, made from the code, and links out of docs/.

A page of docs/reference/ holds ``<!-- generated: NAME -->``, a text for readers of the
plain Markdown, and ``<!-- end -->``. A build replaces all of it by what ``GENERATED``
makes. Links to files outside docs/ become links to the repository.
"""

import argparse
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import resnet_jax
from resnet_jax.cli import command_parser
from resnet_jax.config import (
    Config,
    DetectionConfig,
    Field,
    describe_range,
    describe_type,
    fields,
    flatten,
    list_configs,
    load_config,
)
from resnet_jax.models.catalog import CATALOG, FAMILIES
from resnet_jax.paper.experiments import EXPERIMENTS

REPOSITORY = Path(__file__).parent.parent
_MARKER = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end -->", re.DOTALL)
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for each page, before it becomes HTML."""
    del files
    markdown = _MARKER.sub(lambda match: GENERATED[match[1]](), markdown)
    folder = Path(page.file.abs_src_path).parent

    def to_repository(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(REPOSITORY / "docs") or not target.exists():
            return match[0]  # mkdocs warns if it is missing
        kind = "tree" if target.is_dir() else "blob"
        return (
            f"{match[1]}{config.repo_url}/{kind}/main/{target.relative_to(REPOSITORY)}"
        )

    return _LINK.sub(to_repository, markdown)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in cells) + "\n"


def config_fields() -> str:
    """Every field of a run, by section."""
    return _tables(_sections(Config))


def detection_fields() -> str:
    """The fields of a detector's run, without the sections that every run has."""
    shared = _sections(Config)
    own = _sections(DetectionConfig)
    return _tables({name: own[name] for name in own if own[name] != shared.get(name)})


def _sections(schema: type) -> dict[str, list[Field]]:
    sections: dict[str, list[Field]] = {}
    for field in fields(schema).values():
        sections.setdefault(field.name.rpartition(".")[0] or "run", []).append(field)
    return sections


def _tables(sections: dict[str, list[Field]]) -> str:
    parts = []
    for section, members in sections.items():
        rows = [
            (f"`{f.name}`", f"`{f.default}`", f"{_values(f)}", f.meaning)
            for f in members
        ]
        parts.append(f"## {section}\n\n")
        parts.append(table(("field", "default", "values", "meaning"), rows) + "\n")
    return "".join(parts)


def _values(field: Field) -> str:
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    kind = describe_type(field.annotation)
    is_number = abs(field.at_most) != float("inf")
    return f"{kind}, {describe_range(field)}" if is_number else kind


def commands() -> str:
    """The help of each command."""
    parts = []
    for name, parser in _parsers(command_parser(), "resnet-jax"):
        parser.epilog = None  # all config fields, which have their own page
        text = parser.format_help().strip()
        parts.append(f"## {name}\n\n```text\n{text}\n```\n\n")
    return "".join(parts)


def _parsers(
    parser: argparse.ArgumentParser, name: str
) -> Iterable[tuple[str, argparse.ArgumentParser]]:
    """The parsers of commands without commands of their own, by full name."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield name.removeprefix("resnet-jax "), parser
    for action in inner:
        for command, its_parser in action.choices.items():
            yield from _parsers(its_parser, f"{name} {command}")


def config_files() -> str:
    """The files of configs/, with what each trains."""
    rows = [
        (f"[`{name}`](../../configs/{name}.py)", first_line)
        for name, first_line in list_configs().items()
    ]
    return table(("`--config`", "what it is"), rows)


def recipes() -> str:
    """What the recipes for ImageNet set: fields that differ from their defaults."""
    names = [name for name in list_configs() if name.startswith("recipes/")]
    names.sort(key="recipes/he2015".__ne__)  # the paper's first
    values = [flatten(load_config(name)) for name in names]
    rows = []
    for field in fields().values():
        found = [recipe[field.name] for recipe in values]
        is_shared = field.name in ("model.name", "data.name", "data.test_split")
        if not is_shared and set(found) != {field.default}:
            cells = ["" if v == field.default else _plain(v) for v in found]
            rows.append((f"`{field.name}`", *cells))
    return table(("", *(name.removeprefix("recipes/") for name in names)), rows)


def _plain(value: Any) -> str:
    """A value as in a table: 0.08, 1."""
    if isinstance(value, tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def nets() -> str:
    """The catalog by size of image, the families, and published errors."""
    parts = []
    for side, kind in ((224, "ImageNet"), (32, "CIFAR"), (28, "MNIST")):
        rows = [
            (
                f"`{name}`",
                entry.source,
                f"{entry.parameters:,}",
                f"{entry.multiply_adds:,}",
            )
            for name, entry in CATALOG.items()
            if entry.image_size == side
        ]
        channels = 1 if side == 28 else 3
        parts.append(f"## {kind}: {side} x {side} x {channels}\n\n")
        parts.append(table(("net", "source", "parameters", "multiply-adds"), rows))
        parts.append("\n")
    families = [(f"`{name}`", meaning) for name, meaning in FAMILIES.items()]
    parts.append("## Nets of any depth\n\n" + table(("name", "net"), families) + "\n")
    header = ("net", "error, %", "where", "protocol")
    parts.append("## Published errors\n\n" + table(header, _published()))
    return "".join(parts)


def _published() -> list[tuple[str, ...]]:
    """Errors published for nets as they are in the catalog."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for experiment in EXPERIMENTS.values():
        protocol = re.sub(r"^Published: ", "", experiment.protocol).partition(". ")[0]
        where = f"{experiment.source}, {experiment.title.partition(':')[0]}"
        for entry in experiment.entries:
            published, run = entry.published, entry.run
            if run is None or run.overrides or published is None or not str(published):
                continue
            net = run.config.partition(":")[2].partition(",")[0]
            line = (f"`{net}`", str(published), where, protocol.rstrip("."))
            found.setdefault((net, str(published)), line)
    return sorted(
        found.values(), key=lambda line: list(CATALOG).index(line[0].strip("`"))
    )


def experiments() -> str:
    """The paper's experiments, by name."""
    rows = [(f"`{e.name}`", e.title, e.source) for e in EXPERIMENTS.values()]
    return table(("experiment", "what", "from"), rows)


MODULES = {
    "python": ("resnet_jax",),
    "python_models": ("resnet_jax.models",),
    "python_more": (
        "resnet_jax.config",
        "resnet_jax.plan",
        "resnet_jax.export",
        "resnet_jax.evaluation.features",
        "resnet_jax.evaluation.linear_probe",
        "resnet_jax.evaluation.protocols",
        "resnet_jax.analysis.complexity",
        "resnet_jax.analysis.summary",
        "resnet_jax.analysis.responses",
        "resnet_jax.analysis.gradients",
        "resnet_jax.analysis.activation_maps",
        "resnet_jax.analysis.plots",
        "resnet_jax.models.masking",
        "resnet_jax.data.sources",
        "resnet_jax.workdir",
    ),
    "python_detection": (
        "resnet_jax.detection",
        "resnet_jax.detection.localization",
        "resnet_jax.detection.boxes",
        "resnet_jax.detection.anchors",
        "resnet_jax.detection.nms",
        "resnet_jax.detection.roi",
        "resnet_jax.detection.matching",
        "resnet_jax.detection.sampling",
        "resnet_jax.detection.voc_ap",
        "resnet_jax.detection.coco_figures",
    ),
}
"""The modules of each page of the Python reference."""


def python(page: str) -> str:
    """Directives of mkdocstrings for the public names of some modules."""
    parts = []
    several = len(MODULES[page]) > 1
    for module in MODULES[page]:
        parts += [f"## {module}\n\n"] * several
        for value in _public(module):
            # Where it is defined: a module may have the name of its function.
            parts.append(f"::: {value.__module__}.{value.__qualname__}\n")
            parts += ["    options: {heading_level: 3}\n"] * several
            if value is resnet_jax.create_model:
                parts.append(
                    "\nThe options are the [fields of model](fields.md#model).\n"
                )
            parts.append("\n")
    return "".join(parts)


def _public(module: str) -> list[Any]:
    """The functions and classes of ``__all__``, or those that a module defines."""
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is not None:
        return [v for v in (getattr(loaded, n) for n in names) if callable(v)]
    return [
        value
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module
    ]


GENERATED: dict[str, Callable[[], str]] = {
    "fields": config_fields,
    "detection_fields": detection_fields,
    "commands": commands,
    "configs": config_files,
    "nets": nets,
    "recipes": recipes,
    "experiments": experiments,
    **{page: functools.partial(python, page) for page in MODULES},
}
"""What takes the place of the markers, by name."""
