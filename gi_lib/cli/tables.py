"""`gi table`, `gi score` and `gi list`: a summary of records, LPIPS where they have none, and what there is."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gi_lib.cli.app import FAILED, Root, app

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = {
    "identified": ".0%",
    "chance": ".1%",
    "above": "+.1f",
    "psnr": ".1f",
    "ssim": ".3f",
    "lpips": ".3f",
    "label_accuracy": ".0%",
    "recall": ".0%",
    "seconds": ".3g",
    "steps": ",.0f",
    "training_steps": ",.0f",
    "gradient_evaluations": ",.0f",
    "images": ",.0f",
}
"""Columns of a summary as `gi table` prints them."""


class Form(StrEnum):
    text = "text"
    csv = "csv"
    json = "json"
    md = "md"


@app.command()
def table(
    path: Annotated[Path, typer.Argument(help="A file of records, or a folder of them.")] = Path("results"),
    by: Annotated[
        str | None,
        typer.Option(
            help="Columns of the records that make a group; unless named: attack, model, weights, dataset, threat,"
            " and what else differs within such a group."
        ),
    ] = None,
    form: Annotated[
        Form, typer.Option("--format", help="text fits the terminal; the others have every column.")
    ] = Form.text,
) -> None:
    """Summarise records, one line a group.

    Shows ok of n cases; means over images of PSNR, with its 95 % interval, of decibels above the floor, SSIM and
    LPIPS; the share identified and of labels found; medians of seconds, steps, and the cost in training steps. The
    text leaves out what a terminal has no room for, and says so.

    \b
    gi table results/dlg.jsonl
    gi table results --by attack,threat_letter,defense
    """
    from gi_lib import results

    columns = None if by is None else [name.strip() for name in by.split(",")]
    frame = results.read(path)
    columns = results.usual_groups(frame) if columns is None else columns
    summary = results.summarise(frame, columns)
    if form == Form.text:
        for line in _fitting(summary, columns, shutil.get_terminal_size((120, 0)).columns):
            print(line)
    elif form == Form.csv:
        print(summary.to_csv(index=False), end="")
    elif form == Form.json:
        print(summary.to_json(orient="records", indent=1, force_ascii=False))
    else:
        for line in _markdown(summary):
            print(line)


def _fitting(summary: "pd.DataFrame", by: Sequence[str], width: int) -> Iterator[str]:
    """Lines of at most `width`: first what all groups share, then a table of what there is room for."""
    shared = [name for name in by[1:] if summary[name].nunique(dropna=False) == 1]
    if shared:
        said = "all: " + ", ".join(f"{name} {_cell(summary[name].iloc[0])}" for name in shared)
        yield from textwrap.wrap(said, width, subsequent_indent="     ")
    names = [name for name in by if name not in shared]
    columns = {name: [_cell(value) for value in summary[name]] for name in names}
    most = {name: max(map(len, [name, *values])) for name, values in columns.items()}
    while sum(most.values()) > max(8 * len(names), width - 34) - 2 * len(names):  # the numbers need the rest
        most[max(most, key=lambda name: most[name])] -= 1
    columns = {name: [_cut(value, most[name]) for value in values] for name, values in columns.items()}
    columns["ok"] = [f"{row.ok}/{row.n}" for row in summary.itertuples()]
    for name, digits in NUMBERS.items():
        columns[name] = [_cell(value, digits) for value in summary[name]]
        if name in ("psnr", "above"):
            bounds = zip(summary[f"{name}_low"], summary[f"{name}_high"], strict=True)
            columns[f"{name} 95 %"] = [f"{_cell(low, digits)} to {_cell(high, digits)}" for low, high in bounds]
    widths = {name: max(map(len, [name, *values])) for name, values in columns.items()}
    shown, room = [*names, "ok"], width - sum(widths[name] + 2 for name in [*names, "ok"])
    for name in ("identified", "above", "psnr", *(name for name in columns if name not in shown)):
        if name not in shown and room >= widths[name] + 2:
            shown.append(name)
            room -= widths[name] + 2
    shown = [name for name in columns if name in shown]
    for row in (shown, *zip(*(columns[name] for name in shown), strict=True)):
        cells = (
            value.ljust(widths[name]) if name in names else value.rjust(widths[name])
            for name, value in zip(shown, row, strict=True)
        )
        yield "  ".join(cells).rstrip()
    if left := [name for name in columns if name not in shown]:
        said = f"no room for {', '.join(left)}; a wider terminal, fewer columns by --by, or --format csv shows them"
        yield from textwrap.wrap(said, width)


def _cell(value: object, digits: str = "") -> str:
    missing = value is None or value != value
    return "-" if missing else format(value, digits) if digits else str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _markdown(summary: "pd.DataFrame") -> Iterator[str]:
    yield "| " + " | ".join(summary.columns) + " |"
    yield "| " + " | ".join("---" for _ in summary.columns) + " |"
    for row in summary.itertuples(index=False):
        cells = (_cell(value, ".4g" if isinstance(value, float) else "") for value in row)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@app.command()
def score(
    path: Annotated[Path, typer.Argument(help="A file of records, or a folder of them.")] = Path("results"),
    root: Root = None,
) -> None:
    """Fill in missing LPIPS from the saved pictures.

    A run that can't have LPIPS leaves it empty. This needs the package lpips, and AlexNet's weights in the
    data root or by download.
    """
    from gi_lib import bench

    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    left = 0
    for file in files:
        filled, missing = bench.score(file, root)
        left += missing
        print(f"{file}: {filled} filled in, {missing} still missing")
    if left:
        raise typer.Exit(FAILED)


class Kind(StrEnum):
    attacks = "attacks"
    models = "models"
    datasets = "datasets"
    defenses = "defenses"


Entries = Iterator[tuple[str, list[str]]]


@app.command("list")
def list_(kind: Annotated[Kind | None, typer.Argument(show_default="all four")] = None) -> None:
    """List attacks, models, datasets and defenses, with what each needs."""
    width = max(60, shutil.get_terminal_size((100, 0)).columns)
    for wanted in [kind] if kind else list(Kind):
        if not kind:
            print(f"{wanted.value}:")
        for name, about in LISTS[wanted]():
            indent = f"  {name:<22}"
            for line in about:
                print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=" " * 24))
                indent = " " * 24


def _first_line(thing: object) -> str:
    import inspect

    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _attacks() -> Entries:
    from gi_lib.attacks import ATTACKS

    for name, cls in ATTACKS.items():
        yield name, [_first_line(sys.modules[cls.__module__]), f"needs {cls.needs}"]


def _models() -> Entries:
    from gi_lib import models

    for name, entry in models.MODELS.items():
        about = [entry.about.partition("\n")[0], _first_line(entry.initialise)]
        for weights, w in models.WEIGHTS.items():
            if w.model == name:
                about.append(f"--weights {weights}: {w.source}; needs weights/{w.file} in the data root")
        yield name, about
    yield "torchvision:NAME", ["a classifier of torchvision, untrained, with its normalisation"]
    yield "timm:NAME", ["a classifier of timm, which must be installed"]
    yield "module:factory", ["your own: factory(num_classes, image_shape) -> torch.nn.Module"]


def _datasets() -> Entries:
    from gi_lib import data

    for name, spec in data.DATASETS.items():
        yield name, [spec.about, f"from {spec.source}; licence: {spec.licence}"]


def _defenses() -> Entries:
    from gi_lib.defenses import DEFENSES

    for name, cls in DEFENSES.items():
        yield name, [_first_line(cls)]


LISTS = {Kind.attacks: _attacks, Kind.models: _models, Kind.datasets: _datasets, Kind.defenses: _defenses}
