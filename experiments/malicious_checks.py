"""Which planted model passes which of a client's checks, and how often an honest one is refused?

An mlp and a LeNet-5, trained on CIFAR-10 by SGD with momentum, are looked at after 0, 20, 200 and 600 steps, from three
seeds; beside them a public ResNet-20. At each stage the checks of gi_lib.checks are asked of the honest model and of
what a server makes of it, on 32 test images, of which some class has one: an imprint, fishing's first round and its
cut, LOKI's model for one client, and, in the mlp's own layers, trap weights, QBI's rows for 32 images, mKOR, VGIA and
ARES.
One row a model goes to a file of its own, in a folder that `results.read` does not look into.

    python experiments/malicious_checks.py [--seeds 3]
"""

import argparse
import copy
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from gi_lib import Batch, ThreatModel, checks, data, models, observe, provenance, results
from gi_lib.attacks import ARES, LOKI, MKOR, QBI, VGIA, Fishing, RobbingTheFed, TrapWeights

STAGES = (0, 20, 200, 600)
SIZE = 32
MOST = 1e9
"""What stands for infinity in a record."""


def trained(name: str, own: data.Dataset, seed: int):
    """(steps, the model in eval mode) at each stage."""
    shape = {"num_classes": own.num_classes, "image_shape": own.image_shape}
    model, rng = models.build(name, seed=seed, **shape), torch.Generator().manual_seed(seed)
    descent = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(STAGES[-1] + 1):
        if step in STAGES:
            yield step, copy.deepcopy(model).eval()
        batch = own.batch(torch.randint(len(own), (64,), generator=rng).tolist())
        descent.zero_grad()
        F.cross_entropy(model(batch.images), batch.labels).backward()
        descent.step()


def planted(name: str, model, batch: Batch, surrogate: data.Surrogate, images: torch.Tensor, seed: int):
    """(plant, the model that a client gets)."""
    shape, rng = tuple(batch.images.shape[1:]), torch.Generator().manual_seed(seed)
    yield "imprint", RobbingTheFed().plant(model, shape, surrogate, rng)[0]
    counts = torch.bincount(batch.labels, minlength=model.num_classes).float()
    attack = Fishing(target=int((counts == 1).float().argmax()))
    sent, hook = attack.plant(model, shape, None, rng)
    yield "fishing, class", sent
    attack = Fishing(target=int(counts.argmax()))  # the most frequent one, which takes a second round
    sent, hook = attack.plant(model, shape, None, rng)
    obs = observe(sent, batch, threat=ThreatModel(malicious_server=True), trapdoor=hook, rng=rng)
    yield "fishing, cut", attack.again(obs, rng)[0]
    yield "LOKI", LOKI().plant(model, shape, surrogate, rng)[0][0]
    if name == "mlp":
        yield "trap weights", TrapWeights().plant(model, shape, None, rng)[0]
        mean, std = images.mean().item(), images.std().item()
        yield "QBI", QBI(batch=SIZE, mean=mean, std=std).plant(model, shape, None, rng)[0]
        yield "mKOR", MKOR().plant(model, shape, None, rng)[0]
        yield "VGIA", VGIA().plant(model, shape, surrogate, rng)[0]
        yield "ARES", ARES().plant(model, shape, surrogate, rng)[0]


def row(network: str, stage, seed: int, plant: str, model, batch: Batch) -> dict:
    values = {f.check: min(f.value, MOST) for f in checks.received(model, batch).findings}
    return {"network": network, "stage": stage, "seed": seed, "plant": plant, "batch": len(batch), "values": values}


def with_a_rare_class(own: data.Dataset, first: int):
    """Batches in a row in which some class occurs once."""
    while True:
        batch, first = own.batch(range(first, first + SIZE)), first + SIZE
        if (torch.bincount(batch.labels) == 1).any():
            yield batch


def rows(seeds: int):
    own, train = data.load("cifar10"), data.load("cifar10", split="train")
    surrogate, images = data.Surrogate(train), train.batch(range(2000)).images
    for seed in range(seeds):
        batches = list(islice(with_a_rare_class(own, 200 * seed), 4))
        for name in ("lenet5", "mlp"):
            for step, model in trained(name, train, seed):
                for batch in batches[:2]:
                    yield row(name, step, seed, "honest", model, batch)
                for plant, sent in planted(name, model, batches[0], surrogate, images, seed):
                    yield row(name, step, seed, plant, sent, batches[0])
        public = models.pretrained("cifar10_resnet20", root=data.root(None))
        for batch in batches:
            yield row("resnet20", "public weights", seed, "honest", public, batch)
        for plant, sent in planted("resnet20", public, batches[0], surrogate, images, seed):
            yield row("resnet20", "public weights", seed, plant, sent, batches[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/accounts/malicious_checks.jsonl"))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for found in rows(given.seeds):
        made = {
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "device": provenance.device_name("cpu"),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        results.append_row(given.out, found | made)
        said = {name: float(f"{value:.3g}") for name, value in found["values"].items()}
        print(found["network"], found["stage"], found["seed"], found["plant"], said, flush=True)


if __name__ == "__main__":
    main()
