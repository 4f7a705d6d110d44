"""All records as Parquet, CSV and JSON: nothing is lost, and the dictionary says what there is."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from gi_lib import results
from gi_lib.bench.cases import identity
from gi_lib.cli import load_study
from gi_lib.results import export
from tests.test_results import record

RESULTS = Path(__file__).resolve().parent.parent / "results"


@pytest.fixture
def folder(tmp_path):
    """Two studies; one case was run again after a revision, one failed, one has a curve, and one a picture."""
    curve = {"evaluations": [0, 3], "seconds": [0.0, 2.0], "psnr": [[1.0, None], [20.0, 30.0]]}
    curve |= {"identified": [[False, False], [False, True]]}
    results.append(tmp_path / "one.jsonl", record("a1", case="a"))
    results.append(tmp_path / "one.jsonl", record("a2", case="a", curve=curve, notes={"layer": "fc"}, size=32))
    results.append(tmp_path / "one.jsonl", record("b", "failed", error='ValueError: "ü", no,\nno', threat_letter="B"))
    results.append(tmp_path / "two.jsonl", record("c", psnr=[None, 1 / 3], weights="mnist_lenet5"))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "c.png").write_bytes(b"")
    return tmp_path


def expected(folder):
    """Records by study and key, as the files of a study have them."""
    return {(path.stem, row["key"]): row for path in folder.glob("*.jsonl") for row in results.rows(path)}


def plain(value):
    """What pandas and pyarrow make of a cell, as JSON would have it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if value is None or value is pd.NA or value != value else value


def test_parquet_and_csv_give_every_field_of_every_record_back(folder, tmp_path):
    out = tmp_path / "site" / "records"
    assert export.write(folder, out) == 3
    wanted = expected(folder)
    assert set(wanted) == {("one", "a2"), ("one", "b"), ("two", "c")}
    read = {"parquet": pd.read_parquet(out / "records.parquet"), "csv": pd.read_csv(out / "records.csv")}
    for kind, table in read.items():
        assert list(table.columns) == list(export.COLUMNS)
        rows = {(row["study"], row["key"]): row for row in table.to_dict("records")}
        assert set(rows) == set(wanted), kind
        for name, row in wanted.items():
            for field, value in row.items():
                got = plain(rows[name][field])
                nested = isinstance(value, dict) or (kind == "csv" and isinstance(value, list))
                if nested and isinstance(got, str):
                    got = json.loads(got)
                assert got == value, (kind, name, field)
    assert plain(read["parquet"].set_index("key")["picture"]["c"]) == "results/two/c.png"
    assert read["parquet"]["picture"].notna().sum() == 1


def test_parquet_has_the_type_and_the_meaning_of_each_column_even_where_all_is_null(folder, tmp_path):
    import pyarrow.parquet as pq

    export.write(folder, tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "records.parquet")
    kinds = {field.name: str(field.type) for field in schema}
    assert kinds["auxiliary"] == "string" and kinds["size"] == "int64" and kinds["loss"] == "double"
    assert kinds["psnr"].startswith("list<") and "double" in kinds["psnr"]
    assert all(field.metadata[b"meaning"].decode() == export.COLUMNS[field.name].meaning for field in schema)


def test_each_record_is_a_file_that_says_how_to_make_it_again(folder, tmp_path):
    export.write(folder, tmp_path / "out")
    row = json.loads((tmp_path / "out/one/a2.json").read_text())
    assert {name: row[name] for name in results.Record.__annotations__ if name in row} == expected(folder)["one", "a2"]
    assert row["remake"] == "gi run experiments/one.py --only a --out again"
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").glob("*/*")}
    assert found == {"one/a2.json", "one/b.json", "two/c.json"}


def test_the_dictionary_has_every_field_of_a_record(folder, tmp_path):
    export.write(folder, tmp_path / "out")
    written = pd.read_csv(tmp_path / "out/dictionary.csv", keep_default_na=False)
    assert written.to_dict("records") == export.dictionary()
    assert set(written["column"]) == {*results.Record.__annotations__, "study", "picture", "remake"}
    assert written["column"].is_unique and (written["meaning"].str.len() > 10).all()
    kinds = dict(zip(written["column"], written["type"], strict=True))
    assert kinds["psnr"] == "list of numbers or nulls, or null" and kinds["clients"] == "integer"
    assert kinds["curve"] == "record of lists, or null" and kinds["versions"] == "JSON"


def numbers(value):
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [] if value is None else [value]


def test_no_published_record_lies_outside_what_the_dictionary_says():
    """An SSIM of one may be a rounding error above it."""
    seen = 0
    for path in RESULTS.glob("*.jsonl"):
        for row in results.rows(path):
            for name, column in export.COLUMNS.items():
                value = row.get(name)
                if column.among:
                    assert value in column.among, (path.name, row["key"], name)
                if column.least is None and column.most is None:
                    continue
                least = -math.inf if column.least is None else column.least
                most = math.inf if column.most is None else column.most + 1e-9
                assert all(least <= v <= most for v in numbers(value)), (path.name, row["key"], name)
            seen += 1
    assert seen


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_command_of_each_published_record_names_a_case_of_its_study(path):
    assert export.REMAKE.startswith("gi run experiments/{study}.py --only {case} ")
    cases, _ = load_study(RESULTS.parent / "experiments" / f"{path.stem}.py")
    known = {identity(case) for case in cases}
    assert [row["key"] for row in results.rows(path) if row["case"] not in known] == []


def test_a_folder_without_records_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no records in"):
        export.write(tmp_path, tmp_path / "out")
