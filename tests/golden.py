"""What each attack, model, client and metric gives, so that a change of meaning can't go unnoticed.

    python tests/golden.py            # write all of tests/golden.json anew
    python tests/golden.py dlg        # of one entry

A change of these numbers asks for a higher `revision` of what gives them: the records' keys hold it.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from gi_lib import (
    Batch,
    Client,
    Reconstruction,
    ThreatModel,
    evaluate,
    federated,
    labels,
    metrics,
    models,
    observe,
    optimise,
)
from gi_lib.attacks import ATTACKS
from gi_lib.defenses import DEFENSES, DPSGD, GaussianNoise
from gi_lib.types import NotApplicableError

FILE = Path(__file__).with_name("golden.json")
SHAPE = (3, 12, 12)

SETTINGS = {  # attack -> (its settings, a model without exact zeros in its gradients, facts, auxiliary data)
    "agic": ({"steps": 5, "restarts": 2}, "lenet", {}),
    "ares": ({"bins": 8, "surrogates": 64, "iterations": 20}, "mlp", {"malicious_server": True}),
    "bayes": ({"steps": 5, "restarts": 2}, "lenet", {"knows_defense": True}),
    "bias_ratio": ({}, "mlp", {}),
    "bn_update": ({"steps": 5, "restarts": 2}, "resnet20", {"knows_buffers": True}),
    "cocktail": ({"iterations": 5}, "mlp", {}),
    "cocktail_features": ({"iterations": 5, "steps": 5}, "cnn2", {}),
    "copa": ({"iterations": 5}, "cnn6", {}),
    "cpl": ({"steps": 5, "max_iter": 2, "restarts": 2, "pattern": 5, "label": 0.5}, "lenet", {}),
    "dlg": ({"steps": 5, "max_iter": 2, "restarts": 2}, "lenet", {}),
    "fedleak": ({"steps": 5, "restarts": 2}, "lenet", {}),
    "fedavg_epochs": ({"steps": 5, "restarts": 2}, "lenet", {}),
    "e2egi": ({"steps": 6, "restarts": 2, "blocks": 2}, "resnet20", {"knows_bn_stats": True}),
    "fishing": ({}, "mlp", {"malicious_server": True}),
    "gradinversion": (
        {"steps": 5, "restarts": 2, "renew": 1, "group_start": 0.0},
        "resnet20",
        {"knows_bn_stats": True},
    ),
    "hf_gradinv": ({"steps": 5, "tv_start": 0.2, "bn_start": 0.4}, "resnet20", {}),
    "idlg": ({"steps": 5, "max_iter": 2, "restarts": 2}, "lenet", {}),
    "inverting_gradients": ({"steps": 5, "restarts": 2}, "lenet", {}),
    "rgap": ({}, "cnn6", {}),
    "loki": ({"clients": 1, "bins": 8, "surrogates": 64}, "lenet", {"malicious_server": True}),
    "mkor": ({}, "lenet", {"malicious_server": True}),
    "multiscale": ({"steps": 6, "stages": 3, "restarts": 2}, "lenet", {}),
    "practical_recipe": ({"steps": 5, "restarts": 2, "warm_up": 1}, "lenet", {}),
    "qbi": ({"rows": 40, "batch": 2}, "mlp", {"malicious_server": True}),
    "rconv": ({}, "lenet", {}),
    "robbing_the_fed": ({"bins": 8, "surrogates": 64}, "lenet", {"malicious_server": True}),
    "sapag": ({"steps": 5, "restarts": 2}, "lenet", {}),
    "seer": (
        {"updates": 5, "batch": 4, "batches": 2, "fit": 20, "surrogates": 64},
        "lenet",
        {"malicious_server": True},
    ),
    "sme": ({"steps": 5, "restarts": 2}, "lenet", {}),
    "trap_weights": ({"rows": 40}, "lenet", {"malicious_server": True}),
    "vgia": ({"slabs": 8, "surrogates": 64}, "lenet", {"malicious_server": True}),
    "spear": ({}, "mlp", {}),
    "spear_pp": ({}, "mlp", {}),
}


class Noise:
    hash = "noise"

    def draw(self, n, rng):
        return torch.rand(n, *SHAPE, generator=rng), torch.zeros(n, dtype=torch.int64)


class Everything(Noise):
    def draw(self, n, rng):
        return torch.rand(n, *SHAPE, generator=rng), torch.arange(n) % 5


def some(values, count=12):
    """A few of many numbers, evenly spaced, and their mean."""
    flat = values.detach().double().flatten()
    chosen = flat[torch.linspace(0, len(flat) - 1, min(count, len(flat))).long()]
    return [*chosen.tolist(), flat.mean().item()]


def batch(size=1):
    rng = torch.Generator().manual_seed(11)
    return Batch(torch.rand(size, *SHAPE, generator=rng, dtype=torch.float64), torch.arange(size))


def model_of(name, shape=SHAPE):
    return models.build(name, num_classes=5, image_shape=shape, seed=3, mean=0.4, std=0.3).double()


def of_attack(name):
    settings, model_name, facts = SETTINGS[name]
    attack, model, trapdoor = ATTACKS[name](**settings), model_of(model_name), None
    model.train("knows_buffers" in facts)
    if hasattr(attack, "plant"):
        model, trapdoor = attack.plant(model, SHAPE, Noise(), torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(0)
    defense = GaussianNoise(0.01) if "knows_defense" in facts else None
    obs = observe(model, batch(), threat=ThreatModel(**facts), defense=defense, trapdoor=trapdoor, rng=rng)
    rec = attack(obs, torch.Generator().manual_seed(5))
    trace = some(rec.trace) if rec.trace.numel() else []
    return {"revision": attack.revision, "values": some(rec.images) + trace}


def of_model(name):
    shape = (3, 32, 32)
    model = model_of(name, shape)
    weights = torch.cat([p.flatten() for p in model.parameters()])
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"revision": models.MODELS[name].revision, "values": some(weights) + some(model(x))}


def of_client():
    rule = DPSGD(clip=0.5, noise=0.0).on_client(Client()).rule
    clients = (Client(), Client(steps=3, lr=0.1, local_batch=1), Client(rule=rule))
    x = batch(2)
    sent = [client(model_of("lenet"), x.images, x.labels) for client in clients]
    return {
        "revision": federated.revision,
        "values": [v for g in sent for v in some(torch.cat([t.flatten() for t in g.values()]))],
    }


def of_defenses():
    x, values = batch(2), []
    for defense in (cls() for cls in DEFENSES.values()):
        obs = observe(model_of("lenet"), x, defense=defense, rng=torch.Generator().manual_seed(2))
        values += some(torch.cat([g.flatten() for g in obs.gradient.values()]))
    return {"revision": sum(cls.revision for cls in DEFENSES.values()), "values": values}


def of_labels():
    found = []
    for size, name in ((1, "lenet"), (1, "cnn6"), (3, "mlp")):
        found += labels.infer(observe(model_of(name), batch(size), rng=torch.Generator())).tolist()
    return {"revision": labels.revision, "values": [float(y) for y in found]}


def of_label_rules():
    """Every rule on one batch, some of whose labels repeat; what does not apply to it is left out."""
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    threat = ThreatModel(has_auxiliary_data=True)
    twice, values = Batch(x, torch.tensor([0, 1, 1, 3, 3, 3])), []
    obs = observe(model_of("mlp"), twice, threat=threat, auxiliary=Everything(), rng=torch.Generator())
    for rule in [*labels.RULES.values(), *labels.PRESENCE.values()]:
        with contextlib.suppress(NotApplicableError):
            values += [*rule(obs).double().tolist(), -1.0]
        if isinstance(rule, labels.CountRule):
            values += rule.raw(obs).tolist()
    revisions = [getattr(rule, "revision", 1) for rule in labels.RULES.values()]
    return {"revision": [labels.batch_revision, *revisions], "values": values}


def of_metrics():
    truth = batch(3)
    images = (truth.images + 0.1 * truth.images.flip(0)).clamp(0, 1)
    scores = evaluate(Reconstruction(images, truth.labels, 0.0), truth, download=False)
    values = [scores.psnr, scores.mse, scores.ssim, scores.floor, scores.recovered.double()]
    found = metrics.identified(images, truth.images, batch(5).images).double()
    return {"revision": metrics.revision, "values": [v for t in [*values, found] for v in t.tolist()]}


def of_solvers():
    start = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)

    def loss(x):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    methods = (optimise.lbfgs(1e-2), optimise.adam(0.1, drops=(0.5,)), optimise.adam(0.1, cosine=True, warm_up=2))
    ends = [optimise.minimise(loss, [start], optimiser=method, steps=5) for method in methods]
    return {"revision": optimise.revision, "values": [v for end in ends for v in some(end.variables[0])]}


ENTRIES = {
    **{name: lambda name=name: of_attack(name) for name in ATTACKS},
    **{f"model {name}": lambda name=name: of_model(name) for name in models.MODELS},
    "client": of_client,
    "defenses": of_defenses,
    "label rules": of_label_rules,
    "labels": of_labels,
    "metrics": of_metrics,
    "solvers": of_solvers,
}


def main():
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in sys.argv[1:] or ENTRIES:
        stored[name] = ENTRIES[name]()
    lines = [f"{json.dumps(name)}: {json.dumps(stored[name])}" for name in sorted(stored)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
