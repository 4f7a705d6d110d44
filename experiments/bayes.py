"""The Bayes-optimal attack (Balunovic et al., ICLR 2022): the noise's own law against mistaken ones, on MNIST.

The LeNet of DLG, untrained, another for each image, labels known; noise N(0, 0.1^2) or Laplace noise of scale 0.1 on
every entry. The attack runs with the law that the defense states and with two others in its place, among them the
cosine, all with one schedule of steps. Each chooses the weight of its prior, for each noise, on images of the train
split and other networks; then images of the test split are attacked, ten as in the paper and six more, since a
comparison needs sixteen pairs.

And three defenses without noise, each attacked as if it were not there, and by an attacker who knows it.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

from gi_lib import ThreatModel, results
from gi_lib.attacks import BayesOptimal, BiasRatio, InvertingGradients
from gi_lib.bench import Case, key
from gi_lib.defenses import ATS, PRECODE, Defense, GaussianNoise, LaplaceNoise, Soteria
from gi_lib.matching import Distance, cosine, l1, squared_l2

RECORDS = results.by_key(Path(__file__).parents[1] / "results" / "bayes.jsonl")
IMAGES, TUNED_ON = range(16), range(4)
KNOWN = ThreatModel(knows_defense=True, knows_labels=True)
SIGMA = 0.1
GAUSSIAN, LAPLACE = GaussianNoise(SIGMA), LaplaceNoise(SIGMA)

NATS = (300.0, 1000.0, 3000.0)
"""Weights of the prior beside a log-likelihood."""
WEIGHTS: dict[Distance | None, tuple[float, ...]] = {
    None: NATS,
    squared_l2: tuple(2 * SIGMA**2 * nats for nats in (1000.0, 3000.0, 10_000.0)),
    l1: tuple(SIGMA * nats for nats in NATS),
    cosine: (0.015, 0.045, 0.15),
}
"""What is tried for each distance, around its best. A mistaken law is no log-likelihood, nor is the cosine one."""
LAWS: tuple[tuple[Defense, tuple[Distance | None, ...]], ...] = (
    (GAUSSIAN, (None, l1, cosine)),
    (LAPLACE, (None, squared_l2, cosine)),
)
"""Each noise with the law of its own, which is None, and the mistaken ones."""


def settings(distance: Distance | None) -> list[BayesOptimal]:
    return [BayesOptimal(tv=tv, distance=distance) for tv in WEIGHTS[distance]]


def tuning(noise: Defense, attack: BayesOptimal) -> list[Case]:
    """The cases by which a weight is judged."""
    own = {"threat": KNOWN, "defense": noise, "split": "train", "profile": "survey"}
    return [Case(attack, "lenet", "mnist", (i,), seed=1000 + i, **own) for i in TUNED_ON]  # type: ignore[arg-type]


def chosen(noise: Defense, distance: Distance | None) -> BayesOptimal | None:
    """The weight with the most dB on the images of the tuning; None until all of it is run."""
    judged = {attack: [RECORDS.get(key(case)) for case in tuning(noise, attack)] for attack in settings(distance)}
    if not all(row and row["psnr"] for rows in judged.values() for row in rows):
        return None

    def merit(attack: BayesOptimal) -> float:
        return statistics.fmean(row["psnr"][0] for row in judged[attack] if row and row["psnr"])

    return max(judged, key=merit)


def compared() -> Iterator[Case]:
    """Image by image, so that pairs are whole from the beginning."""
    pairs = [(noise, chosen(noise, distance)) for noise, distances in LAWS for distance in distances]
    for i in IMAGES:
        for noise, attack in pairs:
            if attack:
                own = {"threat": KNOWN, "defense": noise, "profile": "survey"}
                yield Case(attack, "lenet", "mnist", (i,), seed=i, **own)  # type: ignore[arg-type]


PLAIN = BayesOptimal(distance=squared_l2, tv=2e-3)
"""As BayesOptimal() of an update without noise, with every parameter in the match."""
BREAKING = {  # what is attacked -> (attack, model, dataset, defense)
    "no defense, the LeNet": (BayesOptimal(), "lenet", "mnist", GaussianNoise(0)),
    "Soteria, as if it were not there": (PLAIN, "lenet", "mnist", Soteria()),
    "Soteria, its layer left out": (BayesOptimal(), "lenet", "mnist", Soteria()),
    "no defense, the dense network": (InvertingGradients(steps=150, tv=0.01), "mlp", "mnist", None),
    "PRECODE, the attacker's own draw": (InvertingGradients(steps=150, tv=0.01), "mlp", "mnist", PRECODE()),
    "PRECODE, the bias ratio": (BiasRatio(), "mlp", "mnist", PRECODE()),
    "no defense, the LeNet, colour": (InvertingGradients(steps=400, tv=0.01), "lenet", "cifar10", None),
    "ATS, 3-1-7": (InvertingGradients(steps=400, tv=0.01), "lenet", "cifar10", ATS(((3, 1, 7),))),
    "ATS, 43-18-18": (InvertingGradients(steps=400, tv=0.01), "lenet", "cifar10", ATS(((43, 18, 18),))),
}

TUNING = [
    case
    for noise, distances in LAWS
    for distance in distances
    for attack in settings(distance)
    for case in tuning(noise, attack)
]
COMPARED = list(compared())
BROKEN = {
    name: [
        Case(attack, model, dataset, (i,), seed=i, threat=KNOWN, defense=defense, profile="survey", stage=2)
        for i in range(8)
    ]
    for name, (attack, model, dataset, defense) in BREAKING.items()
}
CASES = [*TUNING, *COMPARED, *(case for cases in BROKEN.values() for case in cases)]
