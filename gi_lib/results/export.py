"""All records as files for other tools: Parquet and CSV with a data dictionary, and each record alone as JSON."""

from __future__ import annotations

import csv
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict

from gi_lib.metrics import PSNR_CAP
from gi_lib.results import Record, picture_path, rows

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """What a field of a record means.

    Args:
        meaning: a sentence or two.
        unit: of its numbers.
        least, most: of its numbers, where there is such a bound.
        among: the values of a text, where these are all.
    """

    meaning: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    among: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """The bounds or the values as a text."""
        if self.among:
            return ", ".join(self.among)
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        return "" if self.least is None else f"{self.least:g} or more"


_ORDER = "One value an image, in the order of `indices`"
_STEP = "one forward and one backward pass of the same model on the same batch"

COLUMNS: dict[str, Column] = {
    "study": Column("The file that the record is from, results/STUDY.jsonl; experiments/STUDY.py made it."),
    "key": Column("Names the record within its study: a hash of the case and of the revisions of the code it used."),
    "case": Column("The same hash without revisions. Of several records of one case the last counts."),
    "status": Column(
        "Whether the attack returned an image, raised an error, or can't be run on this model or batch.",
        among=("ok", "failed", "not applicable"),
    ),
    "error": Column("What made it fail, or why it does not apply; null where the status is ok."),
    "attack": Column("The technique, by its name in `gi list attacks`."),
    "attack_text": Column("The technique with those settings that are not at their default."),
    "model": Column("The network, by its name in `gi list models`."),
    "weights": Column("Which trained weights it has: a published set, `trained`, or name@hash; null where untrained."),
    "checkpoint": Column("name@hash of the weights trained by this project that were used; null for all others."),
    "dataset": Column("The images' dataset, by its name in `gi list datasets`."),
    "split": Column("The part of the dataset. Settings are chosen on `train`.", among=("train", "test")),
    "size": Column("Side to which the images were scaled; null for the dataset's own size.", "pixels", 1),
    "indices": Column("The images of the batch, by their place in the split.", least=0),
    "data_hash": Column("Hash of the images and labels that were attacked."),
    "seed": Column("Of the model's weights, the attack and the clients.", least=0),
    "threat": Column("What the attacker knows beyond the update, as gi_lib.ThreatModel."),
    "threat_letter": Column(
        "The class of that threat model; the chapter on the inverse problem explains the letters.",
        among=tuple("ABCDEFG"),
    ),
    "defense": Column("What the client does to its update before it sends it; null for nothing."),
    "client": Column("How the client computes its update: one gradient (FedSGD), or local steps (FedAvg)."),
    "train": Column("Whether the client's model was in train mode."),
    "clients": Column("Clients whose mean update the attacker sees.", "clients", 1),
    "rounds": Column("Rounds on the same data that the attacker sees.", "rounds", 1),
    "auxiliary": Column("The dataset whose train split the attacker has; null for none."),
    "profile": Column("What the run was for.", among=("smoke", "quick", "survey")),
    "batch_size": Column("Images in the batch.", "images", 1),
    "psnr": Column(
        f"Peak signal-to-noise ratio, more is nearer; an exact copy has {PSNR_CAP:g}. {_ORDER}; null for an image that"
        " was missed.",
        "dB",
        0,
        PSNR_CAP,
    ),
    "floor": Column(f"PSNR of the image's own mean colour. {_ORDER}.", "dB", 0, PSNR_CAP),
    "ssim": Column(f"Structural similarity, more is nearer. {_ORDER}; null for an image that was missed.", "", -1, 1),
    "lpips": Column(
        f"Learned perceptual distance with AlexNet, less is nearer. {_ORDER}; null for an image that was missed, or"
        " where LPIPS was not to be had.",
        least=0,
    ),
    "mse": Column(f"Mean squared error. {_ORDER}; null for an image that was missed.", "of pixels from 0 to 1", 0, 1),
    "identified": Column(
        f"Whether the reconstruction is nearer to its image than to any other candidate of the split. {_ORDER}."
    ),
    "chance": Column(
        "How often one picture of nothing would be identified: one over the candidates. Of several returned pictures,"
        " at most as many times that; tables show it so.",
        "share",
        0,
        1,
    ),
    "returned": Column("Images that the attack returned.", "images", 0),
    "recall": Column("Private images that a reconstruction comes to 6 dB or more above the floor.", "share", 0, 1),
    "image_precision": Column("Returned images that recover a private one so.", "share", 0, 1),
    "label_accuracy": Column("Labels of the batch that came back right.", "share", 0, 1),
    "loss": Column("Matching loss at the returned images; its scale is the technique's own."),
    "restart_losses": Column("Matching loss of each start at its end; null where it was not finite."),
    "curve": Column(
        "The run scored at snapshots: evaluations (gradient evaluations so far), seconds, and for each snapshot psnr"
        " (dB) and identified, one value an image; null for a technique that does not iterate."
    ),
    "notes": Column("What the technique says besides, as JSON; null for nothing."),
    "seconds": Column("Wall time of the attack, failed or not.", "seconds", 0),
    "cpu_seconds": Column("The processor's time for the attack, failed or not; on a GPU its wall time.", "seconds", 0),
    "steps": Column("Steps that were taken.", "steps", 0),
    "budget": Column("Steps that were allowed; null for a technique that takes none.", "steps", 0),
    "restarts": Column("Starts, of which the one with the least loss is returned.", "starts", 1),
    "gradient_evaluations": Column(
        "Guesses of which the attack computed the update, all steps and rounds at once.", "evaluations", 0
    ),
    "training_step_seconds": Column(f"Time of {_STEP}, in the unit of `cpu_seconds`.", "seconds", 0),
    "training_steps": Column(f"The attack's cost: cpu_seconds over the time of {_STEP}.", "training steps", 0),
    "evaluation_training_steps": Column("The same for one gradient evaluation.", "training steps", 0),
    "peak_memory_mb": Column("On a GPU of this attack; on a CPU of the process so far.", "MiB", 0),
    "device": Column("The processor, and its threads."),
    "precision": Column("The arithmetic of clients and attacker."),
    "versions": Column("Of Python and the packages, as JSON."),
    "commit": Column("The code's git hash after a g, with a + where it had uncommitted changes; null outside git."),
    "started": Column("When the attack began: UTC, ISO 8601."),
    "picture": Column("results/STUDY/KEY.png: the private images above the reconstructed ones; null where none is."),
    "remake": Column("The command that computes the record again, in a checkout of this project, with today's code."),
}
"""Every column of the files, in their order: the fields of a record, its study, its picture, and its command."""

REMAKE = "gi run experiments/{study}.py --only {case} --out again"
"""The command that computes a record again; its fields are those of the record."""

TABLES = ("records.parquet", "records.csv", "dictionary.csv")


def write(folder: Path, out: Path) -> int:
    """Write TABLES, and STUDY/KEY.json for each record, into `out`; return how many records there are.

    Args:
        folder: of the studies' .jsonl files and pictures.
        out: a folder, which is made.

    Raises:
        FileNotFoundError: there are no records in `folder`.
        ValueError: a line is damaged.
        ImportError: pyarrow is missing.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet is written by pyarrow, which is missing; pip install pyarrow") from error
    out.mkdir(parents=True, exist_ok=True)
    found = list(_records(folder))
    if not found:
        raise FileNotFoundError(f"no records in {folder}: there is no .jsonl file with a line")
    for row in found:
        path = out / row["study"] / f"{row['key']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    pq.write_table(_arrow(found), out / "records.parquet", compression="zstd")
    _write_csv(out / "records.csv", list(COLUMNS), ([_cell(row[name]) for name in COLUMNS] for row in found))
    described = dictionary()
    _write_csv(out / "dictionary.csv", list(described[0]), (list(line.values()) for line in described))
    return len(found)


def dictionary() -> list[dict[str, str]]:
    """A line for each column of the files: its name, type, unit, range and meaning."""
    kinds = _kinds()
    return [
        {"column": name, "type": _said(kinds[name]), "unit": c.unit, "range": c.range, "meaning": c.meaning}
        for name, c in COLUMNS.items()
    ]


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(Path(folder).glob("*.jsonl")):
        for record in rows(file):
            row: dict[str, Any] = {"checkpoint": None, **record, "study": file.stem}
            path = picture_path(file, row["key"])
            row["picture"] = f"results/{file.stem}/{path.name}" if path.is_file() else None
            row["remake"] = REMAKE.format_map(row)
            yield {name: row[name] for name in COLUMNS}


def _kinds() -> dict[str, Any]:
    """The Python type of each column."""
    return {**get_type_hints(Record), "study": str, "picture": str | None, "remake": str}


def _plain(kind: Any) -> Any:
    """The type without its None."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _said(kind: Any) -> str:
    """The type as the dictionary has it."""
    plain = _plain(kind)
    if get_origin(plain) is list:
        part = get_args(plain)[0]
        text = f"list of {_said(_plain(part))}s" + (" or nulls" if _plain(part) is not part else "")
    elif is_typeddict(plain):
        text = "record of lists"
    elif get_origin(plain) is dict:
        text = "JSON"
    else:
        text = {str: "text", int: "integer", float: "number", bool: "boolean"}[plain]
    return text if plain is kind else f"{text}, or null"


def _arrow(found: list[dict[str, Any]]) -> pa.Table:
    """The records with each column's type, so that a column of nulls or of whole numbers has the right one."""
    import pyarrow as pa

    basic = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

    def arrow(kind: Any) -> pa.DataType:
        plain = _plain(kind)
        if get_origin(plain) is list:
            return pa.list_(arrow(get_args(plain)[0]))
        if is_typeddict(plain):
            return pa.struct([(name, arrow(part)) for name, part in get_type_hints(plain).items()])
        return pa.string() if get_origin(plain) is dict else basic[plain]

    kinds = _kinds()
    told = {name: {"meaning": c.meaning, "unit": c.unit, "range": c.range} for name, c in COLUMNS.items()}
    schema = pa.schema([pa.field(name, arrow(kinds[name]), metadata=told[name]) for name in COLUMNS])
    as_json = [name for name in COLUMNS if get_origin(_plain(kinds[name])) is dict]
    lines = [row | {name: None if row[name] is None else _json(row[name]) for name in as_json} for row in found]
    return pa.Table.from_pylist(lines, schema=schema)


def _cell(value: Any) -> str:
    """A cell of the CSV: nothing for null, JSON for what is not a text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else _json(value)


def _json(value: Mapping | list | bool | float) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write_csv(path: Path, names: list[str], lines: Iterator[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows(lines)
