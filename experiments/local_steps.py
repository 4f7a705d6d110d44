"""Clients of many local steps: one gradient in their place, SME's surrogate, and simulation with shared images and with
copies.

SME's CNN on MNIST and CIFAR-10, untrained, another for each client; labels and training details known, the order not.
Client i has images of its own and shuffles them each epoch, unless the part says otherwise.

epochs: N = 10 images, E = 5 epochs of batches of 5, a rate of .04. Dimitrov et al.'s one gradient, shared images and
copies, with the cosine, and with the settings of their script. SME, its curve, its baseline of one gradient, AGIC.
long: N = 50, E = 20, batches of 10, a rate of .004, which are SME's.
rate: the first clients again at rates from .001 to .3. rounds: three rounds on the same data.
steps: four images, from 1 to 50 steps, all images in each or two. clients: without shuffling, with momentum, with Adam.
networks: the LeNet and CNN6 on CIFAR-10.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gi_lib import Client, ThreatModel
from gi_lib.attacks import AGIC, SME, FedAvgEpochs, InvertingGradients
from gi_lib.bench import Case, key
from gi_lib.federated import SGD, Adam
from gi_lib.matching import cosine


@dataclass(frozen=True)
class Row:
    """What is compared: one attack on one kind of client, several clients of it."""

    part: str
    name: str
    setting: str
    cases: list[Case]


KNOWN = ThreatModel(knows_labels=True, knows_training_details=True)
ROUNDS = ThreatModel(knows_labels=True, knows_training_details=True, many_rounds=True)
ONE, SURROGATE, CURVE, UNION = "one gradient (SME, a = 0)", "SME", "SME on a curve", "AGIC"
NONE, SHARED, COPIES, NO_PRIOR = "one gradient x T", "shared images", "copies and prior", "copies, no prior"
UNROLLED = "unrolled Inverting Gradients"
OURS = {"steps": 200, "distance": cosine, "factor": (1000.0, 2000.0), "invariance": 10.0}
"""Of FedAvgEpochs with the cosine, chosen on two clients of the train split, with other networks, at 100 steps: factors
of 10 to 10,000 with an invariance of 10, then invariances of 1 to 1,000."""
SURROGATES = {
    SURROGATE: SME(steps=300),
    ONE: SME(steps=300, alpha=0.0, lr_a=0.0),
    UNION: AGIC(steps=300),
    CURVE: SME(steps=300, bend=0.01),
}
SIMULATIONS = {
    NONE: FedAvgEpochs(copies=0, **OURS),
    SHARED: FedAvgEpochs(copies=1, **OURS),
    COPIES: FedAvgEpochs(**OURS),
    NO_PRIOR: FedAvgEpochs(**(OURS | {"invariance": 0.0})),
}
SCRIPT = {
    f"{NONE}, script": FedAvgEpochs(copies=0),
    f"{SHARED}, script": FedAvgEpochs(copies=1),
    f"{COPIES}, script": FedAvgEpochs(),
}
EPOCHS = Client(steps=10, lr=0.04, local_batch=5, shuffle=True)
LONG = Client(steps=100, lr=0.004, local_batch=10, shuffle=True)
RATES = (0.001, 0.01, 0.04, 0.1, 0.3)
STEPS = (1, 2, 5, 10, 20, 50)
KINDS = {
    "in turn": Client(steps=10, lr=0.04, local_batch=5),
    "shuffled": EPOCHS,
    "momentum": Client(steps=10, lr=0.004, local_batch=5, shuffle=True, optimiser=SGD(momentum=0.9)),
    "Adam": Client(steps=10, lr=0.001, local_batch=5, shuffle=True, optimiser=Adam()),
}


def cases(
    attack, client: Client, images: int, clients: Iterable[int], stage: int, model="cnn2", dataset="mnist", **more
) -> list[Case]:
    own = {"threat": KNOWN, "client": client, "profile": "survey", "stage": stage} | more
    return [
        Case(attack, model, dataset, tuple(range(images * i, images * (i + 1))), seed=i, **own)  # type: ignore[arg-type]
        for i in clients
    ]


def both(early: int, late: int, split: int, attack, client: Client, images: int, clients: int, **more) -> list[Case]:
    """The first clients in one stage of the queue, the others in a later one."""
    first, rest = range(min(split, clients)), range(split, clients)
    return cases(attack, client, images, first, early, **more) + cases(attack, client, images, rest, late, **more)


PLAN = [
    *(Row("epochs", name, "", cases(a, EPOCHS, 10, range(10), 1)) for name, a in SURROGATES.items()),
    *(Row("epochs", name, "", both(2, 3, 4, a, EPOCHS, 10, 10)) for name, a in SIMULATIONS.items()),
    *(Row("epochs", name, "", cases(a, EPOCHS, 10, range(4), 5)) for name, a in SCRIPT.items()),
    *(
        Row("long", name, "", both(3, 4, 4, a, LONG, 50, 10))
        for name, a in SURROGATES.items()
        if name in (SURROGATE, ONE, CURVE)
    ),
    Row("long", SHARED, "", cases(FedAvgEpochs(copies=1, **OURS), LONG, 50, range(2), 8)),
]
for lr in RATES:
    client = Client(steps=10, lr=lr, local_batch=5, shuffle=True)
    for name in (UNION, ONE, SURROGATE):
        PLAN.append(Row("rate", name, f"{lr:g}", both(2, 4, 2, SURROGATES[name], client, 10, 6)))
for name in (SURROGATE, UNION):
    more = {"threat": ROUNDS, "rounds": 3}
    PLAN.append(Row("rounds", name, "3", both(3, 4, 4, SURROGATES[name], EPOCHS, 10, 10, **more)))
for local in (None, 2):
    for T in STEPS:
        client = Client(steps=T, lr=0.04, local_batch=local, shuffle=local is not None)
        said = f"{T}, {'all images' if local is None else 'two images'} a step"
        for name in (SURROGATE, ONE, UNION):
            PLAN.append(Row("steps", name, said, cases(SURROGATES[name], client, 4, range(4), 2)))
        late, clients = (3, 4) if T <= 5 else (5, 2)
        unrolled = {UNROLLED: InvertingGradients(steps=200, tv=1e-3), COPIES: SIMULATIONS[COPIES]}
        for name, attack in unrolled.items():
            if name == UNROLLED or local is None or T % 2 == 0:
                PLAN.append(Row("steps", name, said, cases(attack, client, 4, range(clients), late)))
for kind, client in KINDS.items():
    for name in (SURROGATE, ONE, UNION):
        PLAN.append(Row("clients", name, kind, cases(SURROGATES[name], client, 10, range(4), 2)))
    for name in (SHARED, COPIES):
        PLAN.append(Row("clients", name, kind, cases(SIMULATIONS[name], client, 10, range(4), 4)))
for model in ("lenet", "cnn6"):
    for name in (ONE, SURROGATE, SHARED, COPIES):
        attack = (SURROGATES | SIMULATIONS)[name]
        more = {"model": model, "dataset": "cifar10"}
        stage = 2 if name in SURROGATES else 6
        PLAN.append(Row("networks", name, model, cases(attack, EPOCHS, 10, range(4), stage, **more)))
latest_first = sorted((case for row in PLAN for case in row.cases), key=lambda case: -case.stage)
CASES = list({key(case): case for case in latest_first}.values())
