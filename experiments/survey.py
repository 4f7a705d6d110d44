"""The survey: every technique on eight untrained models and four datasets, one image a case.

Image i meets the networks drawn from seed i, and the attack starts from seed i: the spread over a cell's images is a
spread over draws too. ImageNet's photographs are taken at 64 x 64 pixels. Labels are sought, not known. Budgets come in
rungs of gradient evaluations (gi_lib.bench.protocol). "default" is the paper's setting, "tuned" what the study `tuning`
has chosen; a cell that is not tuned yet has no cases so far.
"""

from dataclasses import dataclass
from pathlib import Path

from gi_lib import results
from gi_lib.attacks import (
    CPL,
    DLG,
    E2EGI,
    IDLG,
    RGAP,
    SAPAG,
    BiasRatio,
    FedLeak,
    GradInversion,
    HFGradInv,
    InvertingGradients,
    PracticalRecipe,
)
from gi_lib.bench import Case, protocol


@dataclass(frozen=True)
class Cell:
    """What the survey wants of a technique on one model and one dataset."""

    technique: str
    setting: str
    rung: int
    model: str
    dataset: str
    cases: list[Case]


TUNING = results.by_key(Path(__file__).parents[1] / "results" / "tuning.jsonl")
ALL = [(model, dataset) for model in protocol.MODELS for dataset in protocol.DATASETS]
CIFAR10 = [(model, "cifar10") for model in protocol.MODELS]
OTHERS = [pair for pair in ALL if pair not in CIFAR10]
SEEDS = 4  # of techniques that combine several starts; the steps of all of them count
STATISTICS = {  # the attacker of the survey has none of the batch; HF-GradInv takes the model's running ones
    "gradinversion": GradInversion(bn=0.0, restarts=SEEDS),
    "e2egi": E2EGI(bn=0.0, restarts=SEEDS),
    "hf_gradinv": HFGradInv(),
}
CHAINS = [(model, dataset) for model in ("cnn6", "lenet") for dataset in ("mnist", "cifar10", "cifar100")]
"""Where R-GAP can go back. At 64 px a layer of these has up to 13,068 unknowns: minutes an image, gigabytes."""
WANTED = (  # technique, its attack, setting, rung, stage of the queue, cells
    ("bias_ratio", BiasRatio(), "default", 1, 1, ALL),
    ("rgap", RGAP(), "default", 1, 1, CHAINS),
    ("inverting_gradients", InvertingGradients(), "tuned", 1, 1, ALL),
    ("inverting_gradients", InvertingGradients(), "tuned", 2, 2, ALL),
    ("inverting_gradients", InvertingGradients(), "default", 2, 2, CIFAR10),
    ("inverting_gradients", InvertingGradients(), "default", 2, 4, OTHERS),
    ("inverting_gradients", InvertingGradients(), "tuned", 3, 5, CIFAR10),
    *(
        (name, attack, "default", rung, 3 if pairs is CIFAR10 else 6, [pair for pair in pairs if pair[0] in models])
        for name, attack in (("dlg", DLG()), ("idlg", IDLG()))
        for pairs in (CIFAR10, OTHERS)
        for rung, models in ((1, protocol.LARGE), (2, protocol.SMALL))
    ),
    *(  # CPL, as DLG, has no prior and no step to tune
        (name, attack, "default", rung, stage, CIFAR10)
        for rung, stage in ((1, 3), (2, 7))
        for name, attack in (
            ("cpl", CPL()),
            ("sapag", SAPAG()),
            ("practical_recipe", PracticalRecipe()),
            ("fedleak", FedLeak()),
        )
    ),
    *((name, attack, "default", 2, 4, CIFAR10) for name, attack in STATISTICS.items()),
    ("sapag", SAPAG(), "tuned", 2, 7, CIFAR10),
    ("practical_recipe", PracticalRecipe(), "tuned", 2, 6, CIFAR10),
)

PLAN = []
for technique, attack, setting, rung, stage, pairs in WANTED:
    for model, dataset in pairs:
        own = protocol.tuned(attack, model, dataset, TUNING) if setting == "tuned" else attack
        cases = [] if own is None else protocol.cell(own, model, dataset, rung, stage)
        PLAN.append(Cell(technique, setting, rung, model, dataset, cases))
CASES = [case for cell in PLAN for case in cell.cases]
