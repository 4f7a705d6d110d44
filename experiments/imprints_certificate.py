"""Is VGIA's certificate right? Each slab's verdict beside how many images it holds, which only the truth says.

An mlp, untrained and after 600 steps on CIFAR-10, with slabs in its first layer. Batches of test images: drawn at
random, of one class alone, and of images each beside its mirror image, which has the same brightness and label. One
row a batch goes to a file of its own, in a folder that `results.read` does not look into.

    python experiments/imprints_certificate.py [--batches 10]
"""

import argparse
import runpy
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch

from gi_lib import Batch, ThreatModel, data, metrics, observe, provenance, results
from gi_lib.attacks import VGIA
from gi_lib.models.planted import planted_rows

EXACT = 60.0
"""dB from which an image counts as exact."""
HERE = Path(__file__).parent


def batches(own: data.Dataset, number: int):
    """(kind, batch)."""
    rng = torch.Generator().manual_seed(number)
    order = torch.randperm(len(own), generator=rng).tolist()
    for size in (16, 64):
        yield f"random, {size}", own.batch(order[:size])
    labels = own.batch(order).labels
    yield "one class, 64", own.batch([order[i] for i in (labels == number % 10).nonzero().flatten()[:64].tolist()])
    half = own.batch(order[:32])
    yield "mirrored pairs, 64", Batch(torch.cat([half.images, half.images.flip(3)]), half.labels.repeat(2))


def judged(attack: VGIA, model, batch: Batch, surrogate: data.Surrogate, number: int) -> dict:
    """What the certificate says, and what is so."""
    rng = torch.Generator().manual_seed(number)
    sent, hook = attack.plant(model, tuple(batch.images.shape[1:]), surrogate, rng)
    threat = ThreatModel(malicious_server=True, has_auxiliary_data=True)
    obs = observe(sent, batch, threat=threat, trapdoor=hook, auxiliary=surrogate, rng=rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rec = attack(obs, rng)
    W, b = planted_rows(obs)
    z = ((batch.images - obs.model.mean) / obs.model.std).flatten(1)
    lit = (z @ W.T + b > 0)[:, : rec.notes["slabs"] * attack.families : attack.families]
    held = (lit.sum(1) - 1).bincount()
    matched = metrics.align(rec.images, batch.images)
    hit = matched >= 0
    exact = metrics.psnr(rec.images[matched[hit]], batch.images[hit]) > EXACT if hit.any() else torch.zeros(0)
    return {
        "slabs": rec.notes["slabs"],
        "lit": rec.notes["lit"],
        "alone": int((held == 1).sum()),
        "several": int((held > 1).sum()),
        "certified": rec.notes["single"],
        "exact": int(exact.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/accounts/imprints_certificate.jsonl"))
    parser.add_argument("--batches", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = runpy.run_path(str(HERE / "malicious_checks.py"))["trained"]
    own, train = data.load("cifar10"), data.load("cifar10", split="train")
    surrogate = data.Surrogate(train)
    for step, model in trained("mlp", train, 0):
        if step not in (0, 600):
            continue
        for number in range(given.batches):
            for kind, batch in batches(own, number):
                found = judged(VGIA(), model, batch, surrogate, number)
                made = {
                    "versions": provenance.versions(),
                    "commit": provenance.commit(),
                    "device": provenance.device_name("cpu"),
                    "started": datetime.now(UTC).isoformat(timespec="seconds"),
                }
                row = {"network": "mlp", "stage": step, "kind": kind, "number": number} | found
                results.append_row(given.out, row | made)
                print(row, flush=True)


if __name__ == "__main__":
    main()
