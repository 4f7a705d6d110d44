"""Runs chapters as strangers do: one notebook alone in an empty folder, which fetches the rest.

    python tests/strangers.py                  every chapter twice: where gi_lib is missing, and where pip has put it
    python tests/strangers.py dlg survey       these chapters
    python tests/strangers.py --here --address URL --version COMMIT    by this Python as it is, as in Colab

What they fetch is the last commit. No network is needed: what pip would download is lent from this Python's packages.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))

import cells  # noqa: E402 - book/ is no package


def borrowed(folder: Path, installed: bool) -> Path:
    """An environment with this Python's packages but for gi_lib, or with a gi_lib of its own; returns its python."""
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    if installed:
        shutil.copytree(ROOT / "gi_lib", site / "gi_lib", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "bin" / "python"


def run(path: Path, python: Path, folder: Path, address: str, version: str) -> str | None:
    """Execute one chapter in `folder`; what went wrong, or None."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["id"] == "install":
            cell["source"] = cells.install(address, version)
    (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    kernel = {"argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel |= {"display_name": "Python 3", "language": "python"}
    spec = folder / ".jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(kernel), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"JUPYTER_PATH": str(spec.parents[2])}
    if python != Path(sys.executable):
        env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0 says: without isolation
    command = [str(python), "-m", "papermill", path.name, "executed.ipynb", "--no-progress-bar", "--kernel", "python3"]
    done = subprocess.run(
        [*command, "-p", "profile", "smoke"], cwd=folder, env=env, capture_output=True, encoding="utf-8"
    )
    return done.stderr.strip()[-3000:] if done.returncode else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", help="their names, without the ending; none: all")
    parser.add_argument("--address", default=str(ROOT), help="what the notebooks fetch the project from")
    parser.add_argument("--version", default="HEAD", help="a commit, a tag or a branch")
    parser.add_argument("--here", action="store_true", help="by this Python as it is, and pip may download")
    a = parser.parse_args()
    paths = {path.stem: path for path in cells.chapters()}
    if unknown := set(a.chapters) - paths.keys():
        parser.error(f"no chapter is called {', '.join(sorted(unknown))}; there are {', '.join(paths)}")
    failed = []
    for name in a.chapters or paths:
        for way in ["here"] if a.here else ["missing", "installed"]:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "away"
                folder.mkdir()
                python = Path(sys.executable) if a.here else borrowed(Path(temporary) / "venv", way == "installed")
                started = time.monotonic()
                wrong = run(paths[name], python, folder, a.address, a.version)
            spent = f"{time.monotonic() - started:.0f} s"
            print(f"{name}, gi_lib {way}: {'failed' if wrong else 'ok'} in {spent}", wrong or "", flush=True)
            failed += [name] if wrong else []
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
