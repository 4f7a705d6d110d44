"""Executes the chapters with papermill and builds the site with jupyter-book 1.x.

    python book/build.py site --profile quick      # ROOT/_build/html
    python book/build.py copies --profile smoke    # ROOT/_build/nbval: chapters with parameters, not executed

Sources stay as they are. ROOT/_build/executed holds one executed notebook a chapter and what it cost; ROOT/_build/stage
is the tree that jupyter-book reads. A chapter is executed again when its source, its parameters, gi_lib/, experiments/,
results/, benchmarks/ or an installed package has changed; the site is built again when anything staged has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import cells

REPO = cells.ROOT
BOOK = REPO / "book"
SHARED = tuple(REPO / name for name in ("gi_lib", "experiments", "results", "benchmarks"))  # what chapters read
PAGES = ("_config.yml", "_toc.yml", "CHANGELOG.md", "CONTRIBUTING.md")
TAIL = 25  # lines of a traceback or log that are shown
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ChapterError(RuntimeError):
    """A chapter could not be executed; the text names the notebook and the cell."""


def digest(*parts: str | bytes | Path) -> str:
    """20 hex digits of the sha256 of texts and files; a folder stands for all its files, names included."""
    h = hashlib.sha256()
    for part in parts:
        files = [part]
        if isinstance(part, Path) and part.is_dir():
            files = sorted(p for p in part.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        for item in files:
            if isinstance(item, Path):
                h.update(str(item.relative_to(part.parent)).encode() + b"\0")
                item = item.read_bytes() if item.exists() else b""
            elif isinstance(item, str):
                item = item.encode()
            h.update(str(len(item)).encode() + b"\0" + item)
    return h.hexdigest()[:20]


def versions() -> str:
    """Every installed package with its version: the lock that a chapter was executed under."""
    return "\n".join(sorted(f"{d.metadata['Name']}=={d.version}" for d in distributions()))


def common_key(parameters: dict) -> str:
    """What all chapters depend on."""
    environment = [os.environ.get(name, "") for name in ("GI_DATA", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES")]
    return digest(json.dumps([parameters, environment]), versions(), *SHARED)


# --- executing


def write(path: Path, text: str) -> None:
    """Write a file so that an interruption leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def first_line(cell: dict) -> str:
    lines = "".join(cell["source"]).strip().splitlines()
    return lines[0] if lines else "(empty)"


def failed_cell(source: Path, output: Path) -> str | None:
    """Name the cell that raised, its first line and the error, from what papermill left half executed."""
    if not output.exists():
        return None
    order = [cell.get("id") for cell in json.loads(source.read_text())["cells"]]
    for cell in json.loads(output.read_text())["cells"]:
        for out in cell.get("outputs", []):
            if out["output_type"] == "error":
                name = cell.get("id")
                number = f"cell {order.index(name) + 1}" if name in order else "the injected cell"
                trace = ANSI.sub("", "\n".join(out["traceback"])).splitlines()
                told = [
                    f"book/{source.name}: {number} (id {name!r}) failed: {first_line(cell)}",
                    f"    {out['ename']}: {out['evalue']}",
                ]
                return "\n".join(told + ["    | " + line for line in trace[-TAIL:]])
    return None


def execute(source: Path, folder: Path, stage: Path, parameters: dict, key: str) -> float:
    """Run one chapter by papermill in its own process; keep the executed copy and its cost."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (source.stem + ".part.ipynb")
    partial.unlink(missing_ok=True)
    command = [sys.executable, "-m", "papermill", str(source), str(partial), "--cwd", str(stage / "book")]
    command += ["--kernel", "python3", "--no-progress-bar", "--parameters_yaml", json.dumps(parameters)]
    started = time.monotonic()
    with (folder / (source.stem + ".log")).open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        # wait4 counts the process and the kernel that it waited for: the peak of the larger one.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        tail = "".join("    | " + line for line in log.readlines()[-TAIL:])
    seconds = time.monotonic() - started
    if process.returncode != 0:
        named = failed_cell(source, partial)
        raise ChapterError(named or f"book/{source.name}: papermill exited with {process.returncode}\n{tail}")
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    cost = {"key": key, "seconds": seconds, "peak_mib": peak, "date": time.strftime("%Y-%m-%d")}
    cost |= {"profile": parameters["profile"]}
    partial.replace(folder / source.name)
    write(folder / (source.stem + ".json"), json.dumps(cost, indent=1) + "\n")
    return seconds


def execute_stale(folder: Path, stage: Path, parameters: dict, jobs: int) -> None:
    """Execute the chapters whose copy is missing or stale. All are tried, then failures are told."""
    common = common_key(parameters)
    todo = {}
    for source in cells.chapters():
        key = digest(common, source)
        cost = folder / (source.stem + ".json")
        copied = (folder / source.name).exists() and cost.exists()
        if not (copied and json.loads(cost.read_text())["key"] == key):
            todo[source] = key
    if not todo:
        print("chapters: all up to date", flush=True)
        return
    names = ", ".join(source.stem for source in todo)
    print(f"chapters: executing {names} with profile {parameters['profile']}", flush=True)
    failures = []
    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        running = {pool.submit(execute, s, folder, stage, parameters, key): s for s, key in todo.items()}
        for done in as_completed(running):
            try:
                print(f"chapters: {running[done].stem} executed in {done.result():.0f} s", flush=True)
            except ChapterError as error:
                failures.append(str(error))
                print(f"chapters: {running[done].stem} failed", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise ChapterError("\n\n".join(failures))


# --- staging


def badges(cost: dict, name: str, address: str) -> str:
    """One line of MyST: when and how the chapter was executed, what it cost, and where to run it."""
    slug = address.split("github.com/")[1]
    colab = f"https://colab.research.google.com/github/{slug}/blob/main/book/{name}"
    minutes, seconds = divmod(round(cost["seconds"]), 60)
    spent = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return "\n".join(
        [
            "{.badges}",
            f"[run time {spent}]{{.badge-fact}} [peak memory {cost['peak_mib']:.0f} MiB]{{.badge-fact}}",
            f"[executed {cost['date']}]{{.badge-fact}} [profile {cost['profile']}]{{.badge-fact}}",
            f"[Open in Colab]({colab}){{.badge-colab}}",
        ]
    )


def fold_parameters(page: list[dict]) -> None:
    """Show parameters once, as they were used: papermill's cell, folded below a line that has its values.

    The cell of defaults above it goes from the page, since its values may be others.
    """
    used = [cell for cell in page if "injected-parameters" in cell["metadata"].get("tags", [])]
    if not used:
        return
    page[:] = [cell for cell in page if "parameters" not in cell["metadata"].get("tags", [])]
    [cell] = used
    values = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("#")]
    cell["metadata"]["tags"].append("hide-input")
    cell["metadata"]["mystnb"] = {"code_prompt_show": f"Parameters: {', '.join(values)}"}


def staged_notebook(folder: Path, name: str, address: str) -> str:
    """The executed copy with its badges under the title and without what names this machine."""
    notebook = json.loads((folder / name).read_text())
    cost = json.loads((folder / name).with_suffix(".json").read_text())
    first = notebook["cells"][0]
    lines = "".join(first["source"]).splitlines()
    if first["cell_type"] != "markdown" or not lines or not lines[0].startswith("# "):
        raise ChapterError(f"book/{name}: the first cell must be markdown and begin with the title, '# ...'")
    first["source"] = "\n".join([lines[0], "", badges(cost, name, address), "", *lines[1:]])
    notebook["metadata"].pop("papermill", None)
    fold_parameters(notebook["cells"])
    for cell in notebook["cells"]:
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def link(target: Path, path: Path) -> None:
    """A symbolic link at path, where the target exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    if target.exists():
        path.symlink_to(target, target_is_directory=True)


def lay_stage(stage: Path) -> None:
    """Everything but the chapters: pages, style, and links to what stands beside book/ in the repository.

    `extra` is copied to the top of the site, so that ../results/NAME.jsonl works on every page.
    """
    shutil.rmtree(stage, ignore_errors=True)
    left_out = shutil.ignore_patterns("*.ipynb", "build.py", "cells.py", "readme.py", "__pycache__", ".*")
    shutil.copytree(BOOK, stage / "book", ignore=left_out)
    for name in PAGES:
        if (REPO / name).exists():
            shutil.copy(REPO / name, stage / name)
    for path in SHARED:
        link(path, stage / path.name)
    (stage / "extra").mkdir()
    link(REPO / "results", stage / "extra" / "results")


def build_site(root: Path, parameters: dict, jobs: int) -> Path:
    """Execute what is stale, stage everything, and build unless this very tree was built before."""
    build = root.resolve() / "_build"
    stage, folder, html, built = build / "stage", build / "executed", build / "html", build / "built"
    lay_stage(stage)
    execute_stale(folder, stage, parameters, jobs)
    address = cells.address()
    for source in cells.chapters():
        write(stage / "book" / source.name, staged_notebook(folder, source.name, address))
    key = digest(versions(), stage, *SHARED)
    if html.joinpath("index.html").exists() and built.exists() and built.read_text() == key:
        print(f"site: up to date in {html}", flush=True)
        return html
    built.unlink(missing_ok=True)
    shutil.rmtree(html, ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(stage), "--path-output", str(root.resolve())]
    # --all, because a page that is not read again would not repeat its warnings.
    status = subprocess.run([*command, "-W", "-n", "--keep-going", "--all", "-q"]).returncode
    if status != 0:
        raise ChapterError(f"jupyter-book exited with {status}: the warnings above are errors here")
    write(built, key)
    print(f"site: {html}/index.html", flush=True)
    return html


def copies(root: Path, parameters: dict) -> Path:
    """Chapters with the parameters injected and no outputs, beside a link to results/, for nbval."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    folder = root.resolve() / "_build" / "nbval"
    lay_stage(folder)
    for source in cells.chapters():
        notebook = parameterize_notebook(load_notebook_node(str(source)), parameters)
        notebook.metadata.pop("papermill", None)
        write(folder / "book" / source.name, json.dumps(notebook, indent=1))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("site", "copies"))
    parser.add_argument("--profile", choices=("smoke", "quick", "survey"), default="quick")
    parser.add_argument("--device", default="", help="torch device; empty: a GPU where there is one")
    parser.add_argument("--data-root", default="", help="empty: $GI_DATA, else the user's cache folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="chapters executed at a time")
    parser.add_argument("--root", type=Path, default=REPO, help="where _build goes")
    a = parser.parse_args()
    parameters = {"profile": a.profile, "device": a.device or None}
    parameters |= {"data_root": a.data_root or None, "seed": a.seed}
    try:
        if find_spec("gi_lib") is None:
            raise ChapterError(f"gi_lib is not installed in {sys.executable}; `make book` installs and builds")
        if a.what == "copies":
            copies(a.root, parameters)
        else:
            build_site(a.root, parameters, a.jobs)
    except ChapterError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: finished chapters are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
