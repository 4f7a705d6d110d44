"""The `gi` command. What a subcommand needs is imported when it runs, so that `--help` waits for nothing."""

import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import gi_lib

if TYPE_CHECKING:
    from gi_lib.bench import Case, Cell, Estimate
    from gi_lib.federated import ThreatModel
    from gi_lib.results import Record

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

MANUAL = """Gradient inversion: reconstruct private images from what federated learning shares.

\b
A first attack, on an embedded dataset, in seconds:
    gi attack dlg --model lenet --dataset digits --indices 0
A photograph, four starts at once, the label known to the attacker:
    gi attack inverting_gradients --model convnet --dataset photos --labels --restarts 4 --steps 200
A malicious server, and a client that adds noise; settings follow a colon:
    gi attack robbing_the_fed:bins=64 --model convnet --dataset photos --indices 0-7
    gi attack bias_ratio --model mlp --defense gaussian_noise:std=0.01
Your own network, or a library's:
    gi attack inverting_gradients --model torchvision:resnet18 --dataset photos --steps 50
What there is, and what each attack needs:
    gi list
A study: a Python file with a list CASES, which is executed. What it would take; then to run
it. Stop it at any time; the same command goes on:
    gi run experiments/dlg.py --plan
    gi run experiments/dlg.py --workers 2
    gi run experiments --workers 2
Its summary, one line a group:
    gi table results/dlg.jsonl --by model,threat
Whether its records are what its cases, its data and its pictures give:
    gi check experiments/dlg.py
"""

EPILOG = """\b
Data. The datasets digits and photos are part of the package. Others are read from the data
root: --root, else the environment variable GI_DATA, else the user's cache. What is not
there is downloaded by torchvision, where it can be.

\b
Exit codes. 0: done. 1: an attack failed, a value is still missing, or a check found a
problem. 2: bad input, a missing file, a full disk, a study that another process runs.
130: interrupted by Ctrl-C; what was written stays.
"""


class Gi(TyperGroup):
    """Turns what a user can mend into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
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


def _warn(message: Warning | str, *rest: Any, **more: Any) -> None:
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
    name: Annotated[str, typer.Argument(help="An attack of `gi list attacks`, with settings: dlg:lr=0.5,history=10.")],
    model: Annotated[
        str,
        typer.Option(help="A model of `gi list models`, torchvision:NAME, timm:NAME, or package.module:factory."),
    ] = "lenet",
    dataset: Annotated[str, typer.Option(help="A dataset of `gi list datasets`.")] = "digits",
    indices: Annotated[str, typer.Option(help="The images of the batch, such as 0,1 or 0-3.")] = "0",
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Tell the attacker the labels.")] = False,
    steps: Annotated[int | None, typer.Option(show_default="the paper's")] = None,
    restarts: Annotated[int | None, typer.Option(help="Starts, run as one batch.", show_default="the paper's")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the attack and the clients.")] = 0,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Public weights of `gi list models`, trained for those of its recipe, or name@hash of a checkpoint.",
            show_default="untrained",
        ),
    ] = None,
    train: Annotated[bool, typer.Option("--train/--eval", help="The mode of the client's model.")] = False,
    local_steps: Annotated[
        int | None, typer.Option(help="FedAvg with this many local steps, known to the attacker.")
    ] = None,
    local_lr: Annotated[float, typer.Option(help="The learning rate of those steps.")] = 0.01,
    clients: Annotated[int, typer.Option(help="Clients that share the batch; the attacker sees their mean.")] = 1,
    defense: Annotated[str | None, typer.Option(help="A defense of `gi list defenses`, with settings.")] = None,
    out: Annotated[Path, typer.Option(help="The picture: truth above, reconstruction below.")] = Path("attack.png"),
    root: Root = None,
    device: Device = None,
) -> None:
    """Run one attack on one batch, print its scores, write the picture.

    The attacker is granted what the attack can't do without; the threat model is printed.

    \b
    gi attack dlg --model lenet --dataset digits --indices 0
    gi attack inverting_gradients --dataset photos --indices 0,1 --labels --out photos.png
    """
    from gi_lib import Client, bench, provenance, results
    from gi_lib.attacks import ATTACKS
    from gi_lib.defenses import DEFENSES

    given = {k: v for k, v in {"steps": steps, "restarts": restarts}.items() if v is not None}
    chosen = from_spec(name, ATTACKS, "attack", given)
    threat = _granted(chosen, labels=labels, details=local_steps is not None)
    case = bench.Case(
        chosen,
        model,
        dataset,
        parse_indices(indices),
        seed=seed,
        weights=weights,
        size=size,
        threat=threat,
        client=Client() if local_steps is None else Client(steps=local_steps, lr=local_lr),
        defense=None if defense is None else from_spec(defense, DEFENSES, "defense"),
        train=train,
        clients=clients,
        auxiliary=dataset if threat.has_auxiliary_data else None,
    )
    try:
        record, picture = bench.attempt(case, root, provenance.choose_device(device))
    except bench.AttackError as error:
        raise error.__cause__ or error from None
    assert picture is not None
    truth, images = picture
    results.write_picture(out, truth, images, zoom=max(1, 128 // truth.shape[-1]))
    print(f"{record['attack_text']}; {bench.text(case.threat, brief=True)}, letter {record['threat_letter']}")
    print(f"on {model}, {weights or 'untrained'}; {dataset} {list(case.indices)}; {record['client']}")
    labels_found = record["label_accuracy"]
    names = {"psnr": ".2f", "floor": ".2f", "ssim": ".3f", "lpips": ".3f", "mse": ".2e"}
    mean = {name: _mean(record[name], digits) for name, digits in names.items()}  # type: ignore[literal-required]
    print(
        f"PSNR {mean['psnr']} dB, the image's mean colour {mean['floor']}; SSIM {mean['ssim']}, LPIPS {mean['lpips']},"
        f" MSE {mean['mse']}, labels {'unknown' if labels_found is None else format(labels_found, '.0%')}"
    )
    print(
        f"recovered {record['recall']:.0%}, identified {_mean(record['identified'], '.0%')} (chance"
        f" {record['chance']:.1%}); returned {record['returned']} of {record['batch_size']} images"
    )
    loss = "unknown" if record["loss"] is None else f"{record['loss']:.2e}"
    print(
        f"{record['seconds']:.1f} s on {record['device']}: {record['steps']} steps,"
        f" as long as {record['training_steps']:,.0f} training steps; matching loss {loss}"
    )
    print(f"picture: {out}")


def _granted(attack: Any, *, labels: bool, details: bool) -> "ThreatModel":
    """The least threat model under which the attack runs."""
    from gi_lib import ThreatModel
    from gi_lib.types import Needs

    facts = getattr(attack, "needs", Needs()).facts
    return ThreatModel(
        knows_labels=labels or "labels" in facts,
        knows_training_details=details,
        knows_order="order" in facts,
        knows_bn_stats="bn_stats" in facts,
        knows_buffers="buffers" in facts,
        knows_defense="defense" in facts,
        has_auxiliary_data="auxiliary" in facts or hasattr(attack, "plant"),
        malicious_server="trapdoor" in facts,
    )


MOST_INDICES = 4096


def parse_indices(text: str) -> tuple[int, ...]:
    """ "0,2-4" -> (0, 2, 3, 4)."""
    ranges = []
    for part in text.split(","):
        numbers = re.fullmatch(r"\s*(\d{1,12})(?:-(\d{1,12}))?\s*", part)
        if numbers is None:
            raise ValueError(f"--indices {text!r:.60} is not a list of whole numbers such as 0,1 or 0-3")
        ranges.append(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
    if sum(map(len, ranges)) > MOST_INDICES:
        raise ValueError(f"--indices {text!r:.60} is more than {MOST_INDICES} images; a batch of so many is no one's")
    return tuple(i for part in ranges for i in part)


def from_spec(spec: str, registry: Mapping[str, type], kind: str, more: Mapping[str, Any] | None = None) -> Any:
    """ "name:field=value,field=value" -> the dataclass of that name with these settings.

    Raises:
        ValueError: the name or a field is unknown, or a value is not of its type.
    """
    import dataclasses

    from gi_lib.types import nearest

    name, _, settings = spec.partition(":")
    if name not in registry:
        raise ValueError(nearest(name, registry, kind))
    fields = {f.name: f for f in dataclasses.fields(registry[name])}
    given = dict(more or {})
    for setting in filter(None, settings.split(",")):
        field, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{spec!r}: settings are written field=value, separated by commas")
        given[field.strip()] = _value(value.strip())
    for field in given:
        if field not in fields:
            raise ValueError(f"{nearest(field, fields, f'setting of {name}')}")
    return registry[name](**given)


def _value(text: str) -> int | float | bool | None | str:
    plain = {"True": True, "False": False, "None": None}
    if text in plain:
        return plain[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _mean(values: Sequence[float | None] | None, digits: str) -> str:
    numbers = [value for value in values or () if value is not None]
    return format(sum(numbers) / len(numbers), digits) if numbers else "missing"


@app.command()
def run(
    studies: Annotated[
        list[Path],
        typer.Argument(help="Python files with a list CASES each, which are executed, or a folder of them."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME.jsonl and the pictures.")] = Path("results"),
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with one thread.")] = 1,
    limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which a case is ended and counts as failed.", show_default="the study's LIMIT"
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Of all cases the one that a record names by its key or its case; may be repeated."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what is left to run and how long it takes, and end.")
    ] = False,
    dask: Annotated[
        str | None,
        typer.Option(
            help="Run on Dask: a scheduler's address, a scheduler file, or `local`.", show_default="processes"
        ),
    ] = None,
    root: Root = None,
    device: Device = None,
) -> None:
    """Run what is missing of studies; failed cases are tried again.

    The files are executed as Python: run only studies that you trust. Each case runs in a worker process: one
    that runs out of memory, aborts or takes too long fails alone. Ctrl-C stops it: what is done is kept, and the same
    command goes on. Several studies are one queue: stage by stage, and within a stage the cheapest case first.

    \b
    gi run experiments/dlg.py --plan
    gi run experiments/dlg.py --workers 4 --limit 3600 --out /tmp/results
    gi run experiments --workers 2
    gi run experiments/dlg.py --only 5b504d39a684 --out again
    """
    from gi_lib import bench, provenance, results

    files = _study_files(studies)
    loaded = _load(files, only)
    if not any(cases for cases, _ in loaded.values()):
        raise ValueError(
            f"{', '.join(map(str, files))} needs a list CASES of gi_lib.bench.Case with at least one entry; a study"
            " whose cases wait for the records of another is run together with that one: gi run experiments"
        )
    paths = {file: out / f"{file.stem}.jsonl" for file in files}
    several = len(files) > 1
    where = out if several else paths[files[0]]
    if plan:
        cases = [case for file in files for case in bench.missing(loaded[file][0], paths[file])]
        total = sum(len({bench.key(case) for case in cases}) for cases, _ in loaded.values())
        known = bench.by_records(_records(out)) if several else None
        _print_plan(bench.plan(cases, root, provenance.choose_device(device), known), total, workers, by_stage=several)
        return
    limits = [own for _, own in loaded.values() if own is not None]
    own_limit = max(limits) if len(limits) == len(loaded) else None
    try:
        if dask is not None:
            if limit is not None:
                raise ValueError("--limit is for this machine's processes; Dask has limits of its own")
            if own_limit is not None:
                _complain(
                    f"the study's LIMIT of {own_limit} seconds does not hold on Dask, which has limits of its own"
                )
            engine: Any = bench.cluster(dask, workers)
        else:
            engine = bench.pool(workers, own_limit if limit is None else limit)
        tried: set[str] = set()
        with engine as executor:
            while left := [
                (case, file)
                for file, (cases, _) in loaded.items()
                for case in bench.missing(cases, paths[file])
                if bench.key(case) not in tried
            ]:
                if several:
                    left = _next(left, bench.by_records(_records(out)), PORTION * workers)
                tried |= {bench.key(case) for case, _ in left}
                now = {paths[file]: [case for case, owner in left if owner == file] for _, file in left}
                bench.queue(now, executor=executor, root=root, device=device, each=_unchanged(files))
                # Records may have brought a study new cases, as those of a tuning do.
                loaded = _load(files, only)
    except KeyboardInterrupt:
        there = (path for path in paths.values() if path.exists())
        kept = sum(row["status"] == "ok" for path in there for row in results.rows(path))
        _complain(f"interrupted; {kept} finished cases are kept in {where}, the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    rows = {file: results.by_key(paths[file]) for file in files}
    wanted = dict.fromkeys((file, bench.key(case)) for file, (cases, _) in loaded.items() for case in cases)
    _report([rows[file][name] for file, name in wanted], where)


def _records(out: Path) -> "Iterator[Record]":
    from gi_lib import results

    for path in sorted(out.glob("*.jsonl")):
        yield from results.rows(path)


PORTION = 8
"""How many cases of several studies a worker is given before their files are looked into again."""


def _next(left: "list[tuple[Case, Path]]", estimate: "Estimate", most: int) -> "list[tuple[Case, Path]]":
    """Of the earliest stage the cheapest cases; what no record tells comes first, and tells the rest."""
    stage = min(case.stage for case, _ in left)
    return sorted((pair for pair in left if pair[0].stage == stage), key=lambda pair: estimate(pair[0]) or 0.0)[:most]


def _load(files: Sequence[Path], only: Sequence[str] | None) -> "dict[Path, tuple[list[Case], float | None]]":
    """CASES and LIMIT of each study; of the cases those that `only` names, by a record's key or case."""
    loaded = {file: load_study(file) for file in files}
    if not only:
        return loaded
    from gi_lib.bench.cases import identity, key

    names = {id(case): {key(case), identity(case)} for cases, _ in loaded.values() for case in cases}
    known = set().union(*names.values())
    if unknown := [name for name in only if name not in known]:
        raise ValueError(
            f"no case of {', '.join(map(str, files))} is {unknown[0]!r:.60}; take the key or the case of a record of"
            " that study. A case that the study had once is in the commit that its record names"
        )
    return {
        file: ([case for case in cases if names[id(case)] & set(only)], limit)
        for file, (cases, limit) in loaded.items()
    }


def _unchanged(files: Sequence[Path]) -> Callable[[], None]:
    """ValueError, once a study's file is another than now."""
    given = {file: file.read_bytes() for file in files}

    def check() -> None:
        for file, content in given.items():
            if not file.is_file() or file.read_bytes() != content:
                raise ValueError(
                    f"{file} has changed while its cases run; what is done is kept. Start the same command again: it"
                    " goes on with the cases of the new file"
                )

    return check


def _study_files(given: Sequence[Path]) -> list[Path]:
    """The files themselves, and of a folder those that name CASES."""
    files = []
    for path in given:
        if path.is_dir():
            found = [
                file for file in sorted(path.glob("*.py")) if re.search(r"^CASES\b", file.read_text(encoding="utf-8"), re.MULTILINE)
            ]
            if not found:
                raise FileNotFoundError(f"no Python file in {path} has a list CASES; name a study, or another folder")
            files += found
        else:
            files.append(path)
    return files


def _report(records: "Sequence[Record]", where: Path) -> None:
    counts = {status: sum(row["status"] == status for row in records) for status in ("ok", "not applicable", "failed")}
    said = ", ".join(f"{n} {status}" for status, n in counts.items() if n or status == "ok")
    print(f"{said}, of {len(records)} cases; records: {where}")
    for row in records:
        if row["status"] == "failed":
            _complain(f"failed: {row['attack']} on {row['model']}, {row['dataset']} {row['indices']}: {row['error']}")
    if counts["failed"]:
        raise typer.Exit(FAILED)


def _print_plan(cells: "Sequence[Cell]", total: int, workers: int, *, by_stage: bool) -> None:
    """Cell by cell; of several studies stage by stage."""
    if by_stage:
        for stage in sorted({cell.stage for cell in cells}):
            part = [cell for cell in cells if cell.stage == stage]
            print(f"stage {stage}: {sum(cell.cases for cell in part)} cases, {_hours(part):.2f} hours")
    for cell in cells:
        if cell.reason is not None:
            print(f"{cell.cases:5d} do not run  {cell.name}: {' '.join(cell.reason.split())}")
        elif not by_stage:
            print(f"{cell.cases:5d} x {cell.seconds:8.1f} s  {cell.name}")
    left = sum(cell.cases for cell in cells)
    runs, hours = sum(cell.cases for cell in cells if cell.reason is None), _hours(cells)
    print(
        f"{total - left} of {total} cases are done; {runs} run, {left - runs} do not;"
        f" about {hours:.2g} hours of one process, {hours / workers:.2g} with {workers}"
    )


def _hours(cells: "Sequence[Cell]") -> float:
    return sum(cell.cases * cell.seconds for cell in cells if cell.seconds is not None) / 3600


def load_study(path: Path) -> "tuple[list[Case], float | None]":
    """CASES of a Python file, and its LIMIT in seconds, if it has one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be run, or has no CASES.
    """
    import runpy

    from gi_lib.bench import Case

    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("experiments").glob("*.py")))
        raise FileNotFoundError(f"there is no study at {path}{known and '; known: ' + known}")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)  # where the study's own modules lie
    try:
        found = runpy.run_path(str(path))
        cases = list(found.get("CASES") or ())
    except Exception as error:
        raise ValueError(f"{path} could not be run: {type(error).__name__}: {error}") from error
    if "CASES" not in found or not all(isinstance(case, Case) for case in cases):
        raise ValueError(f"{path} needs a list CASES of gi_lib.bench.Case with at least one entry")
    limit = found.get("LIMIT")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
        raise ValueError(f"{path}: LIMIT is a number of seconds > 0, or None, got {limit!r:.60}")
    return cases, limit


@app.command()
def check(
    study: Annotated[Path, typer.Argument(help="A Python file with a list CASES; it is executed.")],
    out: Annotated[Path, typer.Option(help="Folder of NAME.jsonl and the pictures.")] = Path("results"),
    sample: Annotated[int, typer.Option(min=0, help="How many cases are run again, spread over the cells.")] = 3,
    seed: Annotated[int, typer.Option(help="Draws another sample.")] = 0,
    cheapest: Annotated[
        bool, typer.Option("--cheapest", help="Of each cell the cheapest case, the cheapest cells first.")
    ] = False,
    tolerance: Annotated[float, typer.Option(min=0, help="dB between a record and its rerun elsewhere.")] = 0.5,
    root: Root = None,
    device: Device = None,
) -> None:
    """Check the records of a study against its cases, data and pictures, and run a sample again.

    Each case needs a record of the present revision. Hash, floor, chance, PSNR and identification are told again from
    the data and the saved picture, for every record. A rerun must give the same digits with the same versions on the
    same device; elsewhere float32 is rounded otherwise, and its PSNR may differ by the tolerance. The file is
    executed as Python: check only studies that you trust. Exits with 1 where there is a problem.

    \b
    gi check experiments/dlg.py
    gi check experiments/dlg.py --sample 10 --seed 7 --tolerance 1
    """
    from gi_lib import bench

    cases, _ = load_study(study)
    report = bench.check(
        cases,
        out / f"{study.stem}.jsonl",
        sample=sample,
        seed=seed,
        cheapest=cheapest,
        tolerance=tolerance,
        root=root,
        device=device,
    )
    for problem in report.problems:
        _complain(problem)
    print(
        f"{report.present} of {report.cases} cases have a record of this revision; {report.compared} compared with"
        f" data and picture; {report.reruns} run again, {report.identical} with the same digits;"
        f" {len(report.problems)} problem{'s' if len(report.problems) != 1 else ''}"
    )
    if report.problems:
        raise typer.Exit(FAILED)


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
    import pandas as pd

    from gi_lib import results

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


Entries = Iterator[tuple[str, list[str]]]


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


def main() -> None:
    """What the installed `gi` runs."""
    sys.path.append("")  # a user's own models and attacks lie where the command is given
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no letter for a name shows a question mark
    app()


if __name__ == "__main__":
    main()
