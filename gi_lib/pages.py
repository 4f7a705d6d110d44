"""Pieces of a page that ask nothing of a server: pictures, a slider over the iterations, provenance lines."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from gi_lib import provenance as made
from gi_lib import results
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
    """An <img> of images side by side, enlarged without smoothing, and never wider than the page.

    Each image is about `shown` CSS pixels wide, a multiple of its own width.
    The class keeps the book's theme from dimming it in dark mode: its colours are what is shown.
    """
    count, _, _, width = images.shape
    total = count * width * max(1, round(shown / width))
    style = f"width:{total}px;max-width:100%;height:auto;image-rendering:pixelated;display:block"
    return f'<img class="dark-light" alt="{escape(alt)}" src="{png(images)}" style="{style}">'


def slider(
    frames: Float[Tensor, "F B C H W"],
    frame_steps: Sequence[int],
    truth: Images | None = None,
    losses: Sequence[float] | Float[Tensor, " F"] | None = None,
    *,
    alt: str = "The reconstruction",
) -> Html:
    """Snapshots of a reconstruction behind an <input type="range">; without JavaScript the last one is seen.

    Args:
        frames: [F, B, C, H, W] in [0, 1], as `Reconstruction.frames`.
        frame_steps: F step numbers.
        truth: [B, C, H, W], shown beside the frames.
        losses: F values, shown below the frames.
        alt: what the picture shows; the step is added to it.

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
    sources = [png(frame) for frame in frames]
    name = "gi-" + hashlib.sha256("".join([*texts, *sources, alt]).encode()).hexdigest()[:10]
    last = len(frames) - 1
    pictures = "" if truth is None else _figure(picture(truth, "The private images"), "private")
    pictures += _figure(picture(frames[last], f"{alt}, {texts[last]}"), "reconstruction")
    return Html(
        _SLIDER.substitute(
            name=name,
            pictures=pictures,
            last=last,
            now=escape(texts[last]),
            alt=json.dumps(alt).replace("<", "\\u003c"),
            texts=json.dumps(texts),
            sources=json.dumps(sources),
        )
    )


def _figure(image: str, caption: str) -> str:
    return f'<figure style="margin:0;min-width:0">{image}<figcaption>{caption}</figcaption></figure>'


def provenance(frame: pd.DataFrame, study: str) -> Html:
    """The line below a figure or table made from records: what they are, what made them, and where they are.

    Args:
        frame: the records that were used.
        study: its name; the line links to ../results/<study>.jsonl.
    """
    if frame.empty:  # and perhaps no file either, to which a link could lead
        return Html(f'<p class="provenance">Study {escape(study)}: no records</p>')
    link = f'<a href="../results/{escape(study)}.jsonl">{escape(study)}</a>'
    ok = int((frame["status"] == "ok").sum())
    versions = [f"{name} {version}" for row in frame["versions"] for name, version in row.items()]
    days = sorted(datetime.fromisoformat(started).date().isoformat() for started in frame["started"])
    facts = [
        f"{ok} of {len(frame)} cases ok",
        "commit " + ", ".join(dict.fromkeys(c if isinstance(c, str) else "unknown" for c in frame["commit"])),
        _seeds(sorted(set(frame["seed"]))),
        "profile " + ", ".join(dict.fromkeys(frame["profile"])),
        ", ".join(dict.fromkeys(versions)),
        *dict.fromkeys(frame["device"]),
        *dict.fromkeys(frame["precision"]),
        days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}",
    ]
    return Html(f'<p class="provenance">Study {link}: {escape("; ".join(facts))}</p>')


def provenance_live(seed: int, profile: str, device: str | None = None) -> Html:
    """The line below a figure or table that the page itself computed.

    Args:
        device: as in `bench.run`; None is a GPU where there is one.
    """
    device = made.choose_device(device)
    versions = ", ".join(f"{name} {version}" for name, version in made.versions().items())
    facts = (
        f"commit {made.commit() or 'unknown'}",
        f"seed {seed}",
        f"profile {profile}",
        versions,
        made.device_name(device),
        made.precision(device),
    )
    return Html(f'<p class="provenance">Computed by this page: {escape("; ".join(facts))}</p>')


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
<div style="display:flex;flex-wrap:wrap;gap:1rem">$pictures</div>
<input type="range" min="0" max="$last" value="$last" step="1" aria-label="Step of the reconstruction"
 aria-valuetext="$now" style="width:min(100%,24rem);margin:.6rem 0 .2rem;accent-color:currentColor">
<div class="gi-now" style="font-variant-numeric:tabular-nums">$now</div>
<script>
(() => {
  const box = document.getElementById("$name");
  const input = box.querySelector("input"), now = box.querySelector(".gi-now");
  const image = box.querySelector("figure:last-child img");
  const texts = $texts, sources = $sources, alt = $alt;
  input.addEventListener("input", () => {
    const i = Number(input.value);
    image.src = sources[i];
    image.alt = alt + ", " + texts[i];
    now.textContent = texts[i];
    input.setAttribute("aria-valuetext", texts[i]);
  });
})();
</script>
</div>""")


EXPLORED = (
    *("attack", "model", "dataset", "identified", "above", "psnr", "ssim", "lpips", "recall", "label_accuracy"),
    *("status", "seconds", "steps", "training_steps", "weights", "threat_letter", "client", "defense", "study", "key"),
)
"""Columns of the results explorer, in its order."""


def explorer(frame: pd.DataFrame, folder: Path, plain: Html | str = "") -> Html:
    """All records as data inside the page, for book/_static/explorer.js to search, filter, sort and draw.

    Args:
        frame: from `results.read`.
        folder: where the studies' files and pictures are; only pictures that exist there are shown.
        plain: what a reader without JavaScript sees instead.
    """
    rows = [_explored(row, Path(folder)) for row in frame.to_dict("records")]
    data = {"columns": [*EXPLORED, "error", "picture"], "rows": rows}
    # Inside <script> no "<" may stand: "</script>" would end it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return Html(
        f'<div id="gi-explorer" data-results="../results/"><div class="gi-plain">{plain}</div>'
        f'<script type="application/json">{text}</script></div>'
    )


def _explored(row: dict[str, Any], folder: Path) -> list:
    """The values of one record: scores are means over its images, rounded to what is shown."""
    said: list = []
    for column in (*EXPLORED, "error"):
        value = _above(row) if column == "above" else row[column]
        if isinstance(value, list):
            numbers = [v for v in value if v is not None]
            value = sum(numbers) / len(numbers) if numbers else None
        if value is None or value != value:  # pandas has NaN for None
            said.append(None)
        elif isinstance(value, float):
            said.append(int(value) if value.is_integer() else float(f"{value:.4g}"))
        else:
            said.append(value)
    picture = row["status"] == "ok" and (folder / str(row["study"]) / f"{row['key']}.png").is_file()
    return [*said, int(row["batch_size"]) if picture else 0]


def _above(row: dict[str, Any]) -> list[float] | None:
    """dB above the floor of each image that was not missed."""
    if not isinstance(row["psnr"], list) or not isinstance(row["floor"], list):
        return None
    pairs = zip(row["psnr"], row["floor"], strict=True)
    return [psnr - floor for psnr, floor in pairs if psnr is not None and not math.isnan(psnr)]
