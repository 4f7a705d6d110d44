"""Pieces of a page that ask nothing of a server: pictures, a slider, provenance lines, tables that a script sorts."""

from __future__ import annotations

import ast
import base64
import dataclasses
import gzip
import hashlib
import inspect
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from gi_lib import metrics, results
from gi_lib import provenance as made
from gi_lib.attacks import ATTACKS
from gi_lib.results import export, verdicts
from gi_lib.types import Images

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Html:
    """A piece of a page. Notebooks show it; `str` is its source."""

    source: str

    def _repr_html_(self) -> str:
        return self.source

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"Html({len(self.source)} characters)"


def png(images: Images) -> str:
    """Images [B, C, H, W] in [0, 1] side by side, as the data URI of a lossless 8-bit PNG; NaN is black."""
    buffer = io.BytesIO()
    results.bitmap([images]).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(images: Images, alt: str, *, shown: int = 160) -> str:
    """An <img> of images side by side, each `shown` CSS pixels wide, and never wider than the page.

    It is enlarged without smoothing, and made smaller with it.
    The class keeps the book's theme from dimming it in dark mode: its colours are what is shown.
    """
    count, _, _, width = images.shape
    style = f"width:{count * shown}px;max-width:100%;height:auto;display:block"
    style += ";image-rendering:pixelated" if shown >= width else ""
    return f'<img class="dark-light" alt="{escape(alt)}" src="{png(images)}" style="{style}">'


def slider(
    frames: Float[Tensor, "F B C H W"],
    frame_steps: Sequence[int],
    truth: Images | None = None,
    losses: Sequence[float] | Float[Tensor, " F"] | None = None,
    *,
    candidates: Images | None = None,
    alt: str = "The reconstruction",
    shown: int = 160,
) -> Html:
    """Snapshots of a reconstruction behind an <input type="range"> that plays; without JavaScript the last is seen.

    Args:
        frames: [F, B, C, H, W] in [0, 1], as `Reconstruction.frames`.
        frame_steps: F step numbers.
        truth: [B, C, H, W], shown above the frames; each frame is matched with it, and says its own PSNR.
        losses: F values, shown below the frames.
        candidates: [N, C, H, W], the truth among them; a frame says whether it identifies its image among these.
        alt: what the picture shows; the step is added to it.
        shown: the width of an image in CSS pixels.

    Raises:
        ValueError: there are no frames, or the lengths differ.
    """
    if frames is None or frames.ndim != 5 or len(frames) == 0:
        raise ValueError("no frames to show; ask the attack for some, such as DLG(frames=40)")
    values = None if losses is None else [float(v) for v in losses]
    if len(frame_steps) != len(frames) or (values is not None and len(values) != len(frames)):
        given = "" if values is None else f" and {len(values)} losses"
        raise ValueError(f"{len(frames)} frames need as many steps and losses, got {len(frame_steps)} steps{given}")
    if truth is not None and truth.shape != frames.shape[1:]:
        raise ValueError(f"truth {list(truth.shape)} does not fit the frames {list(frames.shape)}")
    texts = [f"step {s} of {frame_steps[-1]}" for s in frame_steps]
    if values is not None:
        texts = [f"{text}, loss {value:.2e}" for text, value in zip(texts, values, strict=True)]
    pictured, scores = list(frames), ["reconstruction"] * len(frames)
    if truth is not None:
        pictured = [frame[metrics.align(frame, truth)] if frame.isfinite().all() else frame for frame in frames]
        scores = ["; ".join(verdict(truth, frame, candidates)) for frame in pictured]
    sources = [png(frame) for frame in pictured]
    name = "gi-" + hashlib.sha256("".join([*texts, *scores, *sources, alt]).encode()).hexdigest()[:10]
    last = len(frames) - 1
    pictures = ""
    if truth is not None:
        floors = ", ".join(f"{value:.1f}" for value in metrics.floor(truth).tolist())
        pictures = _figure(picture(truth, "The private images", shown=shown), f"private; floor {floors} dB")
    pictures += _figure(picture(pictured[last], f"{alt}, {texts[last]}", shown=shown), scores[last])
    return Html(
        _SLIDER.substitute(
            name=name,
            pictures=pictures,
            last=last,
            now=escape(texts[last]),
            alt=json.dumps(alt).replace("<", "\\u003c"),
            texts=json.dumps(texts),
            scores=json.dumps(scores),
            sources=json.dumps(sources),
        )
    )


def _figure(image: str, caption: str) -> str:
    return f'<figure style="margin:0;min-width:0">{image}<figcaption>{caption}</figcaption></figure>'


def verdict(truth: Images, reconstruction: Images, candidates: Images | None = None) -> list[str]:
    """What is said below each reconstruction: its PSNR, that beside its floor, and whether it identifies its image.

    Args:
        truth, reconstruction: [B, C, H, W] in the same order.
        candidates: [N, C, H, W], as large and with the truth among them; without them identification is left out.
    """
    if not reconstruction.isfinite().all():
        return ["pixels that are no numbers"]
    pairs = zip(metrics.psnr(reconstruction, truth).tolist(), metrics.floor(truth).tolist(), strict=True)
    said = [f"{psnr:.1f} dB, {psnr - floor:+.1f} from its floor" for psnr, floor in pairs]
    if candidates is None:
        return said
    found = metrics.identified(reconstruction, truth, candidates).tolist()
    return [
        f"{text}, {'' if hit else 'not '}identified among {len(candidates)}"
        for text, hit in zip(said, found, strict=True)
    ]


def origin(line: str, facts: Sequence[str], study: str = "") -> Html:
    """The line below a figure or table: what made it. A click opens the rest.

    Args:
        line: what is always seen.
        facts: what is seen when it is opened.
        study: where its records are, below results/ and without the ending; the opened line links to them.
    """
    link = f'<a href="../results/{escape(study)}.jsonl">records</a>; ' if study else ""
    return Html(
        f'<details class="provenance"><summary>{escape(line)}</summary>{link}{escape("; ".join(facts))}</details>'
    )


def provenance(frame: pd.DataFrame, study: str) -> Html:
    """The line below a figure or table made from records: what they are, and opened, what made them and where they are.

    Args:
        frame: the records that were used.
        study: its name; the opened line links to ../results/<study>.jsonl.
    """
    if frame.empty:  # and perhaps no file either, to which a link could lead
        return Html(f'<p class="provenance">Study {escape(study)}: no records</p>')
    ok = int((frame["status"] == "ok").sum())
    versions = [f"{name} {version}" for row in frame["versions"] for name, version in row.items()]
    days = sorted(datetime.fromisoformat(started).date().isoformat() for started in frame["started"])
    facts = [
        "commit " + ", ".join(dict.fromkeys(c if isinstance(c, str) else "unknown" for c in frame["commit"])),
        _seeds(sorted(set(frame["seed"]))),
        "profile " + ", ".join(dict.fromkeys(frame["profile"])),
        ", ".join(dict.fromkeys(versions)),
        *dict.fromkeys(frame["device"]),
        *dict.fromkeys(frame["precision"]),
    ]
    when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return origin(f"Study {study}: {ok} of {len(frame)} cases ok, {when}", facts, study)


def provenance_live(seed: int, profile: str, device: str | None = None) -> Html:
    """The line below a figure or table that the page itself computed.

    Args:
        device: as in `bench.run`; None is a GPU where there is one.
    """
    device = made.choose_device(device)
    versions = ", ".join(f"{name} {version}" for name, version in made.versions().items())
    facts = (f"commit {made.commit() or 'unknown'}", versions, made.device_name(device), made.precision(device))
    return origin(f"Computed by this page: seed {seed}, profile {profile}", facts)


def _seeds(seeds: Sequence[int]) -> str:
    """ "seeds 0 to 7, 9" of sorted numbers."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][1] + 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    said = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
    return f"seed{'s' if len(seeds) > 1 else ''} {said}"


# The id comes from the content, so that a page which is built twice is the same. Colours are inherited, for
# light and dark pages. `aria-valuetext` is what a screen reader says while the slider moves.
_SLIDER = Template("""<div class="gi-slider" id="$name" style="color:inherit;margin:0 0 1rem">
<div style="display:flex;flex-direction:column;gap:.3rem">$pictures</div>
<div style="display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .8rem;margin:.4rem 0 0">
<button type="button" style="font:inherit;min-width:5.5em">&#9654; play</button>
<input type="range" min="0" max="$last" value="$last" step="1" aria-label="Step of the reconstruction"
 aria-valuetext="$now" style="flex:0 1 20rem;min-width:8rem;accent-color:currentColor">
<span class="gi-now" style="font-variant-numeric:tabular-nums">$now</span></div>
<script>
(() => {
  const box = document.getElementById("$name");
  const input = box.querySelector("input"), button = box.querySelector("button"), now = box.querySelector(".gi-now");
  const image = box.querySelector("figure:last-child img"), score = box.querySelector("figure:last-child figcaption");
  const texts = $texts, scores = $scores, sources = $sources, alt = $alt;
  let timer = 0;
  const show = (i) => {
    input.value = i;
    image.src = sources[i];
    image.alt = alt + ", " + texts[i];
    score.textContent = scores[i];
    now.textContent = texts[i];
    input.setAttribute("aria-valuetext", texts[i]);
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "\\u25b6 play";
  };
  input.addEventListener("input", () => { stop(); show(Number(input.value)); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    let i = Number(input.value) >= sources.length - 1 ? -1 : Number(input.value);
    button.textContent = "\\u275a\\u275a pause";
    timer = setInterval(() => { show(i += 1); if (i >= sources.length - 1) stop(); }, 150);
  });
})();
</script>
</div>""")


EXPLORED = (
    *("attack", "model", "dataset", "identified", "above", "floor", "psnr", "training_steps", "seconds"),
    *("tv", "budget", "batch_size", "precision", "ssim", "lpips", "recall", "label_accuracy", "status", "steps"),
    *("restarts", "lr", "attack_text", "weights", "images", "size", "threat_letter", "client", "defense", "clients"),
    *("rounds", "seed", "device", "commit", "started", "study", "key"),
)
"""Columns of the results explorer, in its order; the first 13 are seen unless all are asked for."""


def explorer(frame: pd.DataFrame, folder: Path, plain: Html | str = "") -> Html:
    """All records as data inside the page, for book/_static/explorer.js to search, filter, sort and draw.

    The data is JSON, compressed by gzip and written in base64, so that the page stays light as records are added. A
    column is a list of numbers, or, where it has a text, {"values": the texts, "codes": their places, -1 for null};
    without codes each row has the text of its own place.

    Args:
        frame: from `results.read`.
        folder: where the studies' files and pictures are; only pictures that exist there are shown.
        plain: what a reader without JavaScript sees instead.
    """
    pictures = {(path.parent.name, path.stem): path for path in Path(folder).glob("*/*.png")}
    rows = [_explored(row, pictures) for row in frame.to_dict("records")]
    columns = {name: _packed([row[name] for row in rows]) for name in (*EXPLORED, "case", "error", "picture")}
    data = {
        "rows": len(rows),
        "shown": 13,
        "columns": columns,
        "papers": {name: _paper(name) for name in dict.fromkeys(frame["attack"])},
        "meaning": {name: export.COLUMNS[name].meaning for name in EXPLORED if name in export.COLUMNS},
        "remake": export.REMAKE,
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return Html(
        '<div id="gi-explorer" data-results="../results/" data-records="../records/">'
        f'<div class="gi-plain">{plain}</div><script type="application/gzip">{packed}</script></div>'
    )


def data_dictionary(folder: str = "../records/") -> Html:
    """What each column of the records' files means, below links to the files, which the build puts into `folder`."""
    links = ", ".join(f'<a href="{folder}{name}" download>{name}</a>' for name in export.TABLES)
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(line["column"])}</code></th><td>{_coded(line["meaning"])}</td>'
        f"<td>{escape(line['type'])}</td><td>{escape(line['unit'])}</td><td>{escape(line['range'])}</td></tr>"
        for line in export.dictionary()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("column", "meaning", "type", "unit", "range"))
    return Html(
        f'<p>{links}</p><div class="gi-dictionary" tabindex="0" role="region" aria-label="Data dictionary">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _coded(text: str) -> str:
    """Words between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _packed(values: list) -> list | dict[str, list]:
    if not any(isinstance(value, str) for value in values):
        return values
    places = {value: i for i, value in enumerate(dict.fromkeys(v for v in values if v is not None))}
    codes = {"codes": [-1 if value is None else places[value] for value in values]}
    return {"values": list(places)} | ({} if len(places) == len(values) else codes)


def _explored(row: dict[str, Any], pictures: dict[tuple[str, str], Path]) -> dict[str, Any]:
    """The values of one record: scores are means over its images, rounded to what is shown."""
    settings = _settings(row)
    path = pictures.get((row["study"], row["key"])) if row["status"] == "ok" else None
    values = row | {
        "above": _above(row),
        "tv": settings.get("tv"),
        "lr": settings.get("lr"),
        "images": f"{row['split']} {', '.join(map(str, row['indices']))}",
        "started": row["started"][:10],
        "picture": len(results.pictured(path, row["batch_size"])) if path else 0,
    }
    return {name: _brief(values[name]) for name in (*EXPLORED, "case", "error", "picture")}


def _brief(value: Any) -> str | int | float | None:
    """A text, or the mean of a list, or a number, of four digits."""
    if isinstance(value, list):
        numbers = [v for v in value if v is not None]
        value = sum(numbers) / len(numbers) if numbers else None
    if _empty(value):
        return None
    if isinstance(value, str):
        return value
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")


def _settings(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers among an attack's settings: its defaults, and what its record says otherwise."""
    known = ATTACKS.get(row["attack"])
    own = {f.name: f.default for f in dataclasses.fields(known)} if known else {}
    call = ast.parse(row["attack_text"], mode="eval").body
    if isinstance(call, ast.Call):
        own |= {k.arg: k.value.value for k in call.keywords if k.arg and isinstance(k.value, ast.Constant)}
    return {name: value for name, value in own.items() if type(value) in (int, float)}


def _paper(attack: str) -> str:
    """Title, authors and year of a technique, the first paragraph of its module; its name for one that is not ours."""
    known = ATTACKS.get(attack)
    about = inspect.getdoc(inspect.getmodule(known)) if known else None
    return " ".join(about.partition("\n\n")[0].split()) if about else attack


def _above(row: dict[str, Any]) -> list[float] | None:
    """dB above the floor of each image that was not missed."""
    if not isinstance(row["psnr"], list) or not isinstance(row["floor"], list):
        return None
    pairs = zip(row["psnr"], row["floor"], strict=True)
    return [psnr - floor for psnr, floor in pairs if psnr is not None and not math.isnan(psnr)]


BOARD: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "technique": ("text", lambda row: _two_lines(row["attack"], _setting(row))),
    "model": ("text", lambda row: _two_lines(row["model"], "" if _empty(row["weights"]) else row["weights"])),
    "dataset": ("text", lambda row: escape(row["dataset"])),
    "batch": ("more", lambda row: str(row["batch_size"])),
    "identified": ("more", lambda row: _identified(row)),
    "dB above floor": ("more", lambda row: _said(row["above"], "+.1f")),
    "cost in training steps": ("less", lambda row: _said(row["training_steps"], ",.0f")),
    "PSNR (dB)": ("more", lambda row: _said(row["psnr"], ".1f")),
    "gradient evaluations": ("less", lambda row: _said(row["evaluations"], ",.0f")),
    "threat": ("text", lambda row: escape(row["threat_letter"])),
    "study": ("text", lambda row: ", ".join(map(_study_link, row["studies"]))),
}
"""Columns of the leaderboard: whether more or less is better, or it is a text, and what a cell says."""


def leaderboard(frame: pd.DataFrame) -> Html:
    """One row for each technique, setting, threat model, network and dataset, the best first.

    The endpoints in their order: the share of images identified, then decibels above the floor. A row at or below its
    floor, and not identified more often than chance explains, stands in a part of its own, behind the others. The
    images of failed cases count as not identified. book/_static/leaderboard.js sorts and filters; without JavaScript
    the table stands as it is.

    Args:
        frame: from `results.read`. Attacks on a train split, by which settings are chosen, are left out; a case of
            several studies counts once, by its newest record.
    """
    tested = frame[frame["split"] == "test"].sort_values("started", kind="stable")
    studies = {case: sorted(set(part)) for case, part in tested.groupby("case")["study"]}
    newest = tested.drop_duplicates("case", keep="last")
    listed = newest[newest["status"] != "not applicable"]
    by = results.usual_groups(listed)
    groups = [part for _, part in listed.groupby(by, dropna=False, sort=False)]
    summary = results.summarise(listed, by).to_dict("records")
    rows = [_ranked(part, row, studies) for part, row in zip(groups, summary, strict=True)]
    rows.sort(key=lambda row: (-row["found"] / row["tried"], math.inf if _empty(row["above"]) else -row["above"]))
    better: list[str] = []
    rest: list[str] = []
    for row in rows:
        worth = row["above"] > 0 or verdicts.beyond_chance(row["found"], row["tried"], row["chance"])
        (better if worth else rest).append(_board_row(row))
    head = "".join(
        f'<th scope="col" data-sort="{kind}"{_SORTED if name == "identified" else ""}>{name}</th>'
        for name, (kind, _) in BOARD.items()
    )
    part = f'<tr class="gi-part"><th scope="rowgroup" colspan="{len(BOARD)}"><span>{_NO_BETTER}</span></th></tr>'
    out = [f"{n} {what}" for n, what in _left_out(frame, tested, newest, listed) if n]
    said = f"{len(rows)} rows of {len(listed)} records." + (f" Not listed: {'; '.join(out)}." if out else "")
    return Html(
        '<div id="gi-leaderboard"><div class="gi-scroll" tabindex="0" role="region" aria-label="Leaderboard"'
        f' style="overflow-x:auto"><table class="dataframe"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(better)}</tbody><tbody class="gi-rest">{part if rest else ""}{"".join(rest)}</tbody>'
        f'</table></div><p class="caption">{said}</p></div>'
    )


_SORTED = ' aria-sort="descending"'
_NO_BETTER = "No better than the image's mean colour, and identified no more often than chance explains"


def _left_out(*frames: pd.DataFrame) -> list[tuple[int, str]]:
    whole, tested, newest, listed = map(len, frames)
    return [
        (whole - tested, "of attacks on train images, by which settings are chosen"),
        (tested - newest, "of a case that another record is of too"),
        (newest - listed, "of a technique that does not apply to the network or batch"),
    ]


def _ranked(cases: pd.DataFrame, summary: dict[str, Any], studies: dict[str, list[str]]) -> dict[str, Any]:
    """A row of the leaderboard: a group's summary, its first record for what they all share, and what ranks it."""
    tried = int(cases["batch_size"].sum())
    found = sum(sum(images) for images in cases["identified"] if isinstance(images, list))
    chance = 0.0 if _empty(summary["chance"]) else summary["chance"]
    return {
        **cases.iloc[0].to_dict(),
        **summary,
        "tried": tried,
        "found": found,
        "chance": chance,
        "failed": int((cases["status"] == "failed").sum()),
        "evaluations": cases["gradient_evaluations"].astype(float).median(),
        "studies": sorted({name for case in cases["case"] for name in studies[case]}),
    }


def _board_row(row: dict[str, Any]) -> str:
    share = f' data-value="{row["found"] / row["tried"]:.4g}"'
    cells = (f"<td{share if name == 'identified' else ''}>{write(row)}</td>" for name, (_, write) in BOARD.items())
    return f"<tr>{''.join(cells)}</tr>"


def _setting(row: dict[str, Any]) -> str:
    """What of an attack and its case is not at its default; not its steps, which the evaluations tell."""
    own = re.sub(r"\bsteps=\d+(, )?", "", row["attack_text"].partition("(")[2].removesuffix(")"))
    facts = re.findall(r"(\w+)=(\w+)", row["threat"])
    granted = ", ".join(name.replace("_", " ") + ("" if value == "True" else ": no") for name, value in facts)
    said = {
        own.removesuffix(", "): True,
        granted.replace(", knows ", ", "): True,
        row["client"]: row["client"] != "FedSGD",
        row["defense"]: not _empty(row["defense"]),
        f"{row['size']} px": not _empty(row["size"]),
        row["precision"]: row["precision"] != "float32",
        "train mode": row["train"],
        f"{row['clients']} clients": row["clients"] > 1,
        f"{row['rounds']} rounds": row["rounds"] > 1,
        f"auxiliary {row['auxiliary']}": not _empty(row["auxiliary"]),
    }
    return ", ".join(text for text, unusual in said.items() if text and unusual)


def _two_lines(name: str, more: str) -> str:
    return escape(name) + (f"<br><small>{escape(more)}</small>" if more else "")


def _identified(row: dict[str, Any]) -> str:
    failed = f"{row['failed']} failed, " if row["failed"] else ""
    return _two_lines(f"{row['found']} of {row['tried']}", f"{failed}chance {100 * row['chance']:.2g} %")


def _study_link(name: str) -> str:
    return f'<a href="../results/{escape(name)}.jsonl">{escape(name)}</a>'


def _empty(value: Any) -> bool:
    """None, or what pandas has for it."""
    import pandas as pd

    return bool(pd.isna(value))


def _said(value: float, digits: str) -> str:
    return "" if _empty(value) else format(value, digits)
