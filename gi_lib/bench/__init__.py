"""Case and run: one Record for each case, resumable, on any concurrent.futures executor.

Every case draws from three generators, so that no two of its parts see the same numbers: the model's weights
from `seed`, the attack from `seed` + ATTACK_STREAM, the client's defense from `seed` + CLIENT_STREAM.
"""

import contextlib
import dataclasses
import errno
import math
import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, as_completed
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from gi_lib import data, metrics, models, provenance, results
from gi_lib.attacks import ATTACKS
from gi_lib.bench.cases import PROFILES, Case, key, text
from gi_lib.bench.cost import peak_mb, reset_peak, training_step_seconds, wait
from gi_lib.bench.workers import pool
from gi_lib.federated import observe
from gi_lib.results import Record
from gi_lib.types import Images, NotApplicableError, Scores

__all__ = [
    "PROFILES",
    "Case",
    "attempt",
    "key",
    "measure",
    "network",
    "pool",
    "run",
    "score",
    "text",
]

CANDIDATES = 500
"""Images of the split among which a reconstruction must find its original, to count as identified."""
DONE = ("ok", "not applicable")
ATTACK_STREAM, CLIENT_STREAM = 1_000_000, 2_000_000


def run(
    cases: Iterable[Case],
    out: Path,
    *,
    executor: Executor | None = None,
    together: int = 1,
    root: Path | None = None,
    device: str | None = None,
) -> list[Record]:
    """Run what is missing of a study. Each finished case is on the disk before the next is counted.

    A case whose row in `out` is "ok" or "not applicable" is skipped; one whose row says "failed" is tried again. A case
    that fails becomes a row with its error. Ctrl-C leaves what is done and gives up the rest.

    Args:
        cases: those with equal keys are run once.
        out: results/<study>.jsonl; the pictures go to results/<study>/<key>.png.
        executor: where cases run, such as `pool(2)`; None runs them one after another in this process.
        together: cases of the same network that run as one stacked problem, at most, where the attack can
            (`many`). It is faster on small networks and on a GPU.
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
    todo = [case for k, case in wanted.items() if known.get(k, {}).get("status") not in DONE]
    device, commit = provenance.choose_device(device), provenance.commit()
    data.root(root)  # a data root that is not there fails now, not once a case
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc=out.stem, unit="case", disable=None)
    with bar, contextlib.closing(_measure_all(groups(todo, together), executor, root, device)) as finished:
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


def groups(cases: Sequence[Case], size: int) -> list[list[Case]]:
    """Cases that can run as one, up to `size` of them, in the order of the first of each group.

    They differ in their images alone, and not in the number of images.
    """
    alike: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        can = hasattr(case.attack, "many")
        same = text(dataclasses.replace(case, indices=(0,) * len(case.indices))) if can else key(case)
        alike.setdefault(same, []).append(i)
    together = [some[i : i + size] for some in alike.values() for i in range(0, len(some), size)]
    return [[cases[i] for i in some] for some in sorted(together)]


def _measure_all(
    groups: Sequence[Sequence[Case]], executor: Executor | None, root: Path | None, device: str
) -> Iterator[Measured]:
    if executor is None:
        for cases in groups:
            yield from measure(cases, root, device)
        return
    futures = [executor.submit(measure, cases, root, device) for cases in groups]
    broken = None
    try:
        for future in as_completed(futures):
            try:
                measured = future.result()
            except BrokenExecutor as error:
                broken = error  # and others may be done that come after this one
            else:
                yield from measured
    except pickle.PicklingError as error:
        raise ValueError(
            f"a case can't be sent to a worker process ({error}); define its attack in a module that can be"
            " imported, or use one worker"
        ) from error
    finally:
        for future in futures:
            future.cancel()
    if broken is not None:
        raise RuntimeError(
            "a worker process died, most often because memory ran out; what is done is kept. Run the study"
            " again with fewer workers to go on"
        ) from broken


def measure(cases: Sequence[Case], root: Path | None, device: str) -> list[Measured]:
    """Run cases that go together; where that fails, each alone, so that every failure is of one case.

    Returns:
        Their records, without the commit, and the true and reconstructed images.
    """
    try:
        return attempt(cases, root, device)
    except Exception as error:  # a failure of any kind is the result of its case
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        if len(cases) > 1:
            return [measured for case in cases for measured in measure([case], root, device)]
        status = "not applicable" if isinstance(error, NotApplicableError) else "failed"
        failed = {**_begin(cases[0], device), "status": status, "error": f"{type(error).__name__}: {error}"}
        return [(failed, None)]


def attempt(cases: Sequence[Case], root: Path | None, device: str) -> list[Measured]:
    """`measure`, but a failure raises what it raised."""
    first, records = cases[0], [_begin(case, device) for case in cases]
    dataset = data.load(first.dataset, split=first.split, size=first.size, root=root)
    batches = [dataset.batch(case.indices) for case in cases]
    model = network(first, dataset, root).to(device, torch.float64 if first.double else torch.float32)
    observations, rngs = [], []
    for case, batch in zip(cases, batches, strict=True):
        client = torch.Generator().manual_seed(case.seed + CLIENT_STREAM)
        setting = {"update": case.update, "threat": case.threat, "defense": case.defense}
        observations.append(observe(model, batch, **setting, rng=client))
        rngs.append(torch.Generator().manual_seed(case.seed + ATTACK_STREAM))
    reset_peak(device)
    start = time.perf_counter()
    if len(cases) == 1:
        found = [first.attack(observations[0], rngs[0])]
    else:
        found = first.attack.many(observations, rngs)  # type: ignore[attr-defined]
    wait(device)
    seconds, peak = (time.perf_counter() - start) / len(cases), peak_mb(device)
    step_seconds = training_step_seconds(model, batches[0], device)
    candidates = dataset.batch(range(min(len(dataset), CANDIDATES))).images
    measured = []
    for case, batch, rec, record in zip(cases, batches, found, records, strict=True):
        rec = dataclasses.replace(rec, images=rec.images.cpu(), labels=rec.labels.cpu())
        scores = metrics.evaluate(rec, batch, root=root)
        record |= {
            "data_hash": dataset.hash(case.indices),
            "together": len(cases),
            "seconds": seconds,
            "peak_memory_mb": peak,
            "training_step_seconds": step_seconds,
            "training_steps": seconds / step_seconds,
            **_scores(scores),
            "identified": metrics.identified(rec.images[scores.permutation], batch.images, candidates).tolist(),
            "loss": rec.loss if math.isfinite(rec.loss) else None,
            "restart_losses": [value if math.isfinite(value) else None for value in rec.trace[-1:].flatten().tolist()]
            or None,
            "steps": rec.steps,
            "gradient_evaluations": rec.gradient_evaluations,
            "evaluation_training_steps": seconds / step_seconds / rec.gradient_evaluations
            if rec.gradient_evaluations
            else None,
        }
        measured.append((record, (batch.images, rec.images[scores.permutation])))
    return measured


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
        "precision": "float64" if case.double else provenance.precision(device),
        "versions": provenance.versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    same = ("model", "weights", "dataset", "split", "size", "seed", "profile")
    values |= {name: getattr(case, name) for name in same}
    return {name: values.get(name) for name in Record.__annotations__}
