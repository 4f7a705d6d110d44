"""The survey's protocol: budgets, tuning on images that are not attacked, and the studies made of it."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from gi_lib.attacks import DLG, E2EGI, BiasRatio, FedLeak, InvertingGradients
from gi_lib.bench import key, protocol
from gi_lib.training import RECIPES

ATTACK = InvertingGradients()


def test_rungs_are_about_three_times_the_one_before():
    for model in protocol.MODELS:
        budgets = [protocol.budget(model, rung) for rung in protocol.RUNGS]
        assert all(2.8 < b / a < 3.4 for a, b in zip(budgets, budgets[1:], strict=False))


def test_a_budget_counts_evaluations():
    assert protocol.at_budget(ATTACK, 700).steps == 700
    assert protocol.at_budget(DLG(), 2000).steps == 100
    assert protocol.at_budget(E2EGI(bn=0.0, restarts=4), 300).steps == 75
    assert protocol.at_budget(FedLeak(), 300).steps == 150


def test_a_budget_of_zero_is_said_so():
    with pytest.raises(ValueError, match="a budget of 0 gradient evaluations is less than one step of InvertingGrad"):
        protocol.at_budget(ATTACK, 0)
    with pytest.raises(ValueError, match="less than one step of DLG, which has 20; give at least 20"):
        protocol.at_budget(DLG(), 19)


def test_tuning_without_a_train_split_is_said_so():
    with pytest.raises(ValueError, match="imagenet has no train split here.*tune on one of cifar10, mnist"):
        protocol.tuning(ATTACK, {}, datasets=("imagenet",))


def answer(case, quality):
    """A record as far as the tuning looks at it."""
    return {"psnr": [10.0 + quality], "floor": [10.0], "identified": [quality > 5]}


def tuned_by(quality, model="lenet", dataset="mnist"):
    """Run a tuning whose settings have these qualities; the choice, and how often each setting ran."""
    records, ran = {}, []
    while True:
        left = [
            case
            for case in protocol.tuning(ATTACK, records)
            if (case.model, case.dataset) == (model, dataset) and key(case) not in records
        ]
        if not left:
            break
        assert protocol.tuned(ATTACK, model, dataset, records) is None
        for case in left:
            records[key(case)] = answer(case, quality(case))
            ran.append(case)
    return protocol.tuned(ATTACK, model, dataset, records), ran


def test_tuning_halves_the_settings_image_by_image():
    chosen, ran = tuned_by(lambda case: case.attack.tv * 10 + case.attack.lr)
    assert (chosen.tv, chosen.lr) == (0.1, 0.3)
    counts = [sum(case.indices == (i,) for case in ran) for i in range(4)]
    assert tuple(counts) == protocol.SURVIVORS
    assert {case.split for case in ran} == {"train"}
    assert all(case.seed == protocol.DRAW + case.indices[0] for case in ran)


def test_images_that_are_found_count_before_decibels():
    """On the first image one setting has more dB; on the others it finds nothing."""

    def quality(case):
        if case.attack.tv == 0.01:
            return 20.0 if case.indices == (0,) else 4.0
        return 6.0 if case.attack.tv == 0.001 else 0.0

    chosen, _ = tuned_by(quality)
    assert (chosen.tv, chosen.lr) == (0.001, 0.1)


def test_of_equal_settings_the_paper_s_is_taken():
    chosen, _ = tuned_by(lambda case: 1.0)
    assert (chosen.tv, chosen.lr) == (ATTACK.tv, ATTACK.lr)


def test_a_setting_that_fails_comes_last():
    records = {}
    cases = [c for c in protocol.tuning(ATTACK, {}) if (c.model, c.dataset) == ("lenet", "mnist")]
    for case in cases:
        records[key(case)] = answer(case, 0.0)
    failed = {"psnr": None, "floor": None, "identified": None}
    records[key(cases[0])] = failed
    second = [
        c for c in protocol.tuning(ATTACK, records) if (c.model, c.dataset, c.indices) == ("lenet", "mnist", (1,))
    ]
    assert cases[0].attack not in [case.attack for case in second] and len(second) == 4


def test_imagenet_takes_over_what_cifar10_chose():
    _, ran = tuned_by(lambda case: case.attack.lr, dataset="cifar10")
    records = {key(case): answer(case, case.attack.lr) for case in ran}
    settings = [protocol.tuned(ATTACK, "lenet", dataset, records) for dataset in ("cifar10", "cifar100", "imagenet")]
    assert settings[0] == settings[1] == settings[2] and settings[0].lr == 0.3


def test_no_tuning_case_attacks_what_the_survey_attacks():
    tuning = {(c.split, c.seed) for c in protocol.tuning(ATTACK, {})}
    survey = {(c.split, c.seed) for c in protocol.cell(ATTACK, "lenet", "cifar10", 1, 1)}
    assert not tuning & survey and {split for split, _ in survey} == {"test"}


def test_a_cell_has_one_case_an_image():
    cases = protocol.cell(ATTACK, "vit", "imagenet", 2, 3)
    assert [(c.indices, c.seed, c.size, c.attack.steps, c.stage) for c in cases] == [
        ((i,), i, 64, 300, 3) for i in range(4)
    ]
    assert protocol.cell(BiasRatio(), "mlp", "mnist", 1, 1)[0].attack == BiasRatio()


STUDIES = sorted((Path(__file__).parents[1] / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", [p for p in STUDIES if "\nCASES" in p.read_text()], ids=lambda path: path.stem)
def test_a_study_has_each_case_once_and_all_of_profile_survey(path):
    cases = runpy.run_path(str(path))["CASES"]
    keys = [key(case) for case in cases]
    assert {case.profile for case in cases} <= {"survey"}
    twice = len(keys) - len(set(keys))
    assert twice == 0 or path.stem == "survey"  # where tuning has chosen the paper's own setting


def test_the_survey_wants_the_tuned_attack_in_every_cell():
    plan = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "survey.py"))["PLAN"]
    first = {
        (c.model, c.dataset) for c in plan if (c.technique, c.setting, c.rung) == ("inverting_gradients", "tuned", 1)
    }
    assert len(first) == len(protocol.MODELS) * len(protocol.DATASETS)
    assert all(dataclasses.is_dataclass(cell) for cell in plan)


def test_no_case_waits_for_a_network_that_nobody_has_trained():
    cases = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "trained.py"))["CASES"]
    asked = {(case.model, case.dataset) for case in cases if case.weights == "trained"}
    assert asked and all(RECIPES[pair].accuracy is not None for pair in asked)
