"""One case, from its data to its record."""

import contextlib
import dataclasses
import errno
import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gi_lib import checkpoints, data, metrics, models, provenance, training
from gi_lib.attacks import ATTACKS
from gi_lib.bench.cases import TRAINED, Case, identity, key, text
from gi_lib.bench.cost import peak_mb, reset_peak, training_step_seconds
from gi_lib.execution import clock
from gi_lib.federated import observe
from gi_lib.results import Progress, Record, checked
from gi_lib.types import Batch, Classifier, Images, NotApplicableError, Observation, Reconstruction, Scores

CANDIDATES = 500
"""Images of the split among which a reconstruction must find its original, to count as identified."""
SNAPSHOTS = 10
"""At how many numbers of gradient evaluations a run is scored."""
DONE = ("ok", "not applicable")
"""What a case is not run again with."""
LONG = 10.0
"""CPU seconds from which on a process keeps what it planted: the next case may differ in its batch alone."""
ATTACK_STREAM, CLIENT_STREAM, SERVER_STREAM = 1_000_000, 2_000_000, 3_000_000

Measured = tuple[Record, tuple[Images, Images] | None]
"""A record without the commit, and the true and reconstructed images."""


class AttackError(Exception):
    """What an attack raised, whatever it was: a failure of its case, and of nothing else."""

    spent: tuple[float, float] | None = None
    """Wall and processor seconds until then; None where the attack was not begun."""


def measure(case: Case, root: Path | None, device: str) -> Measured:
    """Run a case; a failure of any kind is its result.

    Raises:
        OSError: the disk is full, outside the attack.
    """
    try:
        record, picture = attempt(case, root, device)
        return checked(record), picture
    except AttackError as error:
        cause = error.__cause__ or error
        status = "not applicable" if isinstance(cause, NotApplicableError) else "failed"
        return failed(case, device, _said(cause), status, error.spent)
    except NotApplicableError as error:
        return failed(case, device, _said(error), "not applicable")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return failed(case, device, _said(error))


def failed(
    case: Case, device: str, reason: str, status: str = "failed", spent: tuple[float, float] | None = None
) -> Measured:
    """The record of a case that has come to nothing, after so many wall and processor seconds."""
    with _one_thread():
        record: Record = {**_begin(case, device), "status": status, "error": reason}
        if spent is not None and status == "failed":
            record["seconds"], record["cpu_seconds"] = spent
        return record, None


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".encode(errors="replace").decode()
    except Exception as inner:  # noqa: BLE001 # an exception of the user's own, whose text raises
        return f"{type(error).__name__}, whose text can't be had ({type(inner).__name__})"


def attempt(case: Case, root: Path | None, device: str) -> Measured:
    """`measure`, but a failure raises: AttackError where it is the attack's, with what it raised as its cause."""
    with _one_thread(), torch.random.fork_rng(devices=[]):
        record = _begin(case, device)
        dataset = data.load(case.dataset, split=case.split, size=case.size, root=root)
        batch = dataset.batch(case.indices)
        reference, _ = _checkpoint(case, root) or (None, None)
        fixed = dataclasses.replace(case, weights=reference or case.weights)  # against what is trained meanwhile
        model = network(fixed, dataset, root).to(device, torch.float64 if case.double else torch.float32)
        obs = _observed(case, model.train(case.train), dataset, batch, root)
        attack = _with_snapshots(case.attack)
        before = training_step_seconds(model, batch, device)
        reset_peak(device)
        wall, start = time.perf_counter(), clock(device)
        try:
            rec = _attacked(attack, obs, torch.Generator().manual_seed(case.seed + ATTACK_STREAM))
        except AttackError as error:
            error.spent = time.perf_counter() - wall, clock(device) - start
            raise
        cpu, seconds = clock(device) - start, time.perf_counter() - wall
        peak = peak_mb(device)
        step = (before + training_step_seconds(model, batch, device)) / 2
        most = _at_most(case.attack, obs, batch)
        if len(rec.images) > most:
            raise ValueError(
                f"the attack returned {len(rec.images)} images, and may return {most}: the best of many guesses"
                " flatters; declare more by `at_most`, or choose among them"
            )
        candidates = dataset.batch(range(min(len(dataset), CANDIDATES))).images
        scores = metrics.evaluate(rec, batch, candidates=candidates, root=root)
    found = _values(rec, scores, batch, candidates)
    found |= {
        "checkpoint": reference,
        "data_hash": dataset.hash(case.indices),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_memory_mb": peak,
        "training_step_seconds": step,
        "training_steps": cpu / step,
        "evaluation_training_steps": cpu / step / rec.gradient_evaluations if rec.gradient_evaluations else None,
    }
    return {**record, **found}, (batch.images, _shown(rec, scores))  # type: ignore[typeddict-item]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _observed(case: Case, model: Classifier, dataset: data.Dataset, batch: Batch, root: Path | None) -> Observation:
    auxiliary = None
    if case.auxiliary is not None:
        auxiliary = data.Surrogate(data.load(case.auxiliary, split="train", size=case.size, root=root))
    trapdoor, sent = None, model
    server = torch.Generator().manual_seed(case.seed + SERVER_STREAM)
    if hasattr(case.attack, "plant"):
        sent, trapdoor = _planted(case, model, dataset, auxiliary, server)
    parts = torch.arange(len(batch)).tensor_split(case.clients)
    batches = [Batch(batch.images[part], batch.labels[part]) for part in parts]
    rng = torch.Generator().manual_seed(case.seed + CLIENT_STREAM)
    earlier: list[Observation] = []
    for _ in range(case.rounds):
        threat = case.threat if earlier or case.rounds == 1 else dataclasses.replace(case.threat, many_rounds=False)
        obs = observe(
            sent if isinstance(sent, list) else [sent] * case.clients,
            batches,
            client=case.client,
            threat=threat,
            defense=case.defense,
            trapdoor=trapdoor,
            auxiliary=auxiliary,
            earlier=earlier,
            rng=rng,
        )
        earlier.append(obs)
        if hasattr(case.attack, "again"):  # such a server sends what it likes
            asked = _of_the_attack(case.attack.again, obs, server) if len(earlier) < case.rounds else None
            if asked is None:
                break
            sent, trapdoor = asked
            continue
        with torch.no_grad():
            for name, p in sent.named_parameters() if isinstance(sent, torch.nn.Module) else ():
                if case.rounds > 1 and p.requires_grad:
                    p.sub_(obs.gradient[name], alpha=case.client.lr)
    return obs


_kept: dict[str, Any] = {}
"""The last plant that took long, by all that it depends on."""


def _planted(
    case: Case, model: Classifier, dataset: data.Dataset, auxiliary: Any, server: torch.Generator
) -> tuple[Any, Any]:
    """The model or models that clients get, and the trapdoor."""
    granted = auxiliary if case.threat.has_auxiliary_data else None
    attack: Any = case.attack
    alone = not hasattr(attack, "again") and case.rounds == 1  # else more is drawn, or the model moves
    rests_on = key(dataclasses.replace(case, indices=(0,), clients=1)) + f" {model.mean.device}"
    if granted is not None:
        rests_on += f" {granted.hash}"
    if alone and rests_on in _kept:
        return _kept[rests_on]
    start = clock(str(model.mean.device))
    planted = _of_the_attack(attack.plant, model, dataset.image_shape, granted, server)
    if alone and clock(str(model.mean.device)) - start > LONG:
        _kept.clear()
        _kept[rests_on] = planted
    return planted


def _of_the_attack(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit, too
        raise AttackError from error


def _attacked(attack: Any, obs: Observation, rng: torch.Generator) -> Reconstruction:
    rec = _of_the_attack(attack, obs, rng)
    if not isinstance(rec, Reconstruction):
        raise AttackError from TypeError(f"an attack must return a Reconstruction, got {type(rec).__name__}")
    if rec.images.shape[1:] != torch.Size(obs.image_shape):
        raise AttackError from ValueError(
            f"the attack returned images {list(rec.images.shape[1:])}, the private ones are {list(obs.image_shape)}"
        )
    labels = None if rec.labels is None else rec.labels.cpu()
    return dataclasses.replace(rec, images=rec.images.detach().cpu(), labels=labels)


def _with_snapshots(attack: Any) -> Any:
    """An attack that can show its progress does, at its frames' number of steps or more."""
    if dataclasses.is_dataclass(attack) and getattr(attack, "frames", SNAPSHOTS) < SNAPSHOTS:
        return dataclasses.replace(attack, frames=SNAPSHOTS)  # type: ignore[type-var]
    return attack


def _at_most(attack: Any, obs: Observation, batch: Batch) -> int:
    declared = getattr(attack, "at_most", None)
    return declared(obs) if declared else max(len(batch), obs.batch_size or 0)  # a defense may have added images


def _numbers(values: Tensor | None) -> list[float | None] | None:
    """A list for a record: null for NaN and infinity."""
    if values is None:
        return None
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _values(rec: Reconstruction, scores: Scores, batch: Batch, candidates: Tensor) -> dict[str, Any]:
    assert scores.identified is not None
    found = {name: _numbers(getattr(scores, name)) for name in ("psnr", "floor", "ssim", "lpips", "mse")}
    return {
        **found,
        "identified": scores.identified.tolist(),
        "chance": 1 / len(candidates),
        "returned": scores.returned,
        "recall": scores.recall,
        "image_precision": scores.precision,
        "label_accuracy": scores.label_accuracy,
        "loss": rec.loss if math.isfinite(rec.loss) else None,
        "restart_losses": None if rec.losses is None else _numbers(rec.losses),
        "curve": _curve(rec, batch, candidates),
        "notes": _notes(rec.notes),
        "steps": rec.steps,
        "gradient_evaluations": rec.gradient_evaluations,
    }


def _curve(rec: Reconstruction, batch: Batch, candidates: Tensor) -> Progress | None:
    """The scores of the snapshots. The attack has ended: it sees nothing of them."""
    if rec.frames is None or len(rec.frame_evaluations) != len(rec.frames):
        return None
    psnr: list[list[float | None]] = []
    identified: list[list[bool]] = []
    for frame in rec.frames.cpu():
        if not torch.isfinite(frame).all():
            psnr.append([None] * len(batch))
            identified.append([False] * len(batch))
            continue
        matched = metrics.align(frame, batch.images)
        hit = matched >= 0
        values = torch.full((len(batch),), torch.nan, dtype=torch.float64)
        values[hit] = metrics.psnr(frame[matched[hit]], batch.images[hit])
        psnr.append(_numbers(values) or [])
        identified.append(metrics.found(frame, matched, batch.images, candidates).tolist())
    seconds = [round(float(s), 6) for s in rec.frame_seconds]
    return Progress(evaluations=list(rec.frame_evaluations), seconds=seconds, psnr=psnr, identified=identified)


def _notes(notes: dict[str, Any]) -> dict[str, Any] | None:
    plain = {str(name): value for name, value in notes.items() if isinstance(value, str | bool | int | float | None)}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()} or None


def _shown(rec: Reconstruction, scores: Scores) -> Images:
    """The reconstructions in the order of the truth; black where an image is missed."""
    shown = torch.zeros(len(scores.matched), *rec.images.shape[1:], dtype=rec.images.dtype)
    hit = scores.matched >= 0
    shown[hit] = rec.images[scores.matched[hit]]
    return shown


def network(case: Case, dataset: data.Dataset, root: Path | None) -> Classifier:
    """The model of a case: public weights with their own normalisation, or the dataset's, or what a library states.

    Raises:
        ValueError: the weights expect other images or classes than the dataset's, or another network.
        FileNotFoundError: the weights are not there.
    """
    if case.weights in models.WEIGHTS:
        entry = models.WEIGHTS[case.weights]
        if (entry.image_shape, entry.num_classes) != (dataset.image_shape, dataset.num_classes):
            raise ValueError(
                f"{case.weights!r} expects images {entry.image_shape} of {entry.num_classes} classes,"
                f" {case.dataset!r} has {dataset.image_shape} of {dataset.num_classes}"
            )
        return models.pretrained(case.weights, root=data.root(root))
    shape: dict[str, Any] = {"num_classes": dataset.num_classes, "image_shape": dataset.image_shape}
    if models.normalised(case.model):
        shape |= {"mean": dataset.mean, "std": dataset.std}
    model = models.build(case.model, **shape, seed=case.seed)
    if found := _checkpoint(case, root):
        reference, folder = found
        try:
            tensors = checkpoints.load(reference, folder)
            model.load_state_dict({name: value.to(model.mean.dtype) for name, value in tensors.items()})
        except RuntimeError as error:
            raise ValueError(
                f"{reference} holds another network than {case.model} on {case.dataset}: {error}; name the model that"
                f" it holds, or train this one by `python experiments/train.py {case.model} {case.dataset}`"
            ) from error
    return model


def _checkpoint(case: Case, root: Path | None) -> tuple[str, Path] | None:
    """name@hash of the weights of our own that a case names, and its folder; None where it names none."""
    if case.weights is None or case.weights in models.WEIGHTS:
        return None
    folders = (checkpoints.FOLDER, data.root(root) / checkpoints.FOLDER.name)
    if case.weights == TRAINED:
        return training.find(training.recipe(case.model, case.dataset), folders)
    there = (folder for folder in folders if (folder / f"{case.weights}.safetensors").is_file())
    return case.weights, next(there, folders[0])


_SAME = (
    *("model", "weights", "dataset", "split", "size", "seed", "train", "clients", "rounds", "auxiliary", "profile"),
)


def _begin(case: Case, device: str) -> Record:
    budget, restarts = (getattr(case.attack, name, None) for name in ("steps", "restarts"))
    values = {
        "key": key(case),
        "case": identity(case),
        "status": "ok",
        "attack": ATTACKS.name_of(type(case.attack)) or getattr(type(case.attack), "__name__", ""),
        "attack_text": text(case.attack, brief=True),
        "indices": list(case.indices),
        "threat": text(case.threat, brief=True),
        "threat_letter": case.threat.letter,
        "defense": None if case.defense is None else text(case.defense, brief=True),
        "client": str(case.client),
        "batch_size": len(case.indices),
        "budget": budget if isinstance(budget, int) else None,
        "restarts": restarts if isinstance(restarts, int) else 1,
        "device": provenance.device_name(device),
        "precision": "float64" if case.double else provenance.precision(device),
        "versions": provenance.versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    values |= {name: getattr(case, name) for name in _SAME}
    return {name: values.get(name) for name in Record.__annotations__}  # type: ignore[return-value]
