"""The cells that every chapter shares, and the repository's address that they repeat.

`python book/cells.py` writes these cells into every chapter; with `--repository URL` it first changes the
address in `_config.yml`, where it stands, and in every file that has to repeat it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# In Colab torch is installed already and made for its machine: naming the
# installed versions keeps pip from replacing it.
INSTALL = r'''
# In a checkout of the project this cell only looks around. Elsewhere, as in
# Colab, it fetches the version that this page was made from, installs what is
# missing, and goes to its folder `book`; torch stays as it is.
import importlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = "ADDRESS"
VERSION = "main"  # a commit, a tag or a branch


def run(command, what):
    """Runs a command; where it fails, says what that means."""
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    how = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(command, env=quiet, **how)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed. {what}") from None
    if done.returncode:
        told = (done.stderr or done.stdout).strip()[-800:]
        raise RuntimeError(f"{what}\n\n{told}")


def fetched():
    """A copy of the project at VERSION, whole or not there at all."""
    copy = Path(f"gi_book-{VERSION[:12].replace('/', '-')}").absolute()
    if not copy.is_dir():
        part = copy.with_name(f"{copy.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        what = f"{REPOSITORY} at {VERSION} could not be fetched. Look whether"
        what += " it answers, and run this cell again; or download the"
        what += " project and open this notebook in its folder `book`."
        run(["git", "init", "--quiet", str(part)], what)
        fetch = ["fetch", "--quiet", "--depth=1", REPOSITORY, VERSION]
        run(["git", "-C", str(part), *fetch], what)
        checkout = ["checkout", "--quiet", "FETCH_HEAD"]
        run(["git", "-C", str(part), *checkout], what)
        part.rename(copy)
    return copy


here = Path.cwd()
around = [here, *here.parents]
around = [p for p in around if (p / "gi_lib/__init__.py").is_file()]
found = find_spec("gi_lib")
own = found and found.origin and Path(found.origin).resolve().parents[1]
if around:
    home = around[0]
    checkout = (home / "gi_lib").resolve().parent
    if own != checkout:
        raise RuntimeError(
            f"This notebook lies in {checkout}, and its kernel has"
            f" {f'the gi_lib of {own}' if own else 'no gi_lib'}. Choose the"
            f" kernel of {checkout / '.venv'}, which `make book` makes."
        )
elif own and (own / "book/cells.py").is_file():  # installed from a checkout
    home = own
else:
    home = fetched()
    if own is None:
        fixed = [name for name in ("torch", "torchvision") if find_spec(name)]
        fixed = [f"{name}=={version(name)}" for name in fixed]
        pip = [sys.executable, "-m", "pip", "install", "--quiet"]
        what = "pip could not install what is missing. Use a virtual"
        what += " environment's Python as kernel, and run this cell again."
        run([*pip, f"{home}[lpips,plots]", *fixed], what)
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()
os.chdir(home / "book")
'''.strip()

PARAMETERS = """\
profile = "quick"  # "smoke": seconds; "quick": a minute; "survey": full size
device = None  # None: a GPU where there is one, else the CPU
data_root = None  # None: $GI_DATA, else the user's cache folder
seed = 0"""

# A cell of its own: what papermill injects comes behind the parameters.
CHECKED = """\
from gi_lib.provenance import check_parameters

check_parameters(profile, device, data_root, seed)"""

METADATA = {
    "install": {
        "mystnb": {"code_prompt_show": "Install (nothing to do in a checkout)"},
        "tags": ["install", "hide-input"],
    },
    "parameters": {"tags": ["parameters"]},
    "checked": {"tags": ["remove-cell"]},
}

PATTERN = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


def address(root: Path = ROOT) -> str:
    """The repository's address, from the one place where it stands: `repository: url:` in `_config.yml`."""
    text = (root / "_config.yml").read_text(encoding="utf-8")
    found = re.search(r"^repository:\n(?:  .*\n)*?  url: *(\S+)", text, re.M)
    if not found or not PATTERN.fullmatch(found[1]):
        raise SystemExit(
            "_config.yml has no 'repository: url: https://github.com/OWNER/NAME'; the notebooks and the "
            "badges take the address from there"
        )
    return found[1]


def site(address: str) -> str:
    """Where GitHub serves the pages of the repository at `address`."""
    owner, name = address.split("github.com/")[1].split("/")
    host = f"{owner.lower()}.github.io"
    return f"https://{host}/" if name.lower() == host else f"https://{host}/{name}/"


def install(address: str, version: str = "main") -> str:
    """The first code cell of every chapter.

    Args:
        address: of the repository.
        version: the commit, tag or branch that a chapter fetches where it is opened alone.
    """
    return INSTALL.replace("ADDRESS", address).replace('VERSION = "main"', f'VERSION = "{version}"')


def chapters(root: Path = ROOT) -> list[Path]:
    """The notebooks of the book, sorted by name."""
    return sorted((root / "book").glob("*.ipynb"))


def repeats(root: Path = ROOT) -> list[Path]:
    """The files that may repeat the address."""
    here = [p for p in root.iterdir() if p.suffix in {".md", ".cff", ".toml", ".yml"} and p.is_file()]
    book = [p for p in (root / "book").iterdir() if p.suffix in {".md", ".ipynb"}]
    return sorted(here + book)


def rename(new: str, root: Path = ROOT) -> list[Path]:
    """Replace the address, also inside links to Colab, to files and to the site; return the files that changed."""
    new = new.removesuffix("/").removesuffix(".git")
    if not PATTERN.fullmatch(new):
        raise SystemExit(
            "the address must look like https://github.com/OWNER/NAME, because Colab opens notebooks from "
            f"there; got {new!r}"
        )
    before = address(root)
    slug, old = new.split("github.com/")[1], before.split("github.com/")[1]
    pattern = re.compile(r"(?<=github\.com/|com/github/|ontent\.com/)" + re.escape(old) + r"(?![\w-])")
    changed = []
    for path in repeats(root):
        text = path.read_text(encoding="utf-8")
        replaced = pattern.sub(slug, text).replace(site(before), site(new))
        if replaced != text:
            path.write_text(replaced, encoding="utf-8")
            changed.append(path)
    return changed


def write_cells(path: Path, address: str) -> bool:
    """Give a notebook the shared cells, found by their ids, and normal JSON; say whether it changed."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    ids = [cell.get("id") for cell in notebook["cells"]]
    if missing := [name for name in ("install", "parameters") if name not in ids]:
        raise SystemExit(f"{path}: no cell has the id {missing[0]!r}; every chapter begins with both")
    if "checked" not in ids:
        empty = {"cell_type": "code", "execution_count": None, "id": "checked", "metadata": {}, "outputs": []}
        notebook["cells"].insert(ids.index("parameters") + 1, empty)
    cells = {cell.get("id"): cell for cell in notebook["cells"]}
    for name, source in (("install", install(address)), ("parameters", PARAMETERS), ("checked", CHECKED)):
        cells[name] |= {"source": source.splitlines(keepends=True), "metadata": METADATA[name]}
    new = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(new, encoding="utf-8")
    return new != text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", metavar="URL", help="change the address everywhere, then write the cells")
    arguments = parser.parse_args()
    changed = rename(arguments.repository) if arguments.repository else []
    changed += [path for path in chapters() if write_cells(path, address())]
    for path in sorted(set(changed)):
        print("wrote", path.relative_to(ROOT))
    if not changed:
        print("nothing to change", file=sys.stderr)


if __name__ == "__main__":
    main()
