"""The build: what makes a chapter stale, what a failed cell says, what the staged copy shows, how it ends."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import build
import psutil
import pytest

from gi_lib.results import export

PARAMETERS = {"profile": "smoke", "device": None, "data_root": None, "seed": 3}


def notebook(*code):
    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# 1. A title\n\nText."}
    cells = [
        {"cell_type": "code", "id": f"code-{i}", "metadata": {}, "source": source, "outputs": []}
        | {"execution_count": None}
        for i, source in enumerate(code)
    ]
    cells[0]["metadata"] = {"tags": ["parameters"]}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": [title, *cells],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture
def execute(tmp_path):
    (tmp_path / "stage/book").mkdir(parents=True)
    source, folder = tmp_path / "chapter.ipynb", tmp_path / "executed"

    def run(*code):
        source.write_text(json.dumps(notebook(*code)), encoding="utf-8")
        build.execute(source, folder, tmp_path / "stage", PARAMETERS, "common", build.Running())
        return folder

    return run


def cost_of(folder):
    return json.loads((folder / "chapter.json").read_text(encoding="utf-8"))


def test_executed_chapter_has_its_parameters_its_cost_and_its_badges(execute, tmp_path, monkeypatch):
    """By this interpreter, whatever kernel the user has under the same name; under a locale that knows ASCII alone."""
    spec = tmp_path / "user/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    told = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    spec.write_text(json.dumps(told), encoding="utf-8")
    for name, value in {"JUPYTER_PATH": str(tmp_path / "user"), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    folder = execute("seed = 0", "import os, sys\nprint(seed, os.path.basename(os.getcwd()), sys.executable, 'é')")
    staged = json.loads(build.staged_notebook(folder, "chapter.ipynb", "https://github.com/a/b", "main"))
    assert f"3 book {sys.executable} é" in json.dumps(staged, ensure_ascii=False)
    assert "papermill" not in staged["metadata"]
    cost = cost_of(folder)
    assert cost["key"] == build.digest(
        "common", (tmp_path / "chapter.ipynb").read_bytes(), build.read_key(cost["read"])
    )
    assert cost["seconds"] > 0 and 20 < cost["peak_mib"] < 4000
    title = "".join(staged["cells"][0]["source"])
    assert title.startswith("# 1. A title\n\n{.badges}\n[run time ") and title.endswith("\n\nText.")
    assert "(https://colab.research.google.com/github/a/b/blob/colab/book/chapter.ipynb)" in title


def test_executed_chapter_notes_what_it_rests_on(execute, tmp_path):
    (tmp_path / "stage/results").symlink_to(build.REPO / "results")
    (tmp_path / "stage/book/field.yml").write_text("", encoding="utf-8")
    code = [
        "from gi_lib.attacks import BiasRatio, ATTACKS\nprint(list(ATTACKS))",
        "open('../results/dlg.jsonl').close()\nopen('field.yml').close()",
        "import os\nos.listdir('../results/labels')",
    ]
    read = cost_of(execute("seed = 0", *code))["read"]
    files = {"gi_lib/attacks/bias_ratio.py", "gi_lib/types.py", "results/dlg.jsonl", "results/labels", "book/field.yml"}
    assert files <= set(read)
    assert not {"gi_lib/attacks/dlg.py", "gi_lib/cli/app.py", "results/survey.jsonl", "gi_lib"} & set(read)


def test_a_chapter_is_stale_when_what_it_read_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "REPO", tmp_path)
    monkeypatch.setattr(build.cells, "chapters", lambda: [tmp_path / "a.ipynb", tmp_path / "b.ipynb"])
    executed, records = tmp_path / "executed", tmp_path / "results"
    executed.mkdir()
    records.mkdir()
    for name in ("a.ipynb", "b.ipynb", "executed/a.ipynb", "executed/b.ipynb", "one.py", "two.py"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    for stem, read in (("a", ["one.py"]), ("b", ["two.py", "results", "none.py"])):
        key = build.digest("common", (tmp_path / f"{stem}.ipynb").read_bytes(), build.read_key(read))
        (executed / f"{stem}.json").write_text(json.dumps({"key": key, "read": read}), encoding="utf-8")

    def stale(common="common"):
        return [path.stem for path in build.stale(executed, common)]

    def changed(name, text):
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(text, encoding="utf-8")
        found = stale()
        path.write_bytes(before) if before is not None else path.unlink()
        return found

    assert stale() == [] and stale("other") == ["a", "b"]
    assert changed("one.py", "one") == ["a"]
    assert changed("two.py", "") == changed("results/new.jsonl", "") == changed("none.py", "") == ["b"]
    assert changed("a.ipynb", "") == ["a"] and changed("three.py", "") == []
    (executed / "b.ipynb").unlink()
    assert stale() == ["b"]


def test_a_chapter_whose_file_changed_meanwhile_is_stale_at_once(execute, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "REPO", tmp_path)
    (tmp_path / "data.txt").write_text("1", encoding="utf-8")
    code = f"path = {str(tmp_path / 'data.txt')!r}\nopen(path).close()\nopen(path, 'w').close()"
    cost = cost_of(execute("seed = 0", code))
    assert cost["key"] == "" and cost["read"] == ["data.txt"]


def test_failed_cell_is_named_and_leaves_no_copy(execute):
    with pytest.raises(build.ChapterError) as caught:
        execute("seed = 0", "x = 1\nassert x == 2, 'one is not two'")
    told = str(caught.value)
    assert told.startswith("book/chapter.ipynb: cell 3 (id 'code-1') failed: x = 1\n")
    assert "AssertionError: one is not two" in told


def test_chapter_without_a_title_is_refused(execute):
    folder = execute("seed = 0")
    path = folder / "chapter.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("# 1. A title", "A title"), encoding="utf-8")
    with pytest.raises(build.ChapterError, match="must be markdown and begin with the title"):
        build.staged_notebook(folder, "chapter.ipynb", "https://github.com/a/b", "main")


def test_digest_sees_names_and_contents(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1", encoding="utf-8")
    first = build.digest(folder, "text")
    assert first == build.digest(folder, "text") != build.digest(folder, "texts")
    (folder / "a").rename(folder / "b")
    renamed = build.digest(folder, "text")
    (folder / "b").write_text("2", encoding="utf-8")
    assert len({first, renamed, build.digest(folder, "text")}) == 3


@pytest.mark.parametrize(("name", "value"), [("profile", "quick"), ("seed", 4), ("device", "cuda")])
def test_chapters_are_stale_under_other_parameters(name, value):
    assert build.common_key(PARAMETERS) != build.common_key(PARAMETERS | {name: value})


def test_the_site_gets_the_records_as_files_and_says_what_keeps_them_from_it(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(build, "REPO", tmp_path)
    with pytest.raises(build.ChapterError, match="records can't be written for the site: no records in"):
        build.write_records(tmp_path / "stage")
    (tmp_path / "results" / "dlg.jsonl").write_bytes((build.BOOK.parent / "results" / "dlg.jsonl").read_bytes())
    build.write_records(tmp_path / "stage")
    written = {path.name for path in (tmp_path / "stage" / "extra" / "records").iterdir()}
    assert written == {"dlg", *export.TABLES}


def test_a_new_study_makes_chapters_stale(monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(build, "REPO", tmp_path)
    before = build.common_key(PARAMETERS)
    (tmp_path / "results/batch.jsonl").write_text("", encoding="utf-8")
    assert build.common_key(PARAMETERS) != before


# --- how it starts and ends


def build_py(*arguments, **environment):
    """build.py in a process of its own, with this checkout's gi_lib."""
    command = [sys.executable, str(build.BOOK / "build.py"), *arguments]
    env = os.environ | {"PYTHONPATH": str(build.REPO)} | environment
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=env, timeout=60)


def test_another_checkouts_package_is_refused_by_name(tmp_path):
    """A checkout that was copied or moved with its .venv."""
    other = tmp_path / "gi_lib/__init__.py"
    other.parent.mkdir()
    other.write_text("raise SystemExit('imported')", encoding="utf-8")
    done = build_py("copies", "--root", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(other.parent) in done.stderr and str(build.REPO / "gi_lib") in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [{"arguments": ("--data-root", "nowhere")}, {"GI_DATA": "nowhere"}])
def test_a_data_root_that_is_not_there_is_refused(how, tmp_path):
    done = build_py("copies", "--root", str(tmp_path), *how.pop("arguments", ()), **how)
    assert done.returncode == 2 and f"{Path.cwd() / 'nowhere'} is no folder" in done.stderr


def test_a_folder_is_resolved_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert build.folder("mine") == tmp_path / "mine"
    with pytest.raises(argparse.ArgumentTypeError, match="is no folder"):
        build.folder("other")


def test_only_what_a_page_is_made_of_is_staged(tmp_path, monkeypatch):
    """A copy of the project that a notebook fetched into book/ is not."""
    book = tmp_path / "book"
    for name in ("page.md", "references.bib", "field.yml", "_static/book.css", "gi_book-main/book/page.md", "build.py"):
        (book / name).parent.mkdir(parents=True, exist_ok=True)
        (book / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(build, "BOOK", book)
    build.lay_stage(tmp_path / "stage")
    staged = {str(p.relative_to(tmp_path / "stage/book")) for p in (tmp_path / "stage/book").rglob("*") if p.is_file()}
    assert staged == {"page.md", "references.bib", "field.yml", "_static/book.css"}


def gone(pids):
    """Whether all of these have ended, soon."""
    end = time.monotonic() + 15
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_ending_the_build_ends_papermill_and_its_kernel(tmp_path):
    (tmp_path / "stage/book").mkdir(parents=True)
    source, begun = tmp_path / "chapter.ipynb", tmp_path / "begun"
    code = f"import os, time\nopen({str(begun)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    source.write_text(json.dumps(notebook("seed = 0", code)), encoding="utf-8")
    running, failed = build.Running(), []

    def execute():
        try:
            build.execute(source, tmp_path / "executed", tmp_path / "stage", PARAMETERS, "common", running)
        except (build.ChapterError, ChildProcessError) as error:
            failed.append(error)

    thread = threading.Thread(target=execute)
    thread.start()
    end = time.monotonic() + 60
    while not begun.exists() or not begun.read_text(encoding="utf-8"):
        assert time.monotonic() < end and not failed
        time.sleep(0.1)
    papermill = [process.pid for process in psutil.Process().children() if "papermill" in process.cmdline()]
    running.end()
    thread.join(15)
    assert failed and gone([*papermill, int(begun.read_text(encoding="utf-8"))])
    assert not (tmp_path / "executed/chapter.ipynb").exists()
    with pytest.raises(build.ChapterError, match="has been stopped"):
        running.start(["true"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_build_with_its_number(number):
    """Also an interrupt of a build in the background, where a shell has it ignored."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); import build\n"
        "build.build_site = lambda *given: (print('begun', flush=True), time.sleep(60))\n"
        "sys.argv = ['build.py', 'site']; sys.exit(build.main())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(build.REPO), str(build.BOOK)])}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env}
    with subprocess.Popen([sys.executable, "-c", code], **how) as process:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert b"finished chapters are kept" in process.stderr.read()
