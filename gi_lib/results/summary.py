"""Records in groups: means, intervals, medians, and whether a budget was enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gi_lib import metrics

if TYPE_CHECKING:
    import pandas as pd

_USUAL = ("attack", "model", "weights", "dataset", "threat")
_SETTINGS = (
    *("split", "size", "client", "batch_size", "defense", "train", "clients", "rounds", "auxiliary", "precision"),
    "attack_text",
)


def usual_groups(frame: pd.DataFrame) -> list[str]:
    """Attack, model, weights, dataset and threat, and what else differs within such a group."""
    by = list(_USUAL)
    for name in _SETTINGS:
        if (frame.groupby(by, dropna=False)[name].nunique(dropna=False) > 1).any():
            by.append(name)
    return by


def summarise(frame: pd.DataFrame, by: Sequence[str] | None = None) -> pd.DataFrame:
    """One row for each group of records; failed cases are counted in `n` and not in `ok`.

    Args:
        frame: from `read`.
        by: columns that make a group; None for `usual_groups`, which keeps unlike settings apart.

    Returns:
        The columns of `by` and: ok and n (cases, without those that do not apply), images, psnr with psnr_low and
        psnr_high (95 % bootstrap interval of the mean over images), above (mean dB above the floor) with above_low and
        above_high, ssim, lpips, identified, chance, recall, image_precision, label_accuracy (means), seconds, steps,
        training_steps, gradient_evaluations (medians over cases). Images that were missed are in `images` and `recall`,
        and in no mean of decibels. A group with an image whose LPIPS is missing has no mean LPIPS.

    Raises:
        ValueError: a name in `by` is not a column, or a column of lists.
    """
    import pandas as pd

    by = usual_groups(frame) if by is None else by
    if not by:
        raise ValueError("name at least one column that makes a group")
    unknown = [name for name in by if name not in frame.columns]
    if unknown:
        raise ValueError(f"records have no column {', '.join(unknown)}; known: {', '.join(frame.columns)}")
    lists = [name for name in by if frame[name].map(lambda value: isinstance(value, list | dict)).any()]
    if lists:
        raise ValueError(f"{', '.join(lists)} has a list in each record, which makes no group; choose other columns")
    groups = frame.groupby(list(by), dropna=False, sort=False)
    summary = [dict(zip(by, group, strict=True)) | _summary(cases) for group, cases in groups]
    return pd.DataFrame(summary, columns=[*by, *_SUMMARY])


_SUMMARY = (
    *("ok", "n", "images", "psnr", "psnr_low", "psnr_high", "above", "above_low", "above_high", "ssim", "lpips"),
    *("identified", "chance", "recall", "image_precision", "label_accuracy", "seconds", "steps", "training_steps"),
    "gradient_evaluations",
)


_MEDIANS = ("seconds", "steps", "training_steps", "gradient_evaluations")


def chances(frame: pd.DataFrame) -> list[float]:
    """Of each case that returned something: how often one of its images is identified by chance, at most."""
    done = frame[frame["status"] == "ok"].dropna(subset=["chance", "returned"])
    return [metrics.chance(one, n) for one, n in zip(done["chance"], done["returned"], strict=True)]


def _summary(cases: pd.DataFrame) -> dict[str, float]:
    done = cases[cases["status"] == "ok"]
    psnr = _images(done["psnr"])
    low, high = bootstrap(psnr[~np.isnan(psnr)])
    above = np.concatenate([[], *map(_above, done["psnr"], done["floor"])])
    above_low, above_high = bootstrap(above[~np.isnan(above)])
    medians = {name: done[name].astype(float).median() for name in _MEDIANS}
    once = {name: done[name].astype(float).mean() for name in ("recall", "image_precision", "label_accuracy")}
    return {
        "ok": len(done),
        "n": int((cases["status"] != "not applicable").sum()),
        "images": len(psnr),
        "psnr_low": low,
        "psnr_high": high,
        "above": _mean(above),
        "above_low": above_low,
        "above_high": above_high,
        **{name: _mean_of(done[name]) for name in ("psnr", "ssim", "lpips", "identified")},
        "chance": _mean(np.array(chances(cases))),
        **once,
        **medians,
    }


def _above(psnr: object, floor: object) -> np.ndarray:
    if not isinstance(psnr, list) or not isinstance(floor, list):
        return np.array([np.nan])
    return np.array(psnr, dtype=float) - np.array(floor)


def _mean_of(lists: pd.Series) -> float:
    """Over the images that were not missed; NaN where a whole case has no values."""
    return _mean(_images(lists)) if all(isinstance(values, list) for values in lists) else float("nan")


def _mean(values: np.ndarray) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else float("nan")


def first_identified(record: dict) -> dict[str, float] | None:
    """The gradient evaluations and seconds of a run until its first image was identified; None where none was."""
    curve = record["curve"]
    for n, seconds, found in (
        zip(*(curve[k] for k in ("evaluations", "seconds", "identified")), strict=True) if curve else ()
    ):
        if any(found):
            return {"evaluations": n, "seconds": seconds}
    return None


_CELL = (*_USUAL, *_SETTINGS[:-1])
DECIBELS, IMAGES = 0.5, 1
"""A budget was enough where a third of it gives less than DECIBELS another mean, and at most IMAGES other ones."""


def plateau(frame: pd.DataFrame) -> pd.DataFrame:
    """Whether the budgets of iterative attacks were enough: each cell at its budget and at about a third of it.

    A snapshot of a run with a schedule is not a shorter run, so that a run's own curve can't tell. Cells are
    compared on the images, by index and seed, that both budgets have.

    Args:
        frame: from `read`.

    Returns:
        One row for each cell and budget, with what makes the cell, setting (the attack without its steps), budget (in
        steps), below (the smaller budget, NaN where there is none of 1/5 to 1/2), images, decibels (the difference of
        mean PSNR), identified (the difference of counts), plateau (True, False, or None where nothing was compared).
    """
    import pandas as pd

    done = frame[(frame["status"] == "ok") & frame["budget"].notna()]
    done = done.assign(setting=done["attack_text"].str.replace(r"(?<![\w])steps=\d+(, )?", "", regex=True))
    found = []
    by = [*_CELL, "setting"]
    for cell, cases in done.groupby(by, dropna=False, sort=False):
        budgets = dict(list(cases.groupby("budget")))
        for budget, part in budgets.items():
            smaller = [b for b in budgets if 2 <= budget / b <= 5]
            row = dict(zip(by, cell, strict=True)) | {"budget": budget, "below": np.nan, "plateau": None}
            if smaller:
                below = min(smaller, key=lambda b: abs(budget / b - 3))
                row |= {"below": below} | _compared(part, budgets[below])
            found.append(row)
    return pd.DataFrame(found, columns=[*by, "budget", "below", "images", "decibels", "identified", "plateau"])


def _compared(more: pd.DataFrame, less: pd.DataFrame) -> dict:
    pairs = [{(tuple(row["indices"]), row["seed"]): row for row in part.to_dict("records")} for part in (more, less)]
    both = [name for name in pairs[0] if name in pairs[1]]
    if not both:
        return {"images": 0, "plateau": None}
    psnr, count = (
        [np.concatenate([np.asarray(side[name][field], dtype=float) for name in both]) for side in pairs]
        for field in ("psnr", "identified")
    )
    decibels = float(np.nanmean(psnr[0]) - np.nanmean(psnr[1]))
    identified = int(count[0].sum() - count[1].sum())
    return {
        "images": len(psnr[0]),
        "decibels": decibels,
        "identified": identified,
        "plateau": abs(decibels) < DECIBELS and abs(identified) <= IMAGES,
    }


def _images(lists: pd.Series) -> np.ndarray:
    """The values of all images; NaN for a case that has none."""
    return np.concatenate([[], *(values if isinstance(values, list) else [np.nan] for values in lists)]).astype(float)


def bootstrap(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron, 1979). Without values (NaN, NaN)."""
    if len(values) == 0:
        return float("nan"), float("nan")
    chosen = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.asarray(values)[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)
