"""What strangers do: they copy and move the checkout, open a notebook anywhere with any kernel, have another locale."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cells
import pandas as pd
import pytest
import yaml

from gi_lib import metrics, provenance, results

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("gi_lib", "book", "results", "experiments", "benchmarks", "checkpoints")


def run(*command, cwd, **environment):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(list(command), cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=600)


# --- make


PYTHON = """\
#!/bin/bash
[ "$1" = -m ] && [ "$2" = venv ] || exit 0
mkdir -p .venv/bin
[ -e ensurepip ] || { printf '#!/bin/bash\\n[ "$2" != pip ]\\n' > .venv/bin/python; chmod +x .venv/bin/python; exit 1; }
printf '#!/bin/bash\\n' > .venv/bin/python
chmod +x .venv/bin/python
echo "VIRTUAL_ENV=$PWD/.venv" > .venv/bin/activate
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose python makes a .venv of a few bytes, and no pip in it unless there is a file `ensurepip`."""
    folder = tmp_path / "a é"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("requirements.txt", "pyproject.toml", "ensurepip"):
        (folder / name).write_bytes(b"")
    python = folder / "python"
    python.write_text(PYTHON, encoding="utf-8")
    python.chmod(0o755)
    return folder


def make(folder):
    return run("make", ".venv/installed", "PYTHON=./python", cwd=folder)


def test_the_environment_is_made_once(checkout):
    assert make(checkout).returncode == 0 and (checkout / ".venv/installed").exists()
    assert "up to date" in make(checkout).stdout


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_a_copied_or_moved_checkout_makes_its_own_environment(checkout, how):
    make(checkout)
    there = checkout.with_name("b")
    how(checkout, there)
    assert "made again" in make(there).stdout
    assert (there / ".venv/bin/activate").read_text(encoding="utf-8") == f"VIRTUAL_ENV={there}/.venv\n"
    assert "up to date" in make(there).stdout


def test_without_ensurepip_nothing_is_left_that_stops_the_second_call(checkout):
    (checkout / "ensurepip").unlink()
    assert make(checkout).returncode != 0 and not (checkout / ".venv").exists()
    (checkout / "ensurepip").write_bytes(b"")
    assert make(checkout).returncode == 0


def test_an_environment_without_pip_is_made_again(checkout):
    """As `python -m venv` leaves it where ensurepip is missing."""
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/activate").write_text(f"VIRTUAL_ENV={checkout}/.venv", encoding="utf-8")
    (checkout / ".venv/bin/python").write_text('#!/bin/bash\n[ "$2" != pip ]\n', encoding="utf-8")
    (checkout / ".venv/bin/python").chmod(0o755)
    assert "made again" in make(checkout).stdout and make(checkout).returncode == 0


# --- a notebook anywhere


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A repository that holds this working tree, but for the pictures of the records."""
    folder = tmp_path_factory.mktemp("address")
    for name in SHARED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.lock"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for command in (
        ["init", "--quiet", "--initial-branch=main"],
        ["add", "--all", "--force"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message=x"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def installed(tmp_path):
    """A folder to import gi_lib from, as one that pip has filled: no records beside it."""
    shutil.copytree(ROOT / "gi_lib", tmp_path / "site/gi_lib", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


@pytest.fixture
def away(tmp_path):
    folder = tmp_path / "away"
    folder.mkdir()
    return folder


NO_INSTALLED = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
PIP = """\
import subprocess, sys
real = subprocess.run
def pip(command, **how):
    if command[1:3] != ["-m", "pip"]:
        return real(command, **how)
    print("pip", *command[5:])
    return real(["true"], **how)
subprocess.run = pip
"""
SAID = "\nimport os, gi_lib\nprint(os.getcwd(), gi_lib.__file__)"


def open_at(folder, address, code="", version="main", **environment):
    """Run the install cell, and then `code`, in a fresh process without this checkout's installed gi_lib."""
    cell = cells.install(str(address), version)
    return run(sys.executable, "-c", NO_INSTALLED + PIP + cell + SAID + code, cwd=folder, **environment)


def test_in_a_checkout_nothing_is_fetched(address):
    done = open_at(ROOT / "book", "/nowhere", PYTHONPATH=str(ROOT))
    assert done.stdout.split() == [str(ROOT / "book"), str(ROOT / "gi_lib/__init__.py")], done.stderr


def test_a_notebook_elsewhere_finds_the_checkout_that_gi_lib_is_installed_from(address, away):
    done = open_at(away, "/nowhere", PYTHONPATH=str(address))
    assert done.stdout.split() == [str(address / "book"), str(address / "gi_lib/__init__.py")], done.stderr
    assert list(away.iterdir()) == []


def test_in_a_checkout_another_kernel_is_refused_by_name(address, installed):
    """Without gi_lib, or with another's: nothing is fetched, installed or read."""
    before = sorted((address / "book").iterdir())
    for environment, said in (({}, "has no gi_lib"), ({"PYTHONPATH": str(installed)}, f"the gi_lib of {installed}")):
        done = open_at(address / "book", "/nowhere", **environment)
        words = " ".join(done.stderr.split())
        assert done.returncode == 1 and said in words and f"the kernel of {address / '.venv'}" in words
    assert sorted((address / "book").iterdir()) == before


RECORDS = "\nfrom gi_lib import results\nprint(len(results.study('dlg')) > 0)"


def test_a_notebook_alone_fetches_its_version(address, away):
    """A commit that is not the newest; pip gets the project, and keeps the torch that is there."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=address, capture_output=True, check=True).stdout.decode()
    done = open_at(away, address, RECORDS, commit.strip())
    copy = away / f"gi_book-{commit[:12]}"
    pip, where, records = done.stdout.splitlines()
    assert re.fullmatch(rf"pip {re.escape(str(copy))}\[lpips,plots\] torch==\S+ torchvision==\S+", pip)
    assert where.split() == [str(copy / "book"), str(copy / "gi_lib/__init__.py")] and records == "True"
    again = open_at(away, "/nowhere", RECORDS, commit.strip())  # the copy is there
    assert again.stdout.endswith("True\n"), again.stderr


def test_with_gi_lib_installed_records_and_code_are_of_one_version(address, away, installed):
    done = open_at(away, address, RECORDS, PYTHONPATH=str(installed))
    copy = away / "gi_book-main"
    assert done.stdout.splitlines() == [f"{copy / 'book'} {copy / 'gi_lib/__init__.py'}", "True"], done.stderr


@pytest.mark.parametrize(
    ("where", "version"), [("/nowhere", "main"), (None, "v99")], ids=["no such address", "no such version"]
)
def test_an_address_that_does_not_answer_gets_a_sentence(address, away, where, version):
    done = open_at(away, where or address, version=version)
    last = done.stderr[done.stderr.index("RuntimeError: ") :]
    said = f"RuntimeError: {where or address} at {version} could not be fetched. Look whether it answers, and run this"
    assert " ".join(last.split()).startswith(said)
    assert not list(away.glob("gi_book-*[!t]"))  # nothing that is taken for a whole copy


def setups():
    """The code of every chapter up to its setup, each in a namespace of its own."""
    code = {}
    for path in cells.chapters():
        found = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        ids = [cell["id"] for cell in found]
        last = ids.index("setup") if "setup" in ids else 3
        code[path.stem] = ["".join(cell["source"]) for cell in found[: last + 1] if cell["id"] != "install"]
    return code


def test_every_chapter_is_set_up_from_a_foreign_folder(address, away):
    """The whole chapters are run so by `make strangers`."""
    (away / "setups.json").write_text(json.dumps(setups()), encoding="utf-8")
    code = f"\nimport json\nchapters = json.load(open({str(away / 'setups.json')!r}, encoding='utf-8'))\n"
    code += """
for name, parts in chapters.items():
    space = {"__name__": name}
    for part in parts:
        exec(part, space)
    print(name)
"""
    done = open_at(away, address, code)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]
    assert {path.stem for path in cells.chapters()} <= set(done.stdout.splitlines())


# --- parameters


GOOD = {"profile": "quick", "device": "cpu", "data_root": None, "seed": 3}


def test_good_parameters_pass(tmp_path):
    provenance.check_parameters(**GOOD)
    provenance.check_parameters("smoke", None, str(tmp_path), 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seed": 1.5}, "seed is a whole number >= 0, such as 0, got 1.5"),
        ({"seed": "abc"}, "seed is a whole number >= 0, such as 0, got 'abc'"),
        ({"seed": -1}, "got -1"),
        ({"seed": True}, "got True"),
        ({"profile": "Smoke"}, "profile is one of 'smoke', 'quick', 'survey', got 'Smoke'"),
        ({"profile": []}, "got []"),
        ({"device": "gpu"}, "the device 'gpu' can't be used"),
        ({"device": 0}, "device is a text such as 'cpu' or 'cuda'"),
        ({"data_root": 3}, "data_root is the path of a folder"),
        ({"data_root": "nowhere"}, f"means {Path.cwd() / 'nowhere'}, which is no folder"),
    ],
    ids=str,
)
def test_a_wrong_parameter_gets_a_sentence(wrong, said):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        provenance.check_parameters(**GOOD | wrong)
    assert said in str(caught.value)


# --- encodings


def texts_opened(tree):
    """Calls that read or write text, and whether they say in which encoding."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        named = any(keyword.arg == "encoding" for keyword in node.keywords)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("read_text", "write_text"):
            yield node.lineno, named
        elif called == "open":
            own = isinstance(node.func, ast.Name)
            mode = node.args[own] if len(node.args) > own else None
            if isinstance(mode, ast.Constant) and isinstance(mode.value, str):
                yield node.lineno, named or "b" in mode.value
            elif own:
                yield node.lineno, named


SOURCES = [p for name in ("gi_lib", "book", "experiments", "benchmarks") for p in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_as_utf8(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [line for line, named in texts_opened(tree) if not named] == []


def test_the_test_of_encodings_sees_a_breach():
    code = "p.read_text()\nopen(p)\nopen(p, 'w')\np.open('a')\np.write_text('é')"
    assert [line for line, named in texts_opened(ast.parse(code)) if not named] == [1, 2, 3, 4, 5]
    code = "p.read_text(encoding='utf-8')\nopen(p, 'rb')\nImage.open(p)\np.open('a', encoding='utf-8')"
    assert all(named for _, named in texts_opened(ast.parse(code)))


def test_cells_are_written_under_an_ascii_locale(tmp_path):
    """Chapters hold letters of many alphabets."""
    (tmp_path / "book").mkdir()
    for name in ("_config.yml", "book/cells.py", "book/federated.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = run(sys.executable, "book/cells.py", cwd=tmp_path, **ascii_only)
    assert done.returncode == 0, done.stderr
    before, after = ((folder / "book/federated.ipynb").read_bytes() for folder in (ROOT, tmp_path))
    assert before == after and not before.isascii()


# --- records that others read


RECORDS_OF_ALL = sorted((ROOT / "results").rglob("*.jsonl"))


@pytest.mark.parametrize("path", RECORDS_OF_ALL, ids=lambda path: path.stem)
def test_pandas_reads_the_records_as_they_are(path):
    """As many rows as cases, and texts that stay texts."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    frame = pd.read_json(path, lines=True)
    assert frame["commit"].tolist() == [row["commit"] for row in rows]
    if path.parent == ROOT / "results":
        for name in ("case", "key"):
            assert frame[name].tolist() == [row[name] for row in rows]
        assert frame["case"].is_unique, f"{path.name}: gi_lib.results.compact leaves one line a case"


def test_compact_leaves_the_last_line_of_each_case_where_the_first_stood(tmp_path):
    path = tmp_path / "study.jsonl"
    lines = ['{"case": "a", "n": 1}', '{"case": "b", "n": 2}', '{"case": "a", "n": 3}']
    path.write_text("\n".join([*lines, '{"case": "c'.ljust(20)]), encoding="utf-8")
    assert results.compact(path) == 1 and results.compact(path) == 0
    assert path.read_text(encoding="utf-8").splitlines() == [lines[2], lines[1], '{"case": "c'.ljust(20)]
    path.write_text("half\n" + lines[0] + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"study.jsonl:1: this line is not a record"):
        results.compact(path)
    assert path.read_text(encoding="utf-8").startswith("half\n")


# --- the package


def test_the_readme_prints_what_it_says(monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [said] = re.findall(r"```text\n(.*?)\n```", text, re.DOTALL)
    monkeypatch.setattr(metrics, "lpips", lambda *given, **how: None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})  # noqa: S102 - our own
    words = [re.sub(r"[\d.e+-]+", "#", line) for line in (said, printed.getvalue().strip())]
    assert words[0] == words[1] and float(re.search(r"PSNR (\S+)", printed.getvalue())[1]) > 40


def test_the_sdist_holds_what_the_tests_need(tmp_path):
    """Every file of the checkout, but for what git keeps for itself."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are the project's")
    names = {name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()}
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(ROOT / name, tmp_path / "tree" / name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done = run(sys.executable, "-c", code, cwd=tmp_path / "tree")
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as held:
        missing = names - {name.partition("/")[2] for name in held.getnames()}
    assert missing == set()


# --- the workflows


def steps(name, job):
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))["jobs"][job]["steps"]


def test_colabs_branch_holds_notebooks_with_their_commit(address, away):
    """What the workflow pushes: the badge leads there, and its install cell fetches the commit of the pages."""
    (script,) = (step["run"] for step in steps("book", "notebooks") if "run" in step)
    bare = away / "origin.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(address), str(bare)], check=True)
    subprocess.run(["git", "clone", "--quiet", str(bare), str(away / "clone")], check=True)
    done = run("bash", "-eo", "pipefail", "-c", script, cwd=away / "clone", GITHUB_SHA="0123456789abcdef")
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(["git", "show", "colab:book/dlg.ipynb"], cwd=bare, capture_output=True, check=True).stdout
    install = next(cell for cell in json.loads(shown)["cells"] if cell["id"] == "install")
    assert "".join(install["source"]) == cells.install(cells.address(), "0123456789abcdef")
