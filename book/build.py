"""Executes the chapters with papermill and builds the site with jupyter-book 1.x.

    python book/build.py site --profile quick      # ROOT/_build/html
    python book/build.py copies --profile smoke    # ROOT/_build/nbval: chapters with parameters, not executed

Sources stay as they are. ROOT/_build/executed holds one executed notebook a chapter, what it cost and what
it read; ROOT/_build/stage is the tree that jupyter-book reads. A chapter is executed again when its source, its
parameters, an installed package, a file of the project that it read or imported, or the list of the records' names has
changed; the site is built again when anything staged has.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import cells
import psutil

REPO = cells.ROOT
BOOK = REPO / "book"
SHARED = tuple(REPO / name for name in ("gi_lib", "experiments", "results", "benchmarks"))  # what chapters read
SOURCES = {
    ".md",
    ".bib",
    ".json",
    ".yml",
    ".yaml",
    ".csv",
    ".png",
    ".svg",
}  # what pages are made of, beside the chapters
FOLDERS = {"_static", "_ext", "_templates"}
PAGES = ("_config.yml", "_toc.yml", "CHANGELOG.md", "CONTRIBUTING.md")
TAIL = 25  # lines of a traceback or log that are shown
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ChapterError(RuntimeError):
    """A chapter could not be executed; the text names the notebook and the cell."""


class StoppedError(BaseException):
    """The build was told to end, by the signal that is its argument."""


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
    """What all chapters depend on. A study that has no records yet is read by asking whether its file is there."""
    environment = [os.environ.get(name, "") for name in ("GI_DATA", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES")]
    records = sorted(str(path.relative_to(REPO)) for path in (REPO / "results").rglob("*.jsonl"))
    return digest(json.dumps([parameters, environment, records]), versions())


def read_key(files: list[str]) -> str:
    """Of the files and folders, named from the repository on, that a chapter read; of a folder its names count."""
    h = hashlib.sha256()
    for name in files:
        path = REPO / name
        held = b"missing"
        if path.is_dir():
            held = "\n".join(sorted(p.name for p in path.iterdir() if p.suffix not in (".lock", ".pyc"))).encode(
                "utf-8", "surrogateescape"
            )
        elif path.is_file():
            held = path.read_bytes()
        h.update(f"{name}\0{len(held)}\0".encode("utf-8", "surrogateescape") + held)
    return h.hexdigest()[:20]


# --- executing


def write(path: Path, text: str) -> None:
    """Write a file so that an interruption leaves the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def first_line(cell: dict) -> str:
    lines = "".join(cell["source"]).strip().splitlines()
    return lines[0] if lines else "(empty)"


def failed_cell(source: Path, output: Path) -> str | None:
    """Name the cell that raised, its first line and the error, from what papermill left half executed."""
    if not output.exists():
        return None
    order = [cell.get("id") for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]]
    for cell in json.loads(output.read_text(encoding="utf-8"))["cells"]:
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


def lay_kernel(folder: Path) -> dict[str, str]:
    """The environment of papermill: its kernel `python3` is this interpreter, whatever the user's own is.

    Text is UTF-8 there under any locale.
    """
    spec = {"argv": [sys.executable, str(BOOK / "kernel.py"), "-f", "{connection_file}"]}
    spec |= {"display_name": "Python 3", "language": "python"}
    write(folder / "kernels" / "python3" / "kernel.json", json.dumps(spec))
    before = os.environ.get("JUPYTER_PATH")
    path = os.pathsep.join([str(folder), before] if before else [str(folder)])
    return os.environ | {"JUPYTER_PATH": path, "PYTHONUTF8": "1"}


def files_read(log: Path, source: Path, stage: Path) -> list[str]:
    """What a kernel noted in `log`, as names from the repository on, without the chapter itself and what is built."""
    read = set()
    for line in log.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        path = Path(line).resolve()
        folder = path.is_dir()
        if path.is_relative_to(stage):
            path = REPO / path.relative_to(stage)
        if path.is_relative_to(REPO) and path != source:
            name = path.relative_to(REPO)
            listed = folder and name.parts[:1] in ((), ("gi_lib",), ("book",))  # by an import
            if not listed and not name.parts[0].startswith(("_build", ".")):
                read.add(name.as_posix())
    return sorted(read)


class Running:
    """The processes that execute chapters, so that none outlives the build."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen] = []
        self._stopped = False

    def start(self, command: list[str], **how: Any) -> subprocess.Popen:
        with self._lock:
            if self._stopped:
                raise ChapterError("the build has been stopped")
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **how)
            self._processes.append(process)
        return process

    def end(self) -> None:
        """End them and all that they have started: a kernel has a session of its own. No other can start."""
        with self._lock:
            self._stopped = True
        family = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.returncode is None:
                    one = psutil.Process(process.pid)
                    family += [one, *one.children(recursive=True)]
        for told in (psutil.Process.terminate, psutil.Process.kill):
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    told(one)
            _, family = psutil.wait_procs(family, timeout=5)


def execute(source: Path, folder: Path, stage: Path, parameters: dict, common: str, running: Running) -> float:
    """Run one chapter by papermill in its own process; keep the executed copy, its cost and what it read."""
    folder.mkdir(parents=True, exist_ok=True)
    partial, noted = folder / (source.stem + ".part.ipynb"), folder / (source.stem + ".read")
    partial.unlink(missing_ok=True)
    noted.write_bytes(b"")
    command = [sys.executable, "-m", "papermill", str(source), str(partial), "--cwd", str(stage / "book")]
    command += ["--kernel", "python3", "--no-progress-bar", "--parameters_yaml", json.dumps(parameters)]
    environment = lay_kernel(folder / "jupyter" / source.stem) | {"GI_NOTE": str(noted)}
    written = source.read_bytes()
    started, clock = time.monotonic(), time.time()
    with (folder / (source.stem + ".log")).open("w+", encoding="utf-8", errors="replace") as log:
        process = running.start(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
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
    read = files_read(noted, source, stage.resolve())
    # What changed while the chapter ran may have been read before: then the chapter is stale already.
    late = not noted.stat().st_size or any(
        (REPO / name).exists() and (REPO / name).stat().st_mtime >= clock for name in read
    )
    key = "" if late else digest(common, written, read_key(read))
    cost = {"key": key, "seconds": seconds, "peak_mib": peak, "date": time.strftime("%Y-%m-%d")}
    cost |= {"profile": parameters["profile"], "read": read}
    partial.replace(folder / source.name)
    write(folder / (source.stem + ".json"), json.dumps(cost, indent=1) + "\n")
    return seconds


def stale(folder: Path, common: str) -> list[Path]:
    """The chapters whose copy is missing, or was made under another key or from other files."""
    todo = []
    for source in cells.chapters():
        cost = folder / (source.stem + ".json")
        if (folder / source.name).exists() and cost.exists():
            known = json.loads(cost.read_text(encoding="utf-8"))
            if known["key"] == digest(common, source.read_bytes(), read_key(known.get("read", []))):
                continue
        todo.append(source)
    return todo


def execute_stale(folder: Path, stage: Path, parameters: dict, jobs: int) -> None:
    """Execute the chapters that are stale. All are tried, then failures are told."""
    common = common_key(parameters)
    todo = stale(folder, common)
    if not todo:
        print("chapters: all up to date", flush=True)
        return
    names = ", ".join(source.stem for source in todo)
    print(f"chapters: executing {names} with profile {parameters['profile']}", flush=True)
    failures = []
    processes = Running()
    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        running = {pool.submit(execute, s, folder, stage, parameters, common, processes): s for s in todo}
        for done in as_completed(running):
            try:
                print(f"chapters: {running[done].stem} executed in {done.result():.0f} s", flush=True)
            except ChapterError as error:
                failures.append(str(error))
                print(f"chapters: {running[done].stem} failed", flush=True)
    finally:
        processes.end()
        pool.shutdown(cancel_futures=True)
    if failures:
        raise ChapterError("\n\n".join(failures))


# --- staging


def commit() -> str:
    """The commit that the pages are made from; "main" outside git, and where something of theirs is uncommitted."""
    git = ["git", "-C", str(REPO)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "book/build.py"], check=True, capture_output=True)
        changed = [*git, "status", "--porcelain", "--", "book", *(path.name for path in SHARED)]
        if subprocess.run(changed, check=True, capture_output=True).stdout:
            return "main"
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "main"
    return head.stdout.decode().strip()


def badges(cost: dict, name: str, address: str) -> str:
    """One line of MyST: when and how the chapter was executed, what it cost, and where to run it.

    The branch `colab` holds the notebooks with the commit of the published site in their first cell.
    """
    slug = address.split("github.com/")[1]
    colab = f"https://colab.research.google.com/github/{slug}/blob/colab/book/{name}"
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


def staged_notebook(folder: Path, name: str, address: str, version: str) -> str:
    """The executed copy with its badges under the title and without what names this machine.

    Args:
        version: what its first cell fetches where a reader downloads and opens it.
    """
    notebook = json.loads((folder / name).read_text(encoding="utf-8"))
    cost = json.loads((folder / name).with_suffix(".json").read_text(encoding="utf-8"))
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
        if cell.get("id") == "install":
            cell["source"] = cells.install(address, version)
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

    Only what a page is made of is copied, and nothing else that lies in book/. `extra` is copied to the top of the
    site, so that ../results/NAME.jsonl works on every page.
    """
    shutil.rmtree(stage, ignore_errors=True)
    (stage / "book").mkdir(parents=True)
    for path in BOOK.iterdir():
        if path.is_dir() and path.name in FOLDERS:
            shutil.copytree(path, stage / "book" / path.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif path.is_file() and path.suffix in SOURCES:
            shutil.copy(path, stage / "book" / path.name)
    for name in PAGES:
        if (REPO / name).exists():
            shutil.copy(REPO / name, stage / name)
    for path in SHARED:
        link(path, stage / path.name)
    (stage / "extra").mkdir()
    link(REPO / "results", stage / "extra" / "results")


def write_records(stage: Path) -> None:
    """What the site gives away beside its pages: all records as tables, and each record alone."""
    from gi_lib.results import export  # imports torch, for which a site that is up to date need not wait

    try:
        export.write(REPO / "results", stage / "extra" / "records")
    except (ImportError, OSError, ValueError) as error:
        raise ChapterError(f"the records can't be written for the site: {error}") from error


def build_site(root: Path, parameters: dict, jobs: int) -> Path:
    """Execute what is stale, stage everything, and build unless this very tree was built before."""
    build = root.resolve() / "_build"
    stage, folder, html, built = build / "stage", build / "executed", build / "html", build / "built"
    lay_stage(stage)
    execute_stale(folder, stage, parameters, jobs)
    address, version = cells.address(), commit()
    for source in cells.chapters():
        write(stage / "book" / source.name, staged_notebook(folder, source.name, address, version))
    key = digest(versions(), stage, *SHARED)
    if html.joinpath("index.html").exists() and built.exists() and built.read_text(encoding="utf-8") == key:
        print(f"site: up to date in {html}", flush=True)
        return html
    built.unlink(missing_ok=True)
    shutil.rmtree(html, ignore_errors=True)
    write_records(stage)
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


def check_package() -> None:
    """The interpreter that builds has this checkout's gi_lib, and no other's."""
    found = find_spec("gi_lib")
    here = REPO / "gi_lib"
    if found is None or not found.origin:
        raise ChapterError(f"gi_lib is not installed in {sys.executable}; `make book` installs and builds")
    if (there := Path(found.origin).resolve().parent) != here:
        raise ChapterError(
            f"the gi_lib of {sys.executable} is {there}, and this book belongs to {here}; `make book` in {REPO} makes"
            " a .venv of its own"
        )


def stop(number: int, frame: FrameType | None) -> None:
    """Handles a signal once: what ends the build is not interrupted by a second one."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    raise StoppedError(number)


def folder(text: str) -> Path:
    """A folder that the user names, from where the user stands: chapters run elsewhere."""
    path = Path(text).expanduser().absolute()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is no folder; create it, or correct its name")
    return path


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
    try:
        data_root = str(folder(a.data_root)) if a.data_root else None
        if os.environ.get("GI_DATA"):
            os.environ["GI_DATA"] = str(folder(os.environ["GI_DATA"]))
    except argparse.ArgumentTypeError as error:
        parser.error(f"the data root {error}")
    parameters = {"profile": a.profile, "device": a.device or None, "data_root": data_root, "seed": a.seed}
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    try:
        check_package()
        if a.what == "copies":
            copies(a.root, parameters)
        else:
            build_site(a.root, parameters, a.jobs)
    except ChapterError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except StoppedError as error:
        print("\nstopped: finished chapters are kept", file=sys.stderr)
        return 128 + error.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
