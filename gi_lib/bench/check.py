"""Whether the records of a study are what its cases give, without trust in what the records say of themselves.

Three things are asked. Each case has a record of the present revision, which says of the case what the case says. What
can be told from data and picture is told again for every record: hash, floor, chance, PSNR, identification. A sample
of cases is run again.

Seconds and memory depend on the machine and are compared with nothing. With the same versions on the same device a
rerun gives the same digits, and must. Elsewhere float32 is rounded otherwise, hundreds of steps enlarge that, and an
iterative attack may end elsewhere too: such a difference is told with the versions of both, and is settled by a rerun
with those of the record.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gi_lib import data, metrics, progress, provenance, results
from gi_lib.bench.cases import Case, identity, key
from gi_lib.bench.measure import CANDIDATES, DONE, failed, measure
from gi_lib.bench.plan import cell_name
from gi_lib.results import Record
from gi_lib.types import Batch, Images

LEVEL = 0.5 / 255
"""How far 8 bits move a pixel at most, and so the root of a mean square of pixels."""
EXACT = 20 * math.log10(255 * math.sqrt(12))
"""58.9 dB, the error of 8 bits: two runs that are both nearer to the truth are equally near."""
TOLERANCE = 0.5
"""dB between a record and its rerun."""
_DECLARED = (
    *("attack", "attack_text", "model", "weights", "dataset", "split", "size", "indices", "batch_size", "seed"),
    *("threat", "threat_letter", "client", "defense", "train", "clients", "rounds", "auxiliary", "budget"),
    "restarts",
)
"""What a record says that its case has said before it ran."""


@dataclass(frozen=True)
class Report:
    """What a check has found.

    Args:
        cases: of the study.
        present: those with a record of the present revision that is ok, or says that the attack does not apply.
        compared: records whose values were told again from data and picture.
        reruns: cases that were run again.
        identical: reruns that gave the same digits.
        problems: one line each; empty where nothing is wrong.
    """

    cases: int
    present: int
    compared: int
    reruns: int
    identical: int
    problems: tuple[str, ...]


def check(
    cases: Iterable[Case],
    out: Path,
    *,
    sample: int = 3,
    seed: int = 0,
    cheapest: bool = False,
    tolerance: float = TOLERANCE,
    root: Path | None = None,
    device: str | None = None,
) -> Report:
    """Compare the records of a study with its cases, its data, its pictures, and with a sample of reruns.

    Args:
        cases: of the study.
        out: results/<study>.jsonl; the pictures are in results/<study>/.
        sample: how many cases are run again, spread over the study's cells.
        seed: draws another sample.
        cheapest: take the cheapest case of each cell and the cheapest cells first, by the time in their records.
        tolerance: dB by which a rerun's PSNR may differ. It is 0 with the same versions on the same device.
        root: the data root; None as in `data.root`.
        device: of the reruns; None takes a GPU where there is one.

    Raises:
        FileNotFoundError: there are no records, or the data is not there.
        ValueError: a line of `out` is damaged, a number is out of range, or the device is not there.
    """
    if sample < 0 or not tolerance >= 0:
        raise ValueError(f"a check needs a sample and a tolerance >= 0, got {sample} and {tolerance}")
    device = provenance.choose_device(device)
    wanted = {identity(case): case for case in cases}
    rows = {row["case"]: row for row in results.rows(out)}
    problems = [*_missing(wanted, rows), *_strangers(wanted, rows)]
    done = {k: row for k, row in rows.items() if k in wanted and row["key"] == key(wanted[k])}
    done = {k: row for k, row in done.items() if row["status"] in DONE}
    honest = {}
    loaded: dict[tuple, tuple[data.Dataset, Images]] = {}
    compared = 0
    for k, row in progress.bar(done.items(), desc="records", unit="record"):
        found = _misdescribed(wanted[k], row)
        if not found and row["status"] == "ok":
            found = _untrue(row, results.picture_path(out, row["key"]), *_loaded(wanted[k], root, loaded))
            compared += 1
        problems += [_line(row, reason) for reason in found]
        if not found:
            honest[k] = row
    chosen = _sample({k: wanted[k] for k in honest}, honest, sample, seed, cheapest)
    identical = 0
    for k in progress.bar(chosen, desc="reruns", unit="case"):
        again, _ = measure(wanted[k], root, device)
        identical += all(again[name] == honest[k][name] for name in ("status", "psnr", "identified", "loss"))
        problems += [_line(honest[k], reason) for reason in _differences(honest[k], again, tolerance)]
    return Report(len(wanted), len(done), compared, len(chosen), identical, tuple(problems))


def _line(row: Record, reason: str) -> str:
    return f"{row['attack']} on {row['model']}, {row['dataset']} {row['indices']}, record {row['key']}: {reason}"


def _missing(wanted: Mapping[str, Case], rows: Mapping[str, Record]) -> list[str]:
    """One line for each cell and each way in which its cases have no record that counts."""
    counts: dict[tuple[str, str], int] = {}
    for k, case in wanted.items():
        if k not in rows:
            reason = "no record; `gi run` makes it"
        elif rows[k]["key"] != key(case):
            reason = "stale: another revision of the code made the record; `gi run` makes a new one"
        elif rows[k]["status"] not in DONE:
            reason = f"failed: {rows[k]['error']}"
        else:
            continue
        cell = (cell_name(case), reason)
        counts[cell] = counts.get(cell, 0) + 1
    return [f"{name}: {n} case{'s' if n > 1 else ''}: {reason}" for (name, reason), n in counts.items()]


def _strangers(wanted: Mapping[str, Case], rows: Mapping[str, Record]) -> list[str]:
    return [_line(row, "it is of no case of the study") for k, row in rows.items() if k not in wanted]


def _misdescribed(case: Case, row: Record) -> list[str]:
    """What the record says of its case, and tables are made of, that the case does not say."""
    said, true = dict[str, Any](row), dict[str, Any](failed(case, "cpu", "")[0])
    wrong = [f"it says {n}={said[n]!r}, its case {true[n]!r}" for n in _DECLARED if said[n] != true[n]]
    if (row["precision"] == "float64") != case.double:
        wrong.append(f"it says precision={row['precision']!r}, its case double={case.double}")
    return wrong


def _loaded(
    case: Case, root: Path | None, loaded: dict[tuple, tuple[data.Dataset, Images]]
) -> tuple[data.Dataset, Images]:
    """The case's dataset, and the images among which a reconstruction must find its own."""
    name = (case.dataset, case.split, case.size)
    if name not in loaded:
        dataset = data.load(case.dataset, split=case.split, size=case.size, root=root)
        loaded[name] = dataset, dataset.batch(range(min(len(dataset), CANDIDATES))).images
    return loaded[name]


def _untrue(row: Record, path: Path, dataset: data.Dataset, candidates: Images) -> list[str]:
    """What the record says and the data or the saved picture contradicts."""
    batch: Batch = dataset.batch(row["indices"])
    if row["data_hash"] != dataset.hash(row["indices"]):
        return [f"data_hash {row['data_hash']} is not that of these images, {dataset.hash(row['indices'])}"]
    if row["chance"] != 1 / len(candidates):
        return [f"chance {row['chance']} is {1 / len(candidates)}"]
    if not _near(row["floor"], metrics.floor(batch.images).tolist(), 0.01):
        return [f"floor {row['floor']} is not that of these images"]
    try:
        truth, images = results.read_picture(path, row["batch_size"])
        places = results.pictured(path, row["batch_size"])
    except (OSError, ValueError, RuntimeError):
        return [f"its picture {path} is missing or damaged"]
    private = batch.images[places]  # of a large batch some are pictured
    if truth.shape != private.shape or (truth - private).abs().max() > LEVEL:
        return [f"its picture {path} shows other private images than these"]
    found = []
    scores = row["psnr"] or [None] * row["batch_size"]
    for k, i in enumerate(places):
        if (psnr := scores[i]) is None:
            continue
        image, own = images[k : k + 1], _distance(images[k : k + 1], batch.images[i : i + 1])
        if abs(own - 10 ** (-psnr / 20)) > LEVEL + 1e-6:
            found.append(f"it says PSNR {psnr:.2f} dB, its picture has {-20 * math.log10(max(own, 1e-9)):.2f} dB")
        elif row["identified"] and row["identified"][i] and own > _distance(image, candidates) + 2 * LEVEL:
            found.append("it says identified, its picture is nearer to another image")
    return found


def _distance(image: Images, others: Images) -> float:
    """Root of the mean square of the difference to the nearest."""
    return float(metrics.mse(image.expand_as(others), others).amin().sqrt())


def _near(values: Any, others: Any, tolerance: float) -> bool:
    """Whether two lists agree; None agrees with None alone, and values beyond EXACT with one another."""
    if values is None or others is None or len(values) != len(others):
        return values is others
    pairs = zip(values, others, strict=True)
    return all(
        a is b if a is None or b is None else a == b or abs(min(a, EXACT) - min(b, EXACT)) <= tolerance
        for a, b in pairs
    )


def _sample(cases: Mapping[str, Case], rows: Mapping[str, Record], sample: int, seed: int, cheapest: bool) -> list[str]:
    """One case of each cell, then a second one of each, until there are enough; in an order that a hash draws."""

    def rank(name: str) -> tuple:
        seconds = rows[name]["seconds"]
        drawn = hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
        return (math.inf if seconds is None else seconds if cheapest else 0, drawn)

    cells: dict[str, list[str]] = {}
    for k in sorted(cases, key=rank):
        cells.setdefault(cell_name(cases[k]), []).append(k)
    turns = sorted((i, rank(k), k) for cell in cells.values() for i, k in enumerate(cell))
    return [k for _, _, k in turns[:sample]]


def _differences(row: Record, again: Record, tolerance: float) -> list[str]:
    if row["status"] != again["status"]:
        return [f"{row['status']}, and run again {again['status']}: {again['error']}"]
    if row["status"] != "ok":
        return []
    weights = [each.get("checkpoint") for each in (row, again)]
    if weights[0] != weights[1]:
        return [f"it was made with the weights {weights[0]}, and run again with {weights[1]}"]
    alike = _place(row) == _place(again)
    if row["identified"] == again["identified"] and _near(row["psnr"], again["psnr"], 0 if alike else tolerance):
        return []
    where = f"made with {_place(row)}, run again with {_place(again)}"
    return [
        f"{_outcome(row)}, and run again {_outcome(again)}; {'with the same versions and device' if alike else where}"
    ]


def _place(row: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{versions} on {row['device']}, {row['precision']}"


def _outcome(row: Record) -> str:
    decibels = ", ".join("missed" if value is None else f"{value:.2f}" for value in row["psnr"] or ())
    return f"PSNR {decibels} dB, identified {sum(row['identified'] or ())} of {row['batch_size']}"
