"""The rule for verdicts: oracles of its tests, and that fewer cases never help a claim."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gi_lib.results import verdicts
from gi_lib.results.verdicts import Comparison, Images, compare, holm, level, share


def measured(above, identified=None, chance=0.002, batch=1):
    """Images of cases of `batch` images each."""
    of = [("d", i, 0, i - i % batch) for i in range(len(above))]
    index = pd.MultiIndex.from_tuples(of, names=["dataset", "image", "seed", "case"])
    found = [False] * len(above) if identified is None else identified
    return Images(pd.Series(above, index=index, dtype=float), pd.Series(found, index=index), chance)


def spread(n, mean, deviation, seed=0):
    values = np.random.default_rng(seed).normal(size=n)
    return (mean + deviation * (values - values.mean()) / values.std(ddof=1)).tolist()


def test_a_level_is_reproduced_within_the_margin():
    assert level(spread(32, 18.2, 1.0), 18.0).said == "reproduced"


def test_a_level_outside_the_margin_is_not_reproduced_on_either_side():
    assert level(spread(32, 14.0, 1.0), 18.0).said == "not reproduced"
    assert level(spread(32, 22.0, 1.0), 18.0).said == "exceeded"


@pytest.mark.parametrize("mean", [17.0, 18.0, 18.5, 25.0])
def test_fewer_cases_never_make_a_claim_easier(mean):
    """With the same mean and deviation, what few cases reproduce more cases reproduce too."""
    said = [level(spread(n, mean, 1.0), 18.0).said == "reproduced" for n in (4, 8, 16, 64, 256)]
    assert said == sorted(said)
    shares = [share(round(0.9 * n), n, 0.9).said == "reproduced" for n in (10, 20, 100, 1000)]
    assert shares == sorted(shares) and shares[-1]


def test_too_few_cases_have_no_verdict():
    assert level([18.0] * 7, 18.0).said == share(7, 7, 1.0).said == "no verdict"


def test_always_needs_many_cases_and_no_exception():
    assert [share(n, n, 1.0).said for n in (8, 28, 29)] == ["undecided", "undecided", "reproduced"]
    assert share(70, 100, 1.0).said == "not reproduced"


def test_the_interval_is_that_of_two_one_sided_tests():
    values = spread(12, 18.0, 2.0)
    low, high = stats.t.interval(0.9, 11, np.mean(values), stats.sem(values))
    assert f"interval {low:.1f} to {high:.1f} dB" in level(values, 18.0).why


def test_holm_is_the_textbook_s():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_one_that_is_better_on_most_images_is_ahead():
    [said] = compare([Comparison(("A", "B"), (measured(spread(16, 6, 1)), measured(spread(16, 3, 1, 1))))])
    assert said.said == "A is ahead"
    [said] = compare([Comparison(("A", "B"), (measured(spread(16, 3, 1)), measured(spread(16, 6, 1, 1))), 100)])
    assert said.said == "B is ahead at 100 evaluations"


def test_identification_counts_before_decibels():
    better, worse = [True] * 16, [False] * 16
    sides = measured(spread(16, 1, 0.5), better), measured(spread(16, 4, 0.5, 1), worse)
    assert compare([Comparison(("A", "B"), sides)])[0].said == "A is ahead"


def test_two_failures_have_no_verdict_however_far_apart():
    sides = measured(spread(16, -2, 0.1)), measured(spread(16, -8, 0.1, 1))
    [said] = compare([Comparison(("A", "B"), sides)])
    assert said == verdicts.Verdict("no verdict", "neither is above the floor or identified beyond chance")


def test_few_pairs_have_no_verdict():
    sides = measured(spread(15, 9, 0.1)), measured(spread(15, 1, 0.1, 1))
    assert compare([Comparison(("A", "B"), sides)])[0].why == "15 of the 16 pairs that are needed"


def test_images_of_one_case_are_one_case():
    """The same differences are a verdict as 32 cases, and none as 8 where the images of a case go together."""
    together = np.repeat(spread(8, 0.8, 1.0), 4)
    base = np.array(spread(32, 5, 1, 1))
    sides = {batch: (measured(base + together, batch=batch), measured(base, batch=batch)) for batch in (1, 4)}
    assert compare([Comparison(("A", "B"), sides[1])])[0].said == "A is ahead"
    [said] = compare([Comparison(("A", "B"), sides[4])])
    assert said.said == "not told apart" and "32 pairs of 8 cases" in said.why


def test_few_cases_of_many_images_have_no_verdict():
    sides = measured(spread(40, 9, 0.1), batch=8), measured(spread(40, 1, 0.1, 1), batch=8)
    assert compare([Comparison(("A", "B"), sides)])[0].why == "the 40 pairs are of 5 cases, and 8 are needed"
    sides = measured(spread(64, 9, 0.1), batch=8), measured(spread(64, 1, 0.1, 1), batch=8)
    assert compare([Comparison(("A", "B"), sides)])[0].said == "A is ahead"


def test_no_effect_is_seldom_an_effect_where_images_of_a_case_go_together():
    rng, ahead = np.random.default_rng(0), 0
    for _ in range(200):
        shift = np.repeat(rng.normal(size=10), 10) + rng.normal(size=100)
        sides = measured(5 + shift, batch=10), measured([5.0] * 100, batch=10)
        ahead += "ahead" in compare([Comparison(("A", "B"), sides)])[0].said
    assert ahead <= 20  # 10 are meant; as a hundred cases about half are


def test_equal_needs_a_narrow_interval():
    base = np.array(spread(64, 5, 2))
    near, far = base + spread(64, 0.01, 0.2, 1), base + spread(64, 0.1, 3, 2)
    assert compare([Comparison(("A", "B"), (measured(base), measured(near)))])[0].said == "equal"
    assert compare([Comparison(("A", "B"), (measured(base), measured(far)))])[0].said == "not told apart"


def test_many_comparisons_ask_for_more():
    a = spread(16, 3.0, 1.0)
    b = (np.array(a) - spread(16, 0.6, 1.0, 1)).tolist()
    one = Comparison(("A", "B"), (measured(a), measured(b)))
    nothing = Comparison(("A", "B"), (measured(a), measured(a)))
    assert compare([one])[0].said == "A is ahead"
    assert compare([one, *[nothing] * 20])[0].said != "A is ahead"


def test_chance_and_floor():
    assert verdicts.beyond_chance(1, 4, 1 / 500)
    assert not verdicts.beyond_chance(1, 32, 1 / 500)
    assert not verdicts.beyond_chance(0, 0, 1 / 500)
    assert verdicts.above_floor([1.0, 1.1, 0.9])
    assert not verdicts.above_floor([1.0, -1.0, 0.5])
    assert not verdicts.above_floor([5.0])


def test_the_best_of_several_is_reported_on_the_other_half():
    lucky = measured([9, 0, 9, 0, 9, 0])
    steady = measured([5, 5, 5, 5, 5, 5])
    name, why, above, identified, images = verdicts.best_of({"lucky": lucky, "steady": steady})
    assert (name, above, identified, images) == ("lucky", 0.0, 0, 3)
    assert why == "0 of 3 identified, +9.0 dB on the even images"
    assert verdicts.best_of({"one": measured([1.0])}) is None


def test_images_are_those_of_the_records():
    row = {"dataset": "d", "seed": 0, "chance": 0.002, "returned": 1, "indices": [0, 1]}
    ok = {**row, "status": "ok", "psnr": [80.0, None], "floor": [10.0, 12.0], "identified": [True, False]}
    failed = {**row, "indices": [2], "status": "failed", "psnr": None, "floor": None, "identified": None}
    apart = {**failed, "indices": [3], "status": "not applicable"}
    frame = pd.DataFrame([ok, failed, apart])
    found = verdicts.images(frame)
    assert found.above.tolist() == [pytest.approx(48.9), -12.0] and found.identified.tolist() == [True, False]
    floors = pd.Series({("d", 2, 0): 11.0})
    assert verdicts.images(frame, floors).above.tolist()[-1] == -11.0
    assert found.above.index.get_level_values("case").tolist() == ["0 1", "0 1"]
    larger = {**ok, "indices": [0, 1, 4], "psnr": [9.0] * 3, "floor": [8.0] * 3, "identified": [True] * 3}
    assert len(verdicts.images(pd.DataFrame([ok, larger])).above) == 5
    assert found.chance == 0.002 and verdicts.images(frame.assign(returned=3)).chance == 0.006
    assert np.isnan(verdicts.images(frame.iloc[1:]).chance)
