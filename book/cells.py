"""The cells that every chapter shares, and the repository's address that they repeat.

`python book/cells.py` writes both cells into every chapter; with `--repository URL` it first changes the
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
INSTALL = """\
# Where gi_lib is installed this cell does nothing. Elsewhere, as in Colab,
# it fetches the project and installs what is missing; torch stays as it is.
import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

REPOSITORY = "ADDRESS"
if find_spec("gi_lib") is None:
    if not os.path.isdir("gi_book"):
        clone = ["git", "clone", "--depth=1", REPOSITORY, "gi_book"]
        subprocess.run(clone, check=True)
    fixed = [name for name in ("torch", "torchvision") if find_spec(name)]
    fixed = [f"{name}=={version(name)}" for name in fixed]
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "./gi_book[lpips,plots]", *fixed], check=True)
    importlib.invalidate_caches()
if os.path.isdir("gi_book"):
    os.chdir("gi_book/book")"""

PARAMETERS = """\
profile = "quick"  # "smoke": seconds; "quick": a minute; "survey": full size
device = None  # None: a GPU where there is one, else the CPU
data_root = None  # None: $GI_DATA, else the user's cache folder
seed = 0"""

METADATA = {
    "install": {
        "mystnb": {"code_prompt_show": "Install (nothing to do where gi_lib is installed)"},
        "tags": ["install", "hide-input"],
    },
    "parameters": {"tags": ["parameters"]},
}

PATTERN = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")


def address(root: Path = ROOT) -> str:
    """The repository's address, from the one place where it stands: `repository: url:` in `_config.yml`."""
    found = re.search(r"^repository:\n(?:  .*\n)*?  url: *(\S+)", (root / "_config.yml").read_text(), re.M)
    if not found or not PATTERN.fullmatch(found[1]):
        raise SystemExit(
            "_config.yml has no 'repository: url: https://github.com/OWNER/NAME'; the notebooks and the "
            "badges take the address from there"
        )
    return found[1]


def install(address: str) -> str:
    """The first code cell of every chapter."""
    return INSTALL.replace("ADDRESS", address)


def chapters(root: Path = ROOT) -> list[Path]:
    """The notebooks of the book, sorted by name."""
    return sorted((root / "book").glob("*.ipynb"))


def repeats(root: Path = ROOT) -> list[Path]:
    """The files that may repeat the address."""
    here = [p for p in root.iterdir() if p.suffix in {".md", ".cff", ".toml", ".yml"} and p.is_file()]
    book = [p for p in (root / "book").iterdir() if p.suffix in {".md", ".ipynb"}]
    return sorted(here + book)


def rename(new: str, root: Path = ROOT) -> list[Path]:
    """Replace the address, also inside links to Colab, and return the files that changed."""
    new = new.removesuffix("/").removesuffix(".git")
    if not PATTERN.fullmatch(new):
        raise SystemExit(
            "the address must look like https://github.com/OWNER/NAME, because Colab opens notebooks from "
            f"there; got {new!r}"
        )
    slug, old = new.split("github.com/")[1], address(root).split("github.com/")[1]
    pattern = re.compile(r"(?<=github\.com/|com/github/)" + re.escape(old) + r"(?![\w-])")
    changed = []
    for path in repeats(root):
        text = path.read_text()
        replaced = pattern.sub(slug, text)
        if replaced != text:
            path.write_text(replaced)
            changed.append(path)
    return changed


def write_cells(path: Path, address: str) -> bool:
    """Give a notebook both cells, found by their ids, and normal JSON; say whether it changed."""
    text = path.read_text()
    notebook = json.loads(text)
    cells = {cell.get("id"): cell for cell in notebook["cells"]}
    for name, source in (("install", install(address)), ("parameters", PARAMETERS)):
        if name not in cells:
            raise SystemExit(f"{path}: no cell has the id {name!r}; every chapter begins with both")
        cells[name] |= {"source": source.splitlines(keepends=True), "metadata": METADATA[name]}
    new = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(new)
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
