"""`gi run` and `gi check`: the cases of a study, and whether its records are what these give."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gi_lib.cli.app import FAILED, INTERRUPTED, Device, Root, app, complain

if TYPE_CHECKING:
    from gi_lib.bench import Case, Cell, Estimate
    from gi_lib.results import Record

PORTION = 8
"""How many cases of several studies a worker is given before their files are looked into again."""


@app.command()
def run(
    studies: Annotated[
        list[Path],
        typer.Argument(help="Python files with a list CASES each, which are executed, or a folder of them."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for NAME.jsonl and the pictures.",
            show_default="results; own_results, where results are the survey's and the study is not",
        ),
    ] = None,
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
    out = out or _results_of(files)
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
                complain(f"the study's LIMIT of {own_limit} seconds does not hold on Dask, which has limits of its own")
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
        complain(f"interrupted; {kept} finished cases are kept in {where}, the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    rows = {file: results.by_key(paths[file]) for file in files}
    wanted = dict.fromkeys((file, bench.key(case)) for file, (cases, _) in loaded.items() for case in cases)
    _report([rows[file][name] for file, name in wanted], where)


def _records(out: Path) -> "Iterator[Record]":
    from gi_lib import results

    for path in sorted(out.glob("*.jsonl")):
        yield from results.rows(path)


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


def _results_of(files: Sequence[Path]) -> Path:
    """Where records of these studies go: those of a checkout's experiments into its results, others never there."""

    def checkout(folder: Path) -> bool:
        return (folder / "gi_lib" / "__init__.py").is_file() and (folder / "experiments").is_dir()

    here, homes = Path.cwd(), {file.resolve().parent for file in files}
    if all(home.name == "experiments" and checkout(home.parent) for home in homes) and len(homes) == 1:
        [home] = homes
        return Path("results") if home.parent == here else home.parent / "results"
    return Path("own_results" if checkout(here) else "results")


def _study_files(given: Sequence[Path]) -> list[Path]:
    """The files themselves, and of a folder those that name CASES."""
    files = []
    for path in given:
        if path.is_dir():
            found = [file for file in sorted(path.glob("*.py")) if _names_cases(file)]
            if not found:
                raise FileNotFoundError(f"no Python file in {path} has a list CASES; name a study, or another folder")
            files += found
        else:
            files.append(path)
    return files


def _names_cases(file: Path) -> bool:
    return bool(re.search(r"^CASES\b", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))


def _report(records: "Sequence[Record]", where: Path) -> None:
    counts = {status: sum(row["status"] == status for row in records) for status in ("ok", "not applicable", "failed")}
    said = ", ".join(f"{n} {status}" for status, n in counts.items() if n or status == "ok")
    print(f"{said}, of {len(records)} cases; records: {where}")
    for row in records:
        if row["status"] == "failed":
            complain(f"failed: {row['attack']} on {row['model']}, {row['dataset']} {row['indices']}: {row['error']}")
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
    out: Annotated[
        Path | None, typer.Option(help="Folder of NAME.jsonl and the pictures.", show_default="as `gi run`")
    ] = None,
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
        (out or _results_of([study])) / f"{study.stem}.jsonl",
        sample=sample,
        seed=seed,
        cheapest=cheapest,
        tolerance=tolerance,
        root=root,
        device=device,
    )
    for problem in report.problems:
        complain(problem)
    print(
        f"{report.present} of {report.cases} cases have a record of this revision; {report.compared} compared with"
        f" data and picture; {report.reruns} run again, {report.identical} with the same digits;"
        f" {len(report.problems)} problem{'s' if len(report.problems) != 1 else ''}"
    )
    if report.problems:
        raise typer.Exit(FAILED)
