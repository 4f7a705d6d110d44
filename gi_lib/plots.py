"""Figures and tables from records and saved pictures. Each is a piece of a page that a notebook shows.

Figures made with matplotlib have an opaque light ground, since a notebook may have a dark one; on the book's dark pages
its style sheet turns their lightness around (class `gi-figure`).
Colours are those of Okabe and Ito, which readers with colour blindness can tell apart, and never the only
difference. A number that has no record is not printed: cells that were not run are empty, and the caption
counts them.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib import results
from gi_lib.bench import protocol
from gi_lib.pages import Html, picture, provenance, provenance_live, slider, verdict
from gi_lib.types import Images

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SURVEY",
    "Figure",
    "Html",
    "compare",
    "curves",
    "heatmap",
    "losses",
    "picture_grid",
    "provenance",
    "provenance_live",
    "quality_against_cost",
    "slider",
    "table",
]

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GROUND = "#ffffff"
_FILLED = [{"color": c, "marker": m} for c, m in zip(OKABE_ITO, MARKERS, strict=True)]
_STYLES = [*_FILLED, *(style | {"markerfacecolor": GROUND} for style in _FILLED)]


@dataclass(frozen=True, repr=False)
class Figure:
    """A matplotlib figure with its alternative text.

    Args:
        figure: a matplotlib.figure.Figure, to save or to change.
        alt: what a reader who can't see it should know.
    """

    figure: Any
    alt: str

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        style = f"width:{round(96 * self.figure.get_figwidth())}px;max-width:100%;height:auto"
        return f'<img class="dark-light gi-figure" alt="{escape(self.alt)}" src="{source}" style="{style}">'

    def __repr__(self) -> str:
        return f"Figure({self.alt})"


Levels = Mapping[str, Sequence]
"""Column -> all its values to be shown, in order, whether they were run or not."""

SURVEY: Levels = {"model": protocol.MODELS, "dataset": tuple(protocol.DATASETS)}
"""The survey's eight models and four datasets."""


def _panels(width: float, height: float, lines: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of inches and its axes, with the same limits; no pyplot: nothing global, nothing shown twice."""
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(width, height), layout="constrained", facecolor=GROUND)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid:
        axes.set_facecolor(GROUND)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    return figure, grid


def compare(
    truth: Images,
    reconstruction: Images,
    psnr: Sequence[float] | Tensor | None = None,
    *,
    candidates: Images | None = None,
    shown: int = 160,
) -> Html:
    """Private images [B, C, H, W] and their reconstructions in the same order, one above the other.

    Args:
        psnr: B values in dB, printed below.
        candidates: [N, C, H, W], the truth among them; then `pages.verdict` is printed below, in place of `psnr`.
        shown: the width of an image in CSS pixels.
    """
    said = [""] * len(truth) if psnr is None else [f"{float(v):.1f} dB" for v in psnr]
    if candidates is not None:
        said = verdict(truth, reconstruction, candidates)
    columns = []
    for i, text in enumerate(said):
        number = f" {i + 1}" if len(truth) > 1 else ""
        score = text and f", PSNR {text}"
        top = picture(truth[i : i + 1], f"Private image{number}", shown=shown)
        bottom = picture(reconstruction[i : i + 1], f"Reconstruction{number}{score}", shown=shown)
        columns.append(
            f'<figure style="margin:0;min-width:0;max-width:{shown}px">{top}<div style="height:.3rem"></div>{bottom}'
            f"<figcaption>{text or '&nbsp;'}</figcaption></figure>"
        )
    return Html(
        '<div class="gi-pictures" style="color:inherit"><div style="display:flex;flex-wrap:wrap;gap:.6rem">'
        + "".join(columns)
        + "</div><p>Above: private. Below: reconstructed.</p></div>"
    )


def losses(trace: Float[Tensor, "steps R"], *, chosen: int | None = None) -> Figure:
    """The loss of every restart before each step, on a logarithmic axis; `chosen` is drawn bold."""
    figure, (axes,) = _panels(5.2, 2.9)
    values = trace.detach().cpu().double().numpy()
    for i, row in enumerate(values.T):
        bold = i == chosen or values.shape[1] == 1
        axes.plot(
            np.arange(1, len(row) + 1),
            row,
            color=OKABE_ITO[i % len(OKABE_ITO)],
            linewidth=2 if bold else 0.9,
            alpha=1 if bold else 0.75,
            label=f"restart {i + 1}",
        )
    axes.set(xlabel="step", ylabel="matching loss", yscale="log", xlim=(1, max(2, len(values))))
    if 1 < values.shape[1] <= 8:
        axes.legend(fontsize="small", ncols=2, frameon=False)
    ends = values[-1][np.isfinite(values[-1])]
    reached = f", ending between {ends.min():.1e} and {ends.max():.1e}" if len(ends) else ""
    restarts = f"{values.shape[1]} restarts" if values.shape[1] > 1 else "one start"
    return Figure(figure, f"Matching loss of {restarts} over {len(values)} steps{reached}.")


def quality_against_cost(
    frame: pd.DataFrame,
    by: Sequence[str] = ("attack",),
    cost: str = "training_steps",
    panels: str | None = None,
    along: str | None = None,
) -> Figure:
    """Mean dB above the floor with its 95 % interval against the median cost of a case, one point a group.

    Args:
        frame: from `results.read`.
        by: columns that make a group.
        cost: "training_steps" (comparable between machines), "gradient_evaluations", "seconds" or "steps".
        panels: a column; each of its values gets a panel of its own, all with the same axes.
        along: a column, such as the budget; a group has a point for each of its values, and a line joins them.
    """
    unit = {
        "training_steps": "cost of a case in training steps",
        "gradient_evaluations": "gradient evaluations of a case",
        "seconds": "seconds a case",
        "steps": "steps",
    }[cost]
    parts = {"": frame}
    if panels is not None:
        parts = {_say(panels, value): part for value, part in frame.groupby(panels, sort=False, dropna=False)}
    lines, columns = (1, 1) if len(parts) < 2 else (-(-len(parts) // 2), 2)
    figure, grid = _panels(*((5.2, 3.6) if columns == 1 else (6.6, 0.9 + 1.75 * lines)), lines, columns)
    styles = itertools.cycle(_STYLES)
    looks: dict[str, dict] = {}
    drawn, said = {}, []
    for (title, part), axes in zip(parts.items(), grid, strict=False):
        groups = results.summarise(part, [*by, along] if along else by).dropna(subset=["above", cost])
        points = []
        for group, rows in groups.groupby(list(by), sort=False, dropna=False):
            name, rows = ", ".join(map(_say, by, group)), rows.sort_values(cost)
            if name not in looks:
                looks[name] = next(styles)
            reach = [rows["above"] - rows["above_low"], rows["above_high"] - rows["above"]]
            drawn[name] = axes.errorbar(
                rows[cost],
                rows["above"],
                reach,
                capsize=3,
                linestyle="-" if along else "",
                linewidth=1.2,
                **looks[name],
            )
            ends = ", ".join(f"{y:+.1f} dB at {x:.3g}" for x, y in zip(rows[cost], rows["above"], strict=True))
            points.append(f"{name}: {ends}")
        axes.axhline(0, color="#444444", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", title=title)
        said += [(f"{title}: " if title else "") + "; ".join(points)] if points else []
    for axes in grid[len(parts) :]:
        axes.set_visible(False)
    figure.supxlabel(unit, fontsize="medium")
    figure.supylabel("dB above the floor", fontsize="medium")
    if drawn:
        place = {"loc": "outside upper center", "ncols": 3, "fontsize": "small", "frameon": False}
        figure.legend(list(drawn.values()), list(drawn), **place)
    return Figure(figure, f"Decibels above the floor against {unit}. {'. '.join(said) or 'No case has run'}.")


def heatmap(
    frame: pd.DataFrame,
    rows: str = "model",
    columns: str = "dataset",
    order: Levels | None = None,
    limits: tuple[float, float] = (0, 20),
    marks: Mapping[tuple, str] | None = None,
) -> Figure:
    """Mean dB above the floor of each pair of a row and a column, and below it the images identified of those attacked.

    A cell at or under the floor is grey and hatched. A cell without a number says why: not run (white, "not run"), all
    failed (crossed) or does not apply (hatched).

    Args:
        frame: records of one technique, from `results.read`.
        rows, columns: names of columns of `frame`.
        order: all the values of them to be shown.
        limits: decibels where the colours end; the number in the cell does not end there.
        marks: (row, column) -> what stands behind the number, such as a sign for a plateau.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    shown = {c: list((order or {}).get(c) or dict.fromkeys(map(_plain, frame[c]))) for c in (rows, columns)}
    summary = results.summarise(frame, (rows, columns)).to_dict("records")
    found = {(_plain(row[rows]), _plain(row[columns])): row for row in summary}
    height, width = len(shown[rows]), len(shown[columns])
    figure, (axes,) = _panels(1.9 + 1.05 * width, 1.1 + 0.48 * height)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    scale = ScalarMappable(Normalize(*limits), "cividis")
    said, missing = [], 0
    for i, down in enumerate(shown[rows]):
        cells = []
        for j, across in enumerate(shown[columns]):
            text, ground, hatch = _heat(found.get((down, across)), scale, (marks or {}).get((down, across), ""))
            axes.add_patch(
                Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=ground, edgecolor="#999999", hatch=hatch, lw=0.6)
            )
            dark = sum(weight * part for weight, part in zip((0.3, 0.59, 0.11), ground, strict=False)) < 0.5
            box = {"facecolor": GROUND, "edgecolor": "none", "pad": 1.2} if hatch else None
            look = {"ha": "center", "va": "center", "fontsize": "small", "bbox": box}
            axes.text(j, i, text, color="white" if dark else "#666666" if text == _NOT_RUN else "black", **look)
            missing += text == _NOT_RUN
            if text != _NOT_RUN:
                cells.append(f"{_say(columns, across)} {text.replace(chr(10), ' ')}")
        said += [f"{_say(rows, down)}: {', '.join(cells)}"] if cells else []
    axes.set(xlim=(-0.5, max(width, 1) - 0.5), ylim=(max(height, 1) - 0.5, -0.5))
    axes.set_xticks(range(width), [_say(columns, value) for value in shown[columns]])
    axes.set_yticks(range(height), [_say(rows, value) for value in shown[rows]])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.colorbar(scale, ax=axes, label="mean dB above the floor", extend="max", fraction=0.05)
    values = "; ".join([*said, f"not run: {missing} of {height * width} cells"])
    return Figure(figure, f"Mean dB above the floor and images identified, {rows} by {columns}. {values}.")


_NOT_RUN = "not run"


def _heat(row: Mapping | None, scale: Any, mark: str) -> tuple[str, tuple[float, ...], str]:
    """What one cell of a heat map says, its colour and its hatch."""
    white, grey = (1.0, 1.0, 1.0, 1.0), (0.87, 0.87, 0.87, 1.0)
    if row is None:
        return _NOT_RUN, white, ""
    if not row["n"]:
        return "does not\napply", white, "////"
    if not row["ok"]:
        return f"failed\n0/{row['n']}", white, "xxxx"
    if row["above"] != row["above"]:
        return f"missed\n{row['ok']}/{row['n']}", white, "////"
    text = f"{row['above']:+.1f}{mark}\n{round(row['identified'] * row['images'])}/{row['images']} found"
    return text, *((scale.to_rgba(row["above"]), "") if row["above"] > 0 else (grey, "...."))


def curves(frame: pd.DataFrame, x: str, y: str, by: Sequence[str], labels: tuple[str, str]) -> Figure:
    """One line a group on logarithmic axes, through its rows in the order of x.

    Args:
        frame: any table with these columns.
        x, y: columns of positive numbers.
        by: columns that make a group.
        labels: what stands at the two axes.
    """
    figure, (axes,) = _panels(5.2, 3.3)
    said = []
    styles = itertools.cycle(zip(OKABE_ITO, MARKERS, strict=True))
    for (group, rows), (colour, marker) in zip(frame.groupby(list(by), sort=False, dropna=False), styles, strict=False):
        name, rows = ", ".join(map(_say, by, group)), rows.sort_values(x)
        axes.plot(rows[x], rows[y], color=colour, marker=marker, linewidth=1.2, label=name)
        first, last = rows.iloc[0], rows.iloc[-1]
        said.append(f"{name}: {first[y]:.3g} at {first[x]:g}, {last[y]:.3g} at {last[x]:g}")
    axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log", yscale="log")
    axes.legend(fontsize="small", frameon=False)
    return Figure(figure, f"{labels[1]} against {labels[0]}. {'; '.join(said)}.")


def table(
    frame: pd.DataFrame,
    by: Sequence[str] = ("attack", "model", "weights", "dataset"),
    order: Levels | None = None,
) -> Html:
    """The summary of records, one row a group, for a page.

    Args:
        frame: from `results.read`.
        by: columns that make a group.
        order: for some columns of `by`, all the values to be shown; a group without a record stays empty.
    """
    summary = results.summarise(frame, by).to_dict("records")
    found = {tuple(_plain(row[column]) for column in by): row for row in summary}
    seen = {c: list(dict.fromkeys(group[i] for group in found)) for i, c in enumerate(by)}
    groups = list(found)
    if order:
        shown = itertools.product(*(list((order or {}).get(c, seen[c])) for c in by))
        groups = list(shown)
    lines, missing = [], 0
    for group in groups:
        row = found.get(group)
        missing += row is None
        cells = [_say(column, value) for column, value in zip(by, group, strict=True)]
        cells += ["" for _ in _COLUMNS] if row is None else [write(row) for write in _COLUMNS.values()]
        first, *others = (cell.replace("\n", "<br>") for cell in map(escape, cells))
        line = [f'<td class="gi-by">{cell}</td>' for cell in others[: len(by) - 1]]
        line += [f"<td>{cell}</td>" for cell in others[len(by) - 1 :]]
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(line)}</tr>')
    titles = [escape(h).replace("\n", "<br>") for h in [*map(_title, by), *_COLUMNS]]
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return Html(
        f'{_SCROLL}<table class="dataframe gi-scores"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="caption">Means over images, PSNR with its 95 % bootstrap interval; medians over cases for'
        f" time. Cost is in training steps. {_not_run(missing, len(groups))}</p>"
    )


_SCROLL = '<div class="gi-scroll-x">'


def _number(row: Mapping, name: str, digits: str) -> str:
    return "" if np.isnan(row[name]) else format(row[name], digits)


def _interval(row: Mapping) -> str:
    if np.isnan(row["psnr"]):
        return ""
    return f"{row['psnr']:.1f}\n({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"


def _found(row: Mapping) -> str:
    """Images identified of those that came back or were missed, and how many chance would give."""
    if np.isnan(row["identified"]):
        return ""
    return f"{round(row['identified'] * row['images'])} of {row['images']}\n({row['chance'] * row['images']:.2g})"


def _likeness(row: Mapping) -> str:
    """SSIM, and LPIPS where it was had."""
    perceived = _number(row, "lpips", ".3f")
    return _number(row, "ssim", ".3f") + (perceived and f"\n({perceived})")


def _time(row: Mapping) -> str:
    steps = _number(row, "steps", ".0f")
    return _number(row, "seconds", ".3g") + (steps and f"\n({steps})")


_COLUMNS: dict[str, Callable[[Mapping], str]] = {
    "identified\n(by chance)": _found,
    "dB above floor": lambda row: _number(row, "above", "+.1f"),
    "cost": lambda row: _number(row, "training_steps", ",.0f"),
    "seconds\n(steps)": _time,
    "PSNR (dB)": _interval,
    "SSIM\n(LPIPS)": _likeness,
    "labels": lambda row: _number(row, "label_accuracy", ".0%"),
    "ok / n": lambda row: f"{row['ok']} / {row['n']}" if row["n"] else "does not apply",
}
"""Heads and what a cell says; what answers the question stands first: whether images leak, how well, at what cost."""


def picture_grid(
    frame: pd.DataFrame,
    folder: Path,
    rows: str = "model",
    columns: str = "dataset",
    order: Levels | None = None,
    which: Sequence[str] = ("median",),
) -> Html:
    """For each pair of a row and a column some images: private, then reconstructed, each with its own numbers.

    Args:
        frame: from `results.read`.
        folder: where the studies' files and pictures are.
        rows, columns: names of columns of `frame`.
        order: all the values of them to be shown; a cell without a record stays empty.
        which: of "best", "median" and "worst", by dB above the floor.
    """
    shown = {c: list((order or {}).get(c) or dict.fromkeys(map(_plain, frame[c]))) for c in (rows, columns)}
    plain = {c: [_plain(value) for value in frame[c]] for c in (rows, columns)}
    lines, missing, wide = [], 0, len(shown[columns])
    for down in shown[rows]:
        cells = []
        for across in shown[columns]:
            cases = frame[[pair == (down, across) for pair in zip(plain[rows], plain[columns], strict=True)]]
            missing += cases.empty
            cells.append(f"<td>{'' if cases.empty else _cell(cases, Path(folder), which)}</td>")
        empty = set(cells) <= {"<td></td>"}
        name = escape(_say(rows, down)) + (": not run" if empty else "")
        lines.append(f'<tr class="gi-part"><th scope="rowgroup" colspan="{wide}"><span>{name}</span></th></tr>')
        lines += [] if empty else [f"<tr>{''.join(cells)}</tr>"]
    head = "".join(f'<th scope="col">{escape(_say(columns, across))}</th>' for across in shown[columns])
    return Html(
        f'{_SCROLL}<table class="dataframe gi-grid"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="caption">Each cell: the {_listed(which)} image by dB above its floor, private on the left,'
        " reconstructed on the right; below it its own PSNR, and whether it identifies the private image."
        f" {_not_run(missing, len(shown[rows]) * wide)}</p>"
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cell(cases: pd.DataFrame, folder: Path, which: Sequence[str]) -> str:
    if (cases["status"] == "not applicable").all():
        return "does not apply"
    done = cases[cases["status"] == "ok"]
    count = f"{len(done)} / {(cases['status'] != 'not applicable').sum()} ok"
    if done.empty:
        return count
    shows = [results.pictured(_path(case, folder), case["batch_size"]) for _, case in done.iterrows()]
    images = (
        (psnrs[i] - floors[i], psnrs[i], i, k)
        for k, (psnrs, floors) in enumerate(zip(done["psnr"], done["floor"], strict=True))
        for i in shows[k]
        if psnrs[i] is not None
    )
    ranked = sorted(images)
    if not ranked:
        return f"missed, {count}"
    at = {"worst": 0, "median": (len(ranked) - 1) // 2, "best": len(ranked) - 1}
    shown = [_pair(done, folder, name if len(which) > 1 else "", *ranked[at[name]]) for name in which]
    return f'<div class="gi-pairs" style="display:flex;flex-wrap:wrap;gap:.3rem">{"".join(shown)}</div>{count}'


def _path(case: pd.Series, folder: Path) -> Path:
    return results.picture_path(folder / f"{case['study']}.jsonl", case["key"])


def _pair(done: pd.DataFrame, folder: Path, name: str, above: float, psnr: float, i: int, k: int) -> str:
    """One image and its reconstruction, with the numbers of this image."""
    case = done.iloc[k]
    path, size = _path(case, folder), case["batch_size"]
    truth, reconstruction = results.read_picture(path, size)
    place = results.pictured(path, size).index(i)
    where = f"{case['attack']} on {case['model']}, {case['dataset']}"
    alt = f"Private image and reconstruction, {where}, {psnr:.1f} dB"
    found = "identified" if case["identified"][i] else "not identified"
    own = f"{name and name + ': '}{psnr:.1f} dB, {above:+.1f} from its floor, {found}"
    image = picture(torch.stack([truth[place], reconstruction[place]]), alt, shown=96)
    return f'<div style="width:192px">{image}<div>{own}</div></div>'


def _not_run(missing: int, cells: int) -> str:
    return f"Not run, and empty: {missing} of {cells}." if missing else ""


def _plain(value: object) -> object:
    """None for pandas's missing values."""
    import pandas as pd

    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _title(column: str) -> str:
    return column.replace("_", " ")


def _say(column: str, value: object) -> str:
    """A value of a column in a reader's words."""
    if _plain(value) is None:
        return {"weights": "untrained", "size": "own size"}.get(column, "none")
    return str(value)
