"""The one rule for verdicts in this book.

A claim is a stated margin and an interval of what was measured: it is reproduced where the whole interval lies within
the margin, exceeded where it lies above, not reproduced where it lies below, and else undecided. Fewer cases make the
interval wider, and so no claim easier to pass. Two techniques are compared on the same images at equal cost, by two
endpoints in this order: images identified (McNemar's exact test), dB above the floor (Wilcoxon's signed ranks). Images
of one update share its gradient, its network and the start, and are no cases of their own: where cases have several
images, the cases' means are compared, by flips of their signs (Fisher's randomisation test). All tests of a table are
corrected together (Holm, 1979). There is no verdict where too few cases were measured, nor where nothing measured is
above the floor or identified beyond chance: a difference between two failures says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gi_lib.results.summary import chances

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05
"""Of each table of tests; intervals of claims are of 1 - 2 ALPHA, as two one-sided tests ask for (Schuirmann, 1987)."""
CASES, PAIRS = 8, 16
"""With fewer cases no claim is judged; with fewer pairs of images, or fewer cases, no two techniques are compared."""
DECIBELS, SHARE = 1.0, 0.1
"""The margins of a level in dB and of a share, unless a claim states another."""
EXACT = 58.9
"""dB from which on the error is under that of 8 bits. Comparisons cut PSNR here: beyond it nobody sees a difference."""


@dataclass(frozen=True)
class Verdict:
    """What can be said, and from which numbers.

    Args:
        said: of a claim "reproduced", "exceeded", "not reproduced", "undecided"; of two techniques "A is ahead",
            "equal" or "not told apart", with "at N evaluations" where there is no plateau; "no verdict".
        why: the numbers or the reason.
    """

    said: str
    why: str


def level(values: Sequence[float], known: float, margin: float = DECIBELS) -> Verdict:
    """Whether the mean of these numbers (PSNR in dB of images) is a known one, within a margin (Student's t)."""
    from scipy import stats

    if len(values) < CASES:
        return Verdict("no verdict", f"{len(values)} of the {CASES} cases that are needed")
    mean, error = float(np.mean(values)), stats.sem(values)
    reach = float(stats.t.ppf(1 - ALPHA, len(values) - 1) * error)
    return _within(mean - reach, mean + reach, known, margin, "{:.1f}", " dB")


def share(hits: int, cases: int, known: float, margin: float = SHARE) -> Verdict:
    """Whether a share is a known one, within a margin (Wilson's interval; of a known 100 % Clopper and Pearson's)."""
    from scipy.stats import binomtest

    if cases < CASES:
        return Verdict("no verdict", f"{cases} of the {CASES} cases that are needed")
    method = "exact" if known == 1 else "wilson"
    low, high = binomtest(hits, cases).proportion_ci(1 - 2 * ALPHA, method)
    return _within(float(low), float(high), known, margin, "{:.0%}", "")


def _within(low: float, high: float, known: float, margin: float, style: str, unit: str) -> Verdict:
    inside = known - margin <= low and high <= known + margin
    below, above = high < known - margin, low > known + margin
    said = "reproduced" if inside else "not reproduced" if below else "exceeded" if above else "undecided"
    between = f"{style.format(low)} to {style.format(high)}{unit}"
    return Verdict(said, f"interval {between}; known {style.format(known)}, margin {style.format(margin)}{unit}")


def above_floor(values: Sequence[float]) -> bool:
    """Whether these dB above the floor are above it beyond doubt: the lower end of their mean's interval is."""
    from scipy import stats

    if len(values) < 2:
        return False
    return float(np.mean(values) - stats.t.ppf(1 - ALPHA, len(values) - 1) * stats.sem(values)) > 0


def beyond_chance(identified: int, images: int, chance: float) -> bool:
    """Whether more images were identified than pictures of nothing would be (one-sided binomial test, 1 %)."""
    from scipy.stats import binomtest

    return images > 0 and binomtest(identified, images, chance, alternative="greater").pvalue < 0.01


@dataclass(frozen=True)
class Images:
    """What a technique got out of some images, a line an image.

    Args:
        above: dB above the floor, PSNR cut at EXACT; a case that failed or an image that was missed has 0 dB of PSNR.
            All levels of the index but "image" tell one case from another.
        identified: whether the true image was the nearest.
        chance: of being identified, the largest of the cases.
    """

    above: pd.Series
    identified: pd.Series
    chance: float

    @property
    def seen(self) -> bool:
        """Whether there is anything to compare."""
        return above_floor(by_case(self.above).tolist()) or beyond_chance(
            int(self.identified.sum()), len(self.identified), self.chance
        )


def by_case(values: pd.Series) -> pd.Series:
    """The mean over the images of each case."""
    return values.groupby([name for name in values.index.names if name != "image"]).mean() if len(values) else values


def images(frame: pd.DataFrame, floors: pd.Series | None = None) -> Images:
    """The images of records, by dataset, index, seed and all indices of the case; what does not apply is left out.

    Args:
        frame: from `results.read`.
        floors: of images whose own case failed, by dataset, index and seed; without it such images are left out.
    """
    import pandas as pd

    found: dict[tuple, tuple[float, bool]] = {}
    for row in frame[frame["status"] != "not applicable"].to_dict("records"):
        case = " ".join(map(str, row["indices"]))
        for k, index in enumerate(row["indices"]):
            name = (row["dataset"], index, row["seed"])
            if row["status"] == "ok":
                psnr, own = row["psnr"][k], row["floor"][k]
                value = min(psnr if psnr is not None else 0.0, EXACT) - own, bool(row["identified"][k])
            elif floors is not None and name in floors.index:
                value = -float(floors[name]), False
            else:
                continue
            found[*name, case] = value
    names = ["dataset", "image", "seed", "case"]
    index = pd.MultiIndex.from_tuples(list(found), names=names) if found else pd.Index([])
    above, identified = (pd.Series([v[i] for v in found.values()], index=index) for i in range(2))
    return Images(above.astype(float), identified.astype(bool), max(chances(frame), default=float("nan")))


@dataclass(frozen=True)
class Comparison:
    """Two techniques on the same images of one model.

    Args:
        names, sides: of the two.
        evaluations: what each was given; None where there is a plateau.
    """

    names: tuple[str, str]
    sides: tuple[Images, Images]
    evaluations: int | None = None


def compare(comparisons: Sequence[Comparison], margin: float = 0.5) -> list[Verdict]:
    """Who is ahead in each comparison of a table; equal where the mean difference lies within +-margin dB.

    The two endpoints of all comparisons that can be judged are one family of tests.
    """
    from scipy import stats

    verdicts: list[Verdict | None] = []
    tests: list[tuple[int, str, float, float]] = []  # comparison, endpoint, difference, p
    paired = []
    for i, comparison in enumerate(comparisons):
        a, b = (side.above for side in comparison.sides)
        both = a.index.intersection(b.index)
        above = by_case(a[both] - b[both]).to_numpy()
        more = comparison.sides[0].identified[both].astype(int) - comparison.sides[1].identified[both].astype(int)
        found = by_case(more).to_numpy()
        paired.append((above, len(both)))
        verdicts.append(_no_verdict(comparison, len(both), len(above)))
        if verdicts[i] is None:
            if len(above) < len(both):
                p = [_flips(found), _flips(above)]
            else:
                first, second = int((found > 0).sum()), int((found < 0).sum())
                p = [
                    float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0,
                    float(stats.wilcoxon(above).pvalue) if above.any() else 1.0,
                ]
            tests.append((i, "identified", int(more.sum()), p[0]))
            tests.append((i, "dB", float(above.mean()), p[1]))
    corrected = holm([test[3] for test in tests])
    for i, comparison in enumerate(comparisons):
        if verdicts[i] is None:
            mine = [(*test[1:3], p) for test, p in zip(tests, corrected, strict=True) if test[0] == i]
            verdicts[i] = _ahead(comparison, mine, *paired[i], margin)
    return [verdict for verdict in verdicts if verdict is not None]


def _flips(differences: np.ndarray) -> float:
    """How often the mean is as far from zero where each sign is a toss: exact up to 13 cases."""
    from scipy import stats

    how = {"permutation_type": "samples", "n_resamples": 9999, "random_state": 0}
    return float(stats.permutation_test((differences,), np.mean, **how).pvalue)


def _no_verdict(comparison: Comparison, pairs: int, cases: int) -> Verdict | None:
    if pairs < PAIRS:
        return Verdict("no verdict", f"{pairs} of the {PAIRS} pairs that are needed")
    if cases < CASES:
        return Verdict("no verdict", f"the {pairs} pairs are of {cases} cases, and {CASES} are needed")
    if not any(side.seen for side in comparison.sides):
        return Verdict("no verdict", "neither is above the floor or identified beyond chance")
    return None


def _ahead(
    comparison: Comparison, tests: Sequence[tuple[str, float, float]], above: np.ndarray, pairs: int, margin: float
) -> Verdict:
    from scipy import stats

    at = "" if comparison.evaluations is None else f" at {comparison.evaluations:,} evaluations"
    of = f" of {len(above)} cases" if len(above) < pairs else ""
    numbers = f"{pairs} pairs{of}: {tests[0][1]:+d} images identified (p {tests[0][2]:.2g}), "
    numbers += f"{tests[1][1]:+.1f} dB (p {tests[1][2]:.2g})"
    for _, difference, p in tests:
        if p < ALPHA:
            return Verdict(f"{comparison.names[difference < 0]} is ahead{at}", numbers)
    reach = stats.t.ppf(1 - ALPHA, len(above) - 1) * stats.sem(above)
    equal = abs(above.mean()) + reach < margin
    return Verdict(("equal" if equal else "not told apart") + at, numbers)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number: Holm's step-down (Scandinavian Journal of Statistics, 1979)."""
    order, n = np.argsort(p), len(p)
    raised = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * (n - np.arange(n)))) if n else np.array([])
    corrected = np.empty(n)
    corrected[order] = raised
    return corrected.tolist()


def best_of(sides: dict[str, Images]) -> tuple[str, str, float, int, int] | None:
    """The best of several techniques without flattery: chosen on images of even index, reported on those of odd.

    Returns:
        The technique, why it was chosen, its mean dB above the floor on the other half, images identified there, and
        their number; None without images in both halves.
    """

    def half(side: Images, odd: int) -> tuple[pd.Series, pd.Series]:
        mask = side.above.index.get_level_values("image") % 2 == odd
        return side.above[mask], side.identified[mask]

    usable = {name: side for name, side in sides.items() if len(half(side, 0)[0]) and len(half(side, 1)[0])}
    if not usable:
        return None
    merit = {name: (int(half(s, 0)[1].sum()), float(half(s, 0)[0].mean())) for name, s in usable.items()}
    best = max(merit, key=lambda name: merit[name])
    above, identified = half(usable[best], 1)
    why = f"{merit[best][0]} of {len(half(usable[best], 0)[0])} identified, {merit[best][1]:+.1f} dB on the even images"
    return best, why, float(above.mean()), int(identified.sum()), len(above)
