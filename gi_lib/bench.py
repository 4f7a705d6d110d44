"""Case and run: one Record for each case, resumable, on any concurrent.futures executor.

Every case draws from three generators, so that no two of its parts see the same numbers: the model's weights
from `seed`, the attack from `seed` + ATTACK_STREAM, the client's defense from `seed` + CLIENT_STREAM.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import math
import multiprocessing
import pickle
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from gi_lib import data, metrics, models, provenance, results
from gi_lib.attacks import ATTACKS
from gi_lib.defenses import Defense
from gi_lib.federated import ThreatModel, fedsgd, observe
from gi_lib.results import Record
from gi_lib.types import Batch, Images, LocalUpdate, Observation, Reconstruction, Scores, nearest

ATTACK_STREAM, CLIENT_STREAM = 1_000_000, 2_000_000

Attack = Callable[[Observation, torch.Generator], Reconstruction]


@dataclass(frozen=True)
class Profile:
    """How much a run may cost.

    Args:
        name: its key in PROFILES.
        images: images attacked for each cell of a table.
        restarts: starts of an attack, of which the one with the smallest loss counts.
        seeds: repetitions where the model is random.
        budget: fraction of the paper's steps.
    """

    name: str
    images: int
    restarts: int
    seeds: int
    budget: float

    def steps(self, paper: int) -> int:
        """The share of the paper's steps that this profile affords, at least one."""
        return max(1, round(self.budget * paper))


PROFILES = {
    "smoke": Profile("smoke", images=1, restarts=1, seeds=1, budget=0.01),
    "quick": Profile("quick", images=4, restarts=4, seeds=1, budget=0.1),
    "survey": Profile("survey", images=8, restarts=8, seeds=3, budget=1.0),
}


@dataclass(frozen=True)
class Case:
    """One attack on one batch.

    Args:
        attack: a frozen dataclass such as DLG(restarts=8).
        model: a key of models.MODELS.
        dataset: a key of data.DATASETS.
        indices: the images of the batch, by their index in the split.
        seed: of the model, the attack and the defense.
        weights: a key of models.WEIGHTS, or None for the untrained model.
        size: side of the images in pixels; None for the dataset's own.
        split: of the dataset.
        threat, update, defense: as in `observe`.
        profile: a key of PROFILES; it is written down, and changes nothing else of the case.

    Raises:
        ValueError: a name is unknown, the indices are empty, or the weights are another model's.
    """

    attack: Attack
    model: str
    dataset: str
    indices: tuple[int, ...]
    seed: int = 0
    weights: str | None = None
    size: int | None = None
    split: str = "test"
    threat: ThreatModel = ThreatModel()
    update: LocalUpdate = fedsgd
    defense: Defense | None = None
    profile: str = "quick"

    def __post_init__(self):
        names = ((self.model, models.MODELS, "model"), (self.dataset, data.DATASETS, "dataset"))
        for name, known, kind in (*names, (self.profile, PROFILES, "profile")):
            if name not in known:
                raise ValueError(nearest(name, known, kind))
        if self.weights is not None and self.weights not in models.WEIGHTS:
            raise ValueError(nearest(self.weights, models.WEIGHTS, "set of weights"))
        owner = self.model if self.weights is None else models.WEIGHTS[self.weights].model
        if owner != self.model:
            raise ValueError(f"the weights {self.weights!r} belong to {owner!r}, not to {self.model!r}")
        if not self.indices:
            raise ValueError("a case needs at least one index; an attack on an empty batch has no meaning")


def text(value: object, *, brief: bool = False) -> str:
    """A text that is the same in every process and on every machine, and differs where the value differs.

    Dataclasses are written with all their fields, functions by module and name. `brief` leaves out fields at
    their default and the module, for tables.

    Raises:
        ValueError: a part has no such text, as a lambda has none.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [
            f"{f.name}={text(getattr(value, f.name), brief=brief)}"
            for f in dataclasses.fields(value)
            if not (brief and getattr(value, f.name) == f.default)
        ]
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(text(v, brief=brief) for v in value) + "]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    name = getattr(value, "__qualname__", "<")
    if "<" in name:
        raise ValueError(
            f"{value!r} has no stable text, so that its case has no key; use a named function at the top of a"
            " module, or a dataclass"
        )
    return name if brief else f"{value.__module__}.{name}"


def key(case: Case) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the case's text."""
    return hashlib.sha256(text(case).encode()).hexdigest()[:12]


def run(
    cases: Iterable[Case],
    out: Path,
    *,
    executor: Executor | None = None,
    root: Path | None = None,
    device: str | None = None,
) -> list[Record]:
    """Run what is missing of a study. Each finished case is on the disk before the next is counted.

    A case whose key has an "ok" row in `out` is skipped; one whose row says "failed" is tried again. A case
    that fails becomes a row with its error. Ctrl-C leaves what is done and gives up the rest.

    Args:
        cases: those with equal keys are run once.
        out: results/<study>.jsonl; the pictures go to results/<study>/<key>.png.
        executor: where cases run, such as `pool(2)`; None runs them one after another in this process.
        root: the data root; None as in `data.root`.
        device: None takes a GPU where there is one.

    Returns:
        The rows of all the cases, in the order of `cases`.

    Raises:
        OSError: the disk is full, or `out` can't be written. What is done stays.
        RuntimeError: a worker process died.
        ValueError: the device is not there, a line of `out` is damaged, or a case can't go to a process.
        FileNotFoundError: the data root is not there.
    """
    out = Path(out)
    wanted = {key(case): case for case in cases}
    known = {row["key"]: row for row in results.rows(out)} if out.exists() else {}
    todo = [case for k, case in wanted.items() if known.get(k, {}).get("status") != "ok"]
    device, commit = provenance.choose_device(device), provenance.commit()
    data.root(root)  # a data root that is not there fails now, not once a case
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc=out.stem, unit="case", disable=None)
    with bar, contextlib.closing(_measure_all(todo, executor, root, device)) as finished:
        for record, picture in finished:
            record["commit"] = commit
            try:
                if picture is not None:
                    results.write_picture(results.picture_path(out, record["key"]), *picture)
                results.append(out, record)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror}: a record could not be written; {bar.n} of {len(wanted)} cases are"
                    " done and kept. Make room, and run the study again to go on",
                    str(out),
                ) from error
            known[record["key"]] = record
            bar.update()
    return [known[k] for k in wanted]


Measured = tuple[Record, tuple[Images, Images] | None]


def _measure_all(
    cases: Sequence[Case], executor: Executor | None, root: Path | None, device: str
) -> Iterator[Measured]:
    if executor is None:
        for case in cases:
            yield measure(case, root, device)
        return
    futures = [executor.submit(measure, case, root, device) for case in cases]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenExecutor as error:
        raise RuntimeError(
            "a worker process died, most often because memory ran out; what is done is kept. Run the study"
            " again with fewer workers to go on"
        ) from error
    except pickle.PicklingError as error:
        raise ValueError(
            f"a case can't be sent to a worker process ({error}); define its attack in a module that can be"
            " imported, or use one worker"
        ) from error
    finally:
        for future in futures:
            future.cancel()


def measure(case: Case, root: Path | None, device: str) -> Measured:
    """Run one case. Returns its record, without the commit, and the true and reconstructed images."""
    try:
        return attempt(case, root, device)
    except Exception as error:  # a failure of any kind is the result of its case
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        return {**_begin(case, device), "status": "failed", "error": f"{type(error).__name__}: {error}"}, None


def attempt(case: Case, root: Path | None, device: str) -> Measured:
    """`measure`, but a failure raises what it raised."""
    record = _begin(case, device)
    dataset = data.load(case.dataset, split=case.split, size=case.size, root=root)
    batch = dataset.batch(case.indices)
    record["data_hash"] = dataset.hash(case.indices)
    model = network(case, dataset, root).to(device)
    client = torch.Generator().manual_seed(case.seed + CLIENT_STREAM)
    attacker = torch.Generator().manual_seed(case.seed + ATTACK_STREAM)
    obs = observe(model, batch, update=case.update, threat=case.threat, defense=case.defense, rng=client)
    _reset_peak(device)
    start = time.perf_counter()
    rec = case.attack(obs, attacker)
    _wait(device)
    record["seconds"] = time.perf_counter() - start
    record["peak_memory_mb"] = _peak_mb(device)
    record["training_step_seconds"] = training_step_seconds(model, batch, device)
    record["training_steps"] = record["seconds"] / record["training_step_seconds"]
    rec = dataclasses.replace(rec, images=rec.images.cpu(), labels=rec.labels.cpu())
    scores = metrics.evaluate(rec, batch, root=root)
    record |= _scores(scores)
    record["loss"] = rec.loss if math.isfinite(rec.loss) else None
    record["restart_losses"] = [value if math.isfinite(value) else None for value in rec.trace[-1].tolist()]
    record["steps"], record["gradient_evaluations"] = rec.steps, rec.gradient_evaluations
    return record, (batch.images, rec.images[scores.permutation])


def _scores(scores: Scores) -> dict:
    names = ("psnr", "ssim", "lpips", "mse")
    found = {name: getattr(scores, name) for name in names}
    lists = {name: None if values is None else values.tolist() for name, values in found.items()}
    return {**lists, "label_accuracy": float(scores.label_accuracy)}


def network(case: Case, dataset: data.Dataset, root: Path | None) -> models.Classifier:
    """The model of a case: public weights with their own normalisation, or untrained with the dataset's.

    Raises:
        ValueError: the weights expect other images or classes than the dataset's.
    """
    if case.weights is not None:
        entry = models.WEIGHTS[case.weights]
        if (entry.image_shape, entry.num_classes) != (dataset.image_shape, dataset.num_classes):
            raise ValueError(
                f"{case.weights!r} expects images {entry.image_shape} of {entry.num_classes} classes,"
                f" {case.dataset!r} has {dataset.image_shape} of {dataset.num_classes}"
            )
        return models.pretrained(case.weights, root=data.root(root))
    shape = {"num_classes": dataset.num_classes, "image_shape": dataset.image_shape, "seed": case.seed}
    if models.MODELS[case.model].normalised:
        return models.build(case.model, **shape, mean=dataset.mean, std=dataset.std)
    return models.build(case.model, **shape)


def training_step_seconds(model: nn.Module, batch: Batch, device: str, repeats: int = 10) -> float:
    """Median wall time of a forward and a backward pass of `model` on `batch`, after one to warm up."""
    images, labels = batch.images.to(device), batch.labels.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    seconds = []
    for _ in range(1 + repeats):
        _wait(device)
        start = time.perf_counter()
        torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), parameters)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def score(out: Path, root: Path | None = None) -> tuple[int, int]:
    """Fill in LPIPS where it is missing, from the saved 8-bit pictures, as new rows of the same keys.

    Returns:
        How many rows were filled in, and how many are still missing.
    """
    missing = [row for row in results.rows(out) if row["status"] == "ok" and row["lpips"] is None]
    for done, row in enumerate(tqdm(missing, desc="lpips", unit="case", disable=None)):
        truth, images = results.read_picture(results.picture_path(out, row["key"]), row["batch_size"])
        values = metrics.lpips(images, truth, root=root)
        if values is None:
            return done, len(missing) - done
        results.append(out, {**row, "lpips": values.tolist()})
    return len(missing), 0


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes for `run`, each with one thread; Ctrl-C ends them at once.

    They are started afresh (spawn), so that a script which calls this needs `if __name__ == "__main__":`.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            time.sleep(0.2)  # its thread drops the cancelled cases; on those a worker's end would be an error
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own is a semaphore, which a worker that is ended would leak
    sys.stderr = _NoTerminal(io.FileIO(2, "w", closefd=False), write_through=True)


class _NoTerminal(io.TextIOWrapper):
    """Standard error of a worker: its warnings are seen, its progress bars are not."""

    def isatty(self) -> bool:
        return False


def _begin(case: Case, device: str) -> Record:
    known = {cls: name for name, cls in ATTACKS.items()}
    values = {
        "key": key(case),
        "status": "ok",
        "attack": known.get(type(case.attack), getattr(type(case.attack), "__name__", "")),
        "attack_text": text(case.attack),
        "indices": list(case.indices),
        "threat": text(case.threat, brief=True),
        "threat_letter": case.threat.letter,
        "defense": None if case.defense is None else text(case.defense, brief=True),
        "update": text(case.update, brief=True),
        "batch_size": len(case.indices),
        "restarts": getattr(case.attack, "restarts", 1),
        "device": provenance.device_name(device),
        "precision": provenance.precision(device),
        "versions": provenance.versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    same = ("model", "weights", "dataset", "split", "size", "seed", "profile")
    values |= {name: getattr(case, name) for name in same}
    return {name: values.get(name) for name in Record.__annotations__}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_mb(device: str) -> float | None:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
