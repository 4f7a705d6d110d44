"""Records: one flat JSON row for each case that ran, in `results/<study>.jsonl`, with its picture beside it.

A file is appended to, under a lock, one line in one write. Where a case occurs more than once, its last line counts,
and is the only one that a run leaves when it ends. Every row that is written or read is validated.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from gi_lib.results.pictures import bitmap, picture_path, pictured, read_picture, write_picture
from gi_lib.results.summary import bootstrap, first_identified, plateau, summarise, usual_groups

if TYPE_CHECKING:
    import pandas as pd
    from filelock import BaseFileLock
    from pydantic import TypeAdapter

__all__ = [
    "Progress",
    "Record",
    "append",
    "append_row",
    "bitmap",
    "bootstrap",
    "by_key",
    "checked",
    "first_identified",
    "lock",
    "picture_path",
    "pictured",
    "plateau",
    "read",
    "read_picture",
    "rows",
    "study",
    "summarise",
    "usual_groups",
    "write_picture",
]


class Progress(TypedDict):
    """A run scored at its snapshots, each an entry: what the attack would have returned had it been stopped there.

    Snapshots lie between steps. One of L-BFGS has many gradient evaluations, so that its curve has few entries.
    """

    evaluations: list[int]
    """Gradient evaluations so far, all restarts together."""
    seconds: list[float]
    """In the unit of `cpu_seconds`."""
    psnr: list[list[float | None]]
    """For each snapshot one value an image, in the order of `indices`; null where it had diverged."""
    identified: list[list[bool]]


class Record(TypedDict):
    """The row of one case. What a failed case has not come to is null."""

    key: str
    """Hash of the case's text, 12 hexadecimal digits."""
    case: str
    """The same without revisions: of rows of one case, made by different revisions, the last counts."""
    status: str
    """"ok", "failed", or "not applicable": the attack can't be run on this model or batch."""
    error: str | None
    """Type and message of what made it fail, or why it does not apply."""
    attack: str
    """Its name in ATTACKS."""
    attack_text: str
    """The attack with those hyperparameters that are not at their default."""
    model: str
    weights: str | None
    """Name in WEIGHTS, "trained", or name@hash of a checkpoint, or null for an untrained model."""
    checkpoint: NotRequired[str | None]
    """name@hash of the trained weights of our own that were used; older records lack it."""
    dataset: str
    split: str
    size: int | None
    """Side of the images in pixels, where it was asked for."""
    indices: list[int]
    data_hash: str | None
    """Hash of the images and labels that were attacked."""
    seed: int
    threat: str
    threat_letter: str
    defense: str | None
    client: str
    train: bool
    """Whether the model was in train mode."""
    clients: int
    """Clients of which the attacker sees the mean."""
    rounds: int
    """Rounds on the same data that the attacker sees."""
    auxiliary: str | None
    """The dataset whose train split the attacker has."""
    profile: str
    batch_size: int
    psnr: list[float | None] | None
    """One value an image, in the order of `indices`, null for one that was missed; so are the next five."""
    floor: list[float] | None
    """PSNR of the image's own mean colour."""
    ssim: list[float | None] | None
    lpips: list[float | None] | None
    """Null where LPIPS could not be had; `gi score` fills it in."""
    mse: list[float | None] | None
    identified: list[bool] | None
    """Whether the true image is the nearest to its reconstruction, among up to 500 of its split."""
    chance: float | None
    """How often one picture of nothing identifies: one over the number of those candidates. Of several returned ones:
    `metrics.chance`, which tables and verdicts show."""
    returned: int | None
    """Images that the attack returned."""
    recall: float | None
    """Share of the private images whose reconstruction is 6 dB or more above the floor."""
    image_precision: float | None
    """Share of the returned images that recover one so."""
    label_accuracy: float | None
    loss: float | None
    """Matching loss at the returned images."""
    restart_losses: list[float | None] | None
    """Loss of every restart at its end; null where it was not finite. Before version 0.2: before its last step."""
    curve: Progress | None
    notes: dict[str, Any] | None
    """What the attack says besides: a certificate, a layer that was chosen."""
    seconds: float | None
    """Wall time of the attack, failed or not."""
    cpu_seconds: float | None
    """The processor's time for the attack, on a GPU wall time; null in records before version 0.2."""
    steps: int | None
    """Steps that were taken."""
    budget: int | None
    """Steps that were allowed; null for an attack that takes none."""
    restarts: int
    gradient_evaluations: int | None
    training_step_seconds: float | None
    """One forward and backward pass of the same model and batch, the mean of medians before and after the attack, in
    the unit of `cpu_seconds`; in records before version 0.2 the wall time after it."""
    training_steps: float | None
    """The cost of the attack in training steps: cpu_seconds / training_step_seconds."""
    evaluation_training_steps: float | None
    """The same for one iteration of one restart: training_steps / gradient_evaluations."""
    peak_memory_mb: float | None
    """On a GPU of this attack; on a CPU the high-water mark of the process so far."""
    device: str
    precision: str
    versions: dict[str, str]
    commit: str | None
    """"g" and the short git hash of the code, with a "+" where the package had uncommitted changes; null outside
    git."""
    started: str
    """UTC, ISO 8601."""


_ORIGIN = "`gi run experiments/NAME.py` writes results/NAME.jsonl"
_ONE_AN_IMAGE = ("psnr", "floor", "ssim", "lpips", "mse", "identified")


@functools.cache
def _validator() -> TypeAdapter[Record]:
    import pydantic

    strict = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
    return pydantic.TypeAdapter(pydantic.with_config(strict)(Record))


def checked(row: Record) -> Record:
    """The row, if it is a whole record.

    Raises:
        ValueError: a field is missing, unknown, or not of its type, or a list has not one entry an image.
    """
    import pydantic

    try:
        row = _validator().validate_python(row)
    except pydantic.ValidationError as error:
        raise ValueError(_said(error)) from error
    _check_lengths(row)
    return row


def _said(error: Any) -> str:
    problems = error.errors(include_url=False, include_input=False)
    told = [f"{'.'.join(map(str, p['loc'])) or 'row'}: {p['msg']}" for p in problems[:3]]
    return "; ".join([*told, *([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])])


def _check_lengths(row: Record) -> None:
    images = len(row["indices"])
    if row["batch_size"] != images:
        raise ValueError(f"batch_size: {row['batch_size']} for {images} indices")
    values: dict[str, Any] = dict(row)
    for name in _ONE_AN_IMAGE:
        if values[name] is not None and len(values[name]) != images:
            raise ValueError(f"{name}: {len(values[name])} values for {images} images")
    if row["status"] not in ("ok", "failed", "not applicable"):
        raise ValueError(f"status: {row['status']!r} is none of ok, failed, not applicable")
    if row["status"] == "ok" and row["psnr"] is None:
        raise ValueError("psnr: missing, and the status is ok")
    try:
        datetime.fromisoformat(row["started"])
    except ValueError as error:
        raise ValueError(f"started: {error}") from error
    if curve := row["curve"]:
        marks = len(curve["evaluations"])
        if {len(curve["seconds"]), len(curve["psnr"]), len(curve["identified"])} != {marks}:
            raise ValueError("curve: its lists have different lengths")
        if any(len(values) != images for values in curve["psnr"] + curve["identified"]):
            raise ValueError(f"curve: not {images} values for each snapshot")


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the file of records, or the right to run its study, against other processes.

    Args:
        path: of the lock; it stays, empty or with the name of its last holder.
        wait: until another lets go; else BlockingIOError, with who holds it.

    Raises:
        BlockingIOError: another process has it.
        OSError: it can't be written.
    """
    import filelock

    held: BaseFileLock = filelock.FileLock(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout as error:
        raise BlockingIOError(11, "another process holds it", str(path)) from error
    try:
        yield
    finally:
        held.release()


def append(path: Path, record: Record) -> None:
    """Add one line to a file of records, and wait until it is on the disk. Processes that append take turns.

    What an interrupted write left of a last line is cut off first; a whole line that only lacks its end gets one.
    If the line can't be written whole, nothing of it stays.

    Raises:
        OSError: the disk is full, or the file can't be written.
        ValueError: it is no whole record.
    """
    append_row(path, checked(record))


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """`append` for rows that are no records of cases; their file lies in a folder that `read` does not look into."""
    import json

    path = Path(path)
    line = (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(path.name + ".lock")), open(path, "a+b", buffering=0) as file:
        end = _end_of_whole_lines(file)
        file.seek(end)
        if _whole(file.read()):
            end = file.seek(0, os.SEEK_END)
            line = b"\n" + line
        file.truncate(end)
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(28, os.strerror(28), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def compact(path: Path) -> int:
    """Leave of each case its last line, which is the one that counts, so that other readers see what `rows` sees.

    Returns:
        How many lines went.

    Raises:
        OSError: the file can't be written.
        ValueError: a line is damaged.
    """
    import json

    path = Path(path)
    with lock(path.with_name(path.name + ".lock")):
        *lines, torn = path.read_bytes().split(b"\n")
        newest: dict[str, bytes] = {}
        for number, line in enumerate(lines, start=1):
            try:
                newest[json.loads(line)["case"]] = line + b"\n"
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: this line is not a record; restore the file") from error
        if len(newest) < len(lines):
            temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                with temporary.open("wb") as file:
                    file.write(b"".join(newest.values()) + torn)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return len(lines) - len(newest)


def _end_of_whole_lines(file: Any, block: int = 65536) -> int:
    """Bytes up to the end of the last whole line, read from the back."""
    at = file.seek(0, os.SEEK_END)
    while at > 0:
        start = max(0, at - block)
        file.seek(start)
        newline = file.read(at - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        at = start
    return 0


def _whole(line: bytes) -> bool:
    """Whether what stands behind the last line's end is a record that lacks only its own."""
    with suppress(ValueError):
        _check_lengths(_validator().validate_json(line))
        return True
    return False


def rows(path: Path) -> list[Record]:
    """The rows of one file, the last of each case, in the order in which the cases first came.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than a torn last one is no whole record.
    """
    import pydantic

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no records at {path}; {_ORIGIN}")
    newest: dict[str, Record] = {}
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and _whole(rest):
        lines.append(rest)
    elif rest:
        warnings.warn(
            f"{path}:{len(lines) + 1}: the last line is torn and left out; its case runs again with the next run",
            stacklevel=2,
        )
    for number, line in enumerate(lines, start=1):
        try:
            row = _validator().validate_json(line)
            _check_lengths(row)
        except ValueError as error:
            reason = _said(error) if isinstance(error, pydantic.ValidationError) else str(error)
            raise ValueError(
                f"{path}:{number}: this line is not a record ({reason}); restore the file, or delete the line"
            ) from error
        newest[row["case"]] = row
    return list(newest.values())


def by_key(path: Path) -> dict[str, Record]:
    """The rows of one file by their key; none where there is no file."""
    return {row["key"]: row for row in rows(path)} if Path(path).is_file() else {}


def read(path: Path) -> pd.DataFrame:
    """Records as a table: one row a case, the fields of Record and `study`, the file's name.

    Args:
        path: a file, or a folder of which every .jsonl is read.

    Raises:
        FileNotFoundError: there are no records at `path`.
        ValueError: a line is damaged.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no records in {path}; {_ORIGIN}")
    return _frame([{**row, "study": file.stem} for file in files for row in rows(file)])


def _frame(found: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(found, columns=[*Record.__annotations__, "study"])
    return frame.astype({"size": "Int64"})


def study(name: str, folder: Path = Path("../results")) -> pd.DataFrame:
    """The records of a study as `read` gives them; an empty table where it has not been run.

    Args:
        name: of its file in experiments/ and in `folder`, without the ending.
        folder: where the files of records are, by default as a chapter sees it.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of records; start in the folder `book`, or name it")
    path = Path(folder) / f"{name}.jsonl"
    return read(path) if path.exists() else _frame([])
