"""The `gi` command."""

import runpy
from pathlib import Path
from typing import Annotated

import typer

from gi_lib import bench, results

app = typer.Typer()


@app.command()
def run(
    study: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Option()] = Path("results"),
    workers: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str | None, typer.Option()] = None,
    root: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Run a study: what is missing of its cases."""
    cases = runpy.run_path(str(study))["CASES"]
    path = out / f"{study.stem}.jsonl"
    if workers == 1:
        rows = bench.run(cases, path, root=root, device=device)
    else:
        with bench.pool(workers) as executor:
            rows = bench.run(cases, path, executor=executor, root=root, device=device)
    print(sum(row["status"] == "ok" for row in rows), "of", len(rows), "ok;", path)


@app.command()
def table(path: Path) -> None:
    """Summarise records."""
    print(results.summarise(results.read(path)).to_string(index=False))


if __name__ == "__main__":
    app()
