"""The build: what makes a chapter stale, what a failed cell says, what the staged copy shows."""

import json

import build
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
        source.write_text(json.dumps(notebook(*code)))
        build.execute(source, folder, tmp_path / "stage", PARAMETERS, "key")
        return folder

    return run


def test_executed_chapter_has_its_parameters_its_cost_and_its_badges(execute):
    folder = execute("seed = 0", "import os\nprint(seed, os.path.basename(os.getcwd()))")
    staged = json.loads(build.staged_notebook(folder, "chapter.ipynb", "https://github.com/a/b"))
    assert "3 book" in json.dumps(staged)
    assert "papermill" not in staged["metadata"]
    cost = json.loads((folder / "chapter.json").read_text())
    assert cost["key"] == "key" and cost["seconds"] > 0 and 20 < cost["peak_mib"] < 4000
    title = "".join(staged["cells"][0]["source"])
    assert title.startswith("# 1. A title\n\n{.badges}\n[run time ") and title.endswith("\n\nText.")
    assert "(https://colab.research.google.com/github/a/b/blob/main/book/chapter.ipynb)" in title


def test_failed_cell_is_named_and_leaves_no_copy(execute):
    with pytest.raises(build.ChapterError) as caught:
        execute("seed = 0", "x = 1\nassert x == 2, 'one is not two'")
    told = str(caught.value)
    assert told.startswith("book/chapter.ipynb: cell 3 (id 'code-1') failed: x = 1\n")
    assert "AssertionError: one is not two" in told


def test_chapter_without_a_title_is_refused(execute):
    folder = execute("seed = 0")
    path = folder / "chapter.ipynb"
    path.write_text(path.read_text().replace("# 1. A title", "A title"))
    with pytest.raises(build.ChapterError, match="must be markdown and begin with the title"):
        build.staged_notebook(folder, "chapter.ipynb", "https://github.com/a/b")


def test_digest_sees_names_and_contents(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = build.digest(folder, "text")
    assert first == build.digest(folder, "text") != build.digest(folder, "texts")
    (folder / "a").rename(folder / "b")
    renamed = build.digest(folder, "text")
    (folder / "b").write_text("2")
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
