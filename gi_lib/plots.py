"""Figures and tables from records and saved pictures. Each is a piece of a page that a notebook shows.

Figures made with matplotlib have an opaque light ground in dark mode too: their dark lettering needs it.
Colours are those of Okabe and Ito, which readers with colour blindness can tell apart, and never the only
difference. A number that has no record is not printed: cells that were not run are empty, and the caption
counts them.
"""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from gi_lib import results
from gi_lib.pages import Html, picture, provenance, provenance_live, slider
from gi_lib.types import Images

__all__ = [
    "Figure",
    "Html",
    "compare",
    "curves",
    "losses",
    "picture_grid",
    "provenance",
    "provenance_live",
    "quality_against_time",
    "slider",
    "table",
]

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GROUND = "#ffffff"


@dataclass(frozen=True, repr=False)
class Figure:
    """A matplotlib figure with its alternative text.

    Args:
        figure: a matplotlib.figure.Figure, to save or to change.
        alt: what a reader who can't see it should know.
    """

    figure: object
    alt: str

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        style = f"width:{round(96 * self.figure.get_figwidth())}px;max-width:100%;height:auto"
        return f'<img class="dark-light" alt="{escape(self.alt)}" src="{source}" style="{style}">'

    def __repr__(self) -> str:
        return f"Figure({self.alt})"


def _axes(width: float, height: float):
    """A figure of inches and its axes, without pyplot: nothing global, nothing shown twice."""
    from matplotlib.figure import Figure as MatplotlibFigure

    figure = MatplotlibFigure(figsize=(width, height), layout="constrained", facecolor=GROUND)
    axes = figure.add_subplot(facecolor=GROUND)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def compare(truth: Images, reconstruction: Images, psnr: Sequence[float] | Tensor | None = None) -> Html:
    """Private images [B, C, H, W] and their reconstructions in the same order, one above the other.

    Args:
        psnr: B values in dB, printed below.
    """
    values = [None] * len(truth) if psnr is None else [float(v) for v in psnr]
    columns = []
    for i, value in enumerate(values):
        said = "" if value is None else f"{value:.1f} dB"
        number = f" {i + 1}" if len(truth) > 1 else ""
        top = picture(truth[i : i + 1], f"Private image{number}")
        bottom = picture(reconstruction[i : i + 1], f"Reconstruction{number}{said and ', PSNR ' + said}")
        columns.append(
            f'<figure style="margin:0;min-width:0">{top}<div style="height:.3rem"></div>{bottom}'
            f"<figcaption>{said or '&nbsp;'}</figcaption></figure>"
        )
    return Html(
        '<div class="gi-pictures" style="color:inherit"><div style="display:flex;flex-wrap:wrap;gap:.6rem">'
        + "".join(columns)
        + "</div><p>Above: private. Below: reconstructed.</p></div>"
    )


def losses(trace: Float[Tensor, "steps R"], *, chosen: int | None = None) -> Figure:
    """The loss of every restart before each step, on a logarithmic axis; `chosen` is drawn bold."""
    figure, axes = _axes(5.2, 2.9)
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


def quality_against_time(frame: pd.DataFrame, by: Sequence[str] = ("attack",), clock: str = "training_steps") -> Figure:
    """Mean PSNR with its 95 % interval against the median cost of a case, one point a group.

    Args:
        frame: from `results.read`.
        by: columns that make a group.
        clock: "training_steps" (comparable between machines), "seconds" or "steps".
    """
    figure, axes = _axes(5.2, 3.3)
    summary = results.summarise(frame, by).dropna(subset=["psnr", clock])
    styles = itertools.cycle(zip(OKABE_ITO, MARKERS, strict=True))
    said = []
    for (_, row), (colour, marker) in zip(summary.iterrows(), styles, strict=False):
        name = ", ".join(_say(column, row[column]) for column in by)
        interval = [[row["psnr"] - row["psnr_low"]], [row["psnr_high"] - row["psnr"]]]
        axes.errorbar(row[clock], row["psnr"], interval, color=colour, marker=marker, capsize=3, label=name)
        said.append(f"{name}: {row['psnr']:.1f} dB at {row[clock]:.3g}")
    unit = {
        "training_steps": "cost of a case in training steps",
        "seconds": "seconds a case",
        "steps": "steps",
    }
    axes.set(xlabel=unit[clock], ylabel="PSNR (dB)", xscale="log")
    if said:
        axes.legend(fontsize="small", frameon=False)
    return Figure(figure, f"PSNR against {unit[clock]}. {'; '.join(said) or 'No case has run'}.")


def curves(frame: pd.DataFrame, x: str, y: str, by: Sequence[str], labels: tuple[str, str]) -> Figure:
    """One line a group on logarithmic axes, through its rows in the order of x.

    Args:
        frame: any table with these columns.
        x, y: columns of positive numbers.
        by: columns that make a group.
        labels: what stands at the two axes.
    """
    figure, axes = _axes(5.2, 3.3)
    said = []
    styles = itertools.cycle(zip(OKABE_ITO, MARKERS, strict=True))
    for (group, rows), (colour, marker) in zip(frame.groupby(list(by), sort=False), styles, strict=False):
        name, rows = ", ".join(map(str, group)), rows.sort_values(x)
        axes.plot(rows[x], rows[y], color=colour, marker=marker, linewidth=1.2, label=name)
        first, last = rows.iloc[0], rows.iloc[-1]
        said.append(f"{name}: {first[y]:.3g} at {first[x]:g}, {last[y]:.3g} at {last[x]:g}")
    axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log", yscale="log")
    axes.legend(fontsize="small", frameon=False)
    return Figure(figure, f"{labels[1]} against {labels[0]}. {'; '.join(said)}.")


Order = Mapping[str, Sequence]
"""Column -> all its values to be shown, in order, whether they were run or not."""


def table(
    frame: pd.DataFrame,
    by: Sequence[str] = ("attack", "model", "weights", "dataset"),
    order: Order | None = None,
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
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in [*map(_title, by), *_COLUMNS])
    return Html(
        '<div style="overflow-x:auto"><table class="dataframe" style="white-space:nowrap"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="caption">Means over images, PSNR with its 95 % bootstrap interval; medians over cases for'
        f" time. Cost is in training steps. {_not_run(missing, len(groups))}</p>"
    )


def _number(row: Mapping, name: str, digits: str) -> str:
    return "" if pd.isna(row[name]) else format(row[name], digits)


def _interval(row: Mapping) -> str:
    if pd.isna(row["psnr"]):
        return ""
    return f"{row['psnr']:.1f} ({row['psnr_low']:.1f} to {row['psnr_high']:.1f})"


_COLUMNS = {
    "ok / n": lambda row: f"{row['ok']} / {row['n']}" if row["n"] else "does not apply",
    "PSNR (dB)": _interval,
    "SSIM": lambda row: _number(row, "ssim", ".3f"),
    "LPIPS": lambda row: _number(row, "lpips", ".3f"),
    "identified": lambda row: _number(row, "identified", ".0%"),
    "labels": lambda row: _number(row, "label_accuracy", ".0%"),
    "seconds": lambda row: _number(row, "seconds", ".3g"),
    "steps": lambda row: _number(row, "steps", ".0f"),
    "cost": lambda row: _number(row, "training_steps", ",.0f"),
}


def picture_grid(
    frame: pd.DataFrame,
    folder: Path,
    rows: str = "model",
    columns: str = "dataset",
    order: Order | None = None,
) -> Html:
    """For each pair of a row and a column the image of median PSNR: private, then reconstructed.

    Args:
        frame: from `results.read`.
        folder: where the studies' files and pictures are.
        rows, columns: names of columns of `frame`.
        order: all the values of them to be shown; a cell without a record stays empty.
    """
    shown = {c: list((order or {}).get(c) or dict.fromkeys(map(_plain, frame[c]))) for c in (rows, columns)}
    plain = pd.DataFrame({c: frame[c].map(_plain) for c in (rows, columns)}, dtype=object)
    lines, missing = [], 0
    for down in shown[rows]:
        cells = []
        for across in shown[columns]:
            cases = frame[[pair == (down, across) for pair in zip(plain[rows], plain[columns], strict=True)]]
            missing += cases.empty
            cells.append(f"<td>{'' if cases.empty else _cell(cases, Path(folder))}</td>")
        lines.append(f'<tr><th scope="row">{escape(_say(rows, down))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escape(_say(columns, across))}</th>' for across in shown[columns])
    return Html(
        '<div style="overflow-x:auto"><table class="dataframe" style="white-space:nowrap"><thead><tr>'
        f"<td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        '<p class="caption">Each cell: the image of median PSNR, private on the left, reconstructed on the'
        " right; below it the mean PSNR and the cases that succeeded."
        f" {_not_run(missing, len(shown[rows]) * len(shown[columns]))}</p>"
    )


def _cell(cases: pd.DataFrame, folder: Path) -> str:
    if (cases["status"] == "not applicable").all():
        return "does not apply"
    done = cases[cases["status"] == "ok"]
    count = f"{len(done)} / {len(cases)} ok"
    if done.empty:
        return count
    ranked = sorted((psnr, i, k) for k, row in enumerate(done["psnr"]) for i, psnr in enumerate(row))
    psnr, i, k = ranked[(len(ranked) - 1) // 2]
    case = done.iloc[k]
    path = results.picture_path(folder / f"{case['study']}.jsonl", case["key"])
    truth, reconstruction = results.read_picture(path, case["batch_size"])
    where = f"{case['attack']} on {case['model']}, {case['dataset']}"
    alt = f"Private image and reconstruction, {where}, {psnr:.1f} dB"
    mean = np.mean([value for value, _, _ in ranked])
    return f"{picture(torch.stack([truth[i], reconstruction[i]]), alt, shown=64)}{mean:.1f} dB, {count}"


def _not_run(missing: int, cells: int) -> str:
    return f"Not run, and empty: {missing} of {cells}." if missing else ""


def _plain(value: object) -> object:
    """None for pandas's missing values."""
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else value


def _title(column: str) -> str:
    return column.replace("_", " ")


def _say(column: str, value: object) -> str:
    """A value of a column in a reader's words."""
    if _plain(value) is None:
        return {"weights": "untrained", "size": "own size"}.get(column, "none")
    return str(value)
