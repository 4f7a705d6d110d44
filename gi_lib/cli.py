"""The `gi` command."""

import inspect
import re
import runpy
import shutil
import sys
import textwrap
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from typer.core import TyperGroup

import gi_lib
from gi_lib import FedAvg, ThreatModel, bench, data, models, provenance, results
from gi_lib.attacks import ATTACKS
from gi_lib.federated import fedsgd
from gi_lib.types import nearest

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

MANUAL = """Gradient inversion: reconstruct private images from what federated learning shares.

\b
A first attack, on an embedded dataset, in seconds:
    gi attack dlg --model lenet --dataset digits --indices 0
A photograph, four starts at once, the label known to the attacker:
    gi attack inverting_gradients --model convnet --dataset photos --labels --restarts 4 --steps 200
What there is, and what each attack needs:
    gi list
A study: a file with a list CASES. Stop it at any time; the same command goes on:
    gi run experiments/dlg.py --workers 2
Its summary, one line a group:
    gi table results/dlg.jsonl --by model,threat
"""

EPILOG = """\b
Data. The datasets digits and photos are part of the package. Others are read from the data
root: --root, else the environment variable GI_DATA, else the user's cache. What is not
there is downloaded by torchvision, where it can be.

\b
Exit codes. 0: done. 1: an attack failed, or a value is still missing. 2: bad input, a
missing file, a full disk. 130: interrupted by Ctrl-C; what was written stays.
"""


class Gi(TyperGroup):
    """Turns what a user can mend into one line on standard error and an exit code."""

    def invoke(self, ctx):
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort):  # RuntimeErrors both
                raise
            except KeyboardInterrupt:
                _complain("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except FloatingPointError as error:
                _complain(f"the attack failed: {error}")
                raise typer.Exit(FAILED) from None
            except OSError as error:
                about = f"{error.strerror}: {error.filename}" if error.filename else error
                _complain(str(about))
                raise typer.Exit(BAD_INPUT) from None
            except (ValueError, RuntimeError, ImportError) as error:
                _complain(str(error))
                raise typer.Exit(BAD_INPUT) from None


def _complain(message: str) -> None:
    print("gi: " + " ".join(message.split()), file=sys.stderr)


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print("gi: warning: " + " ".join(str(message).split()), file=sys.stderr)


app = typer.Typer(
    cls=Gi,
    help=MANUAL,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Root = Annotated[Path | None, typer.Option(help="The data root.", show_default="$GI_DATA, or the cache")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="a GPU where there is one")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gi {gi_lib.__version__}")
        raise typer.Exit


@app.callback()
def _gi(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help="An attack of `gi list attacks`.")],
    model: Annotated[str, typer.Option(help="A model of `gi list models`.")] = "lenet",
    dataset: Annotated[str, typer.Option(help="A dataset of `gi list datasets`.")] = "digits",
    indices: Annotated[str, typer.Option(help="The images of the batch, such as 0,1 or 0-3.")] = "0",
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Tell the attacker the labels.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, show_default="the paper's")] = None,
    restarts: Annotated[int | None, typer.Option(min=1, help="Starts, run as one batch.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the attack.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Public weights of `gi list models`.", show_default="untrained")
    ] = None,
    local_steps: Annotated[
        int | None, typer.Option(min=1, help="FedAvg with this many local steps, known to the attacker.")
    ] = None,
    local_lr: Annotated[float, typer.Option(help="The learning rate of those steps.")] = 0.01,
    out: Annotated[Path, typer.Option(help="The picture: truth above, reconstruction below.")] = Path("attack.png"),
    root: Root = None,
    device: Device = None,
) -> None:
    """Run one attack on one batch, print its scores, write the picture.

    \b
    gi attack dlg --model lenet --dataset digits --indices 0
    gi attack inverting_gradients --dataset photos --indices 0,1 --labels --out photos.png
    """
    if name not in ATTACKS:
        raise ValueError(nearest(name, ATTACKS, "attack"))
    given = {k: v for k, v in {"steps": steps, "restarts": restarts}.items() if v is not None}
    for option in given.keys() - inspect.signature(ATTACKS[name]).parameters.keys():
        raise ValueError(f"{name} has no {option}; leave --{option} out")
    case = bench.Case(
        ATTACKS[name](**given),
        model,
        dataset,
        parse_indices(indices),
        seed=seed,
        weights=weights,
        size=size,
        threat=ThreatModel(knows_labels=labels, knows_training_details=local_steps is not None),
        update=fedsgd if local_steps is None else FedAvg(local_steps, local_lr),
    )
    [(record, (truth, images))] = bench.attempt([case], root, provenance.choose_device(device))
    results.write_picture(out, truth, images, zoom=max(1, 128 // truth.shape[-1]))
    lpips = "missing" if record["lpips"] is None else f"{_mean(record['lpips']):.3f}"
    print(f"{record['attack_text']}\non {model}, {weights or 'untrained'}; {dataset} {list(case.indices)}")
    print(
        f"PSNR {_mean(record['psnr']):.2f} dB, SSIM {_mean(record['ssim']):.3f}, LPIPS {lpips},"
        f" MSE {_mean(record['mse']):.2e}, labels {record['label_accuracy']:.0%}"
    )
    print(
        f"{record['seconds']:.1f} s on {record['device']}: {record['steps']} steps,"
        f" as long as {record['training_steps']:,.0f} training steps; matching loss {record['loss']:.2e}"
    )
    print(f"picture: {out}")


def parse_indices(text: str) -> tuple[int, ...]:
    """ "0,2-4" -> (0, 2, 3, 4)."""
    found: list[int] = []
    for part in text.split(","):
        numbers = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if numbers is None:
            raise ValueError(f"--indices {text!r} is not a list of whole numbers such as 0,1 or 0-3")
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        found += range(first, last + 1)
    return tuple(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="A Python file with a list CASES.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.jsonl and the pictures.")] = Path("results"),
    workers: Annotated[int, typer.Option(min=1, help="Processes; each has one thread if there are more.")] = 1,
    together: Annotated[int, typer.Option(min=1, help="Cases of one network to stack, where the attack can.")] = 1,
    root: Root = None,
    device: Device = None,
) -> None:
    """Run what is missing of a study; failed cases are tried again.

    Ctrl-C stops it: what is done is kept, and the same command goes on.

    \b
    gi run experiments/dlg.py
    gi run experiments/dlg.py --workers 4 --out /tmp/results
    """
    cases = load_study(study)
    path = out / f"{study.stem}.jsonl"
    try:
        if workers == 1:
            records = bench.run(cases, path, together=together, root=root, device=device)
        else:
            with bench.pool(workers) as executor:
                records = bench.run(cases, path, executor=executor, together=together, root=root, device=device)
    except KeyboardInterrupt:
        kept = sum(row["status"] == "ok" for row in results.rows(path)) if path.exists() else 0
        _complain(f"interrupted; {kept} finished cases are kept in {path}, the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    failed = [row for row in records if row["status"] == "failed"]
    print(f"{len(records) - len(failed)} of {len(records)} cases ok; records: {path}")
    for row in failed:
        _complain(f"failed: {row['attack']} on {row['model']}, {row['dataset']} {row['indices']}: {row['error']}")
    if failed:
        raise typer.Exit(FAILED)


def load_study(path: Path) -> list[bench.Case]:
    """The list CASES of a Python file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be run, or has no cases.
    """
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("experiments").glob("*.py")))
        raise FileNotFoundError(f"there is no study at {path}{known and '; known: ' + known}")
    try:
        cases = runpy.run_path(str(path)).get("CASES")
    except Exception as error:
        raise ValueError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    if not cases or not all(isinstance(case, bench.Case) for case in cases):
        raise ValueError(f"{path} needs a list CASES of gi_lib.bench.Case with at least one entry")
    return list(cases)


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
) -> None:
    """Summarise records, one line a group.

    Shows ok of n cases; means over images of PSNR, with its 95 % interval, SSIM and LPIPS; the share of
    labels found; medians of seconds, steps, and the cost in training steps.

    \b
    gi table results/dlg.jsonl
    gi table results --by attack,threat_letter,defense
    """
    columns = None if by is None else [name.strip() for name in by.split(",")]
    summary = results.summarise(results.read(path), columns)
    with pd.option_context("display.width", None, "display.max_columns", None):
        print(summary.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.4g}"))


@app.command()
def score(
    path: Annotated[Path, typer.Argument(help="A file of records, or a folder of them.")] = Path("results"),
    root: Root = None,
) -> None:
    """Fill in missing LPIPS from the saved pictures.

    A run that can't have LPIPS leaves it empty. This needs the package lpips, and AlexNet's weights in the
    data root or by download.
    """
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


@app.command("list")
def list_(kind: Annotated[Kind | None, typer.Argument(show_default="all three")] = None) -> None:
    """List attacks, models and datasets, with what each needs."""
    width = max(60, shutil.get_terminal_size((100, 0)).columns)
    for wanted in [kind] if kind else list(Kind):
        if not kind:
            print(f"{wanted.value}:")
        for name, about in LISTS[wanted]():
            indent = f"  {name:<22}"
            for line in about:
                print(textwrap.fill(line, width, initial_indent=indent, subsequent_indent=" " * 24))
                indent = " " * 24


def _attacks():
    for name, cls in ATTACKS.items():
        paper = inspect.getdoc(sys.modules[cls.__module__])
        needs = re.search(r"^Needs: (.+?)(?=^Departs|^$|\Z)", paper, re.DOTALL | re.MULTILINE)
        yield name, [paper.partition("\n")[0], "needs " + " ".join(needs[1].split()).rstrip(".")]


def _models():
    for name, entry in models.MODELS.items():
        about = [entry.about.partition("\n")[0], inspect.getdoc(entry.initialise)]
        for weights, w in models.WEIGHTS.items():
            if w.model == name:
                about.append(f"--weights {weights}: {w.source}; needs weights/{w.file} in the data root")
        yield name, about


def _datasets():
    for name, spec in data.DATASETS.items():
        yield name, [spec.about, f"from {spec.source}; licence: {spec.licence}"]


LISTS = {Kind.attacks: _attacks, Kind.models: _models, Kind.datasets: _datasets}


if __name__ == "__main__":
    app()
