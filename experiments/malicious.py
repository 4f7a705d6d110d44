"""A malicious server: fishing, LOKI and SEER.

Fishing takes one image out of batches of CIFAR-10: through an mlp exactly, by the bias ratio; through resnet18 by
Inverting Gradients, beside the same attack on the whole batch of an honest server, which is told the labels. In batches
of 16 the target's class occurs once, and 64 images are those of four clients, of whom the mean is seen, and the
target's class occurs several times. LOKI has ten clients of 64 images each, of whom the mean is seen.
SEER's network is trained once for batches of 16 and once for 64, and attacked on 20 batches of MNIST's test split.
"""

import torch

from gi_lib import Client, ThreatModel
from gi_lib.attacks import LOKI, SEER, Fishing, InvertingGradients
from gi_lib.bench import Case

SERVER = ThreatModel(malicious_server=True)
ROUNDS = ThreatModel(malicious_server=True, many_rounds=True)
OWN = ThreatModel(malicious_server=True, has_auxiliary_data=True)
PASSIVE = ThreatModel(knows_labels=True)
SINGLE = [(0, 6), (0, 3), (16, 4), (16, 9)]  # the first image of a batch of 16, and a class that occurs once in it
SHARED = [(0, 3), (64, 1)]  # the same of 64, in which it occurs several times
TUNED = {"lr": 0.3, "tv": 0.01}  # of experiments/tuning.py for one image; the batch takes the same


def batch(first: int, size: int) -> tuple[int, ...]:
    return tuple(range(first, first + size))


def passive(first: int, size: int, steps: int) -> Case:
    attack = InvertingGradients(steps=steps, **TUNED)
    clients = size // 16
    return Case(attack, "resnet18", "cifar10", batch(first, size), threat=PASSIVE, clients=clients, profile="survey")


def fished(model: str, first: int, size: int, attack: Fishing) -> Case:
    """In one round where the class occurs once, else in as many as it takes."""
    more = {"threat": SERVER} if size == 16 else {"threat": ROUNDS, "rounds": 12, "clients": size // 16}
    return Case(attack, model, "cifar10", batch(first, size), profile="survey", **more)


def loki(first: int, attack: LOKI, client: Client, seed: int = 0) -> Case:
    return Case(
        attack,
        "resnet20",
        "cifar10",
        batch(first, 640),
        seed=seed,
        threat=OWN,
        client=client,
        clients=10,
        auxiliary="cifar10",
        profile="survey",
    )


def seer(number: int, attack: SEER) -> Case:
    """On batch norm that has the batch's own statistics. All batches have one seed, and so one network."""
    drawn = torch.randperm(2000, generator=torch.Generator().manual_seed(number))[: attack.batch]
    return Case(
        attack,
        "cnn2_norm",
        "mnist",
        tuple(sorted(drawn.tolist())),
        size=16,
        threat=OWN,
        train=True,
        auxiliary="mnist",
        profile="survey",
    )


FOUR = Client(steps=4, lr=0.01, local_batch=16)
INNER = InvertingGradients(steps=300, frames=10, **TUNED)

EXACT = [
    *(fished("mlp", first, 16, Fishing(target=target)) for first, target in SINGLE),
    *(fished("mlp", first, 64, Fishing(target=target)) for first, target in SHARED),
]
DEEP = [
    *(fished("resnet18", first, 16, Fishing(target=target, attack=INNER)) for first, target in SINGLE),
    *(fished("resnet18", first, 64, Fishing(target=target, attack=INNER)) for first, target in SHARED),
]
HONEST = [  # an evaluation has 16 or 64 images, so that 30 cost more than 300 of fishing's one
    *(passive(first, 16, 30) for first in (0, 16)),
    *(passive(first, 16, 100) for first in (0, 16)),
    *(passive(0, 64, steps) for steps in (30, 100)),
]
AGGREGATED = [
    loki(0, LOKI(), FOUR),
    loki(640, LOKI(), FOUR, seed=1),
    loki(0, LOKI(), Client()),
    loki(0, LOKI(scale=1.0), FOUR),
]
HIDDEN = {
    16: [seer(number, SEER(batch=16, updates=700)) for number in range(20)],
    64: [seer(number, SEER(batch=64, updates=1200, batches=8)) for number in range(20)],
}
BRIGHTEST = {
    16: (6, 1, 9, 12, 1, 8, 8, 11, 13, 10, 13, 9, 1, 12, 14, 5, 7, 14, 10, 3),
    64: (22, 49, 55, 18, 5, 33, 55, 39, 36, 38, 48, 23, 51, 38, 41, 23, 47, 49, 50, 11),
}
"""The place of the brightest image in each batch of HIDDEN; a test asks the images for it."""
CASES = [*EXACT, *DEEP, *AGGREGATED, *HIDDEN[16], *HIDDEN[64], *HONEST]  # the cheap ones first
