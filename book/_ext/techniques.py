"""The directive `techniques`: the map of the field, from techniques.yaml, references.bib and the records.

    :::{techniques} table
    :::

`table` lists every technique, a row each, with the anchor `tech-ID` (refer to it by {ref}`DLG <tech-dlg>`) and its
BibTeX. `timeline` draws them by year and family, each a link to its row. Both stand without JavaScript;
_static/techniques.js adds sorting and filters to the table.
"""

import re
import textwrap
from collections import Counter
from html import escape
from pathlib import Path
from urllib.parse import urlencode

import yaml
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from gi_lib import results

PAGE = "book/map"  # where the table stands
COLUMNS = ("name", "authors", "year", "family", "letter", "needs", "recovers", "best known", "ours", "code", "chapter")
HEADS = {"recovers": "recovers, or stops", "ours": "our best result"}
NO_CHAPTER = "no chapter yet"  # techniques.js filters by it


def bibtex(path: Path) -> dict[str, str]:
    """Each entry of a BibTeX file as it was typed, by its key."""
    found = re.finditer(r"^@\w+\{(\w+),\n.*?^\}$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return {match[1]: match[0] for match in found}


def best(frame, attack: str) -> tuple[float, str] | None:
    """A technique's best group of one model and dataset: most images identified, then most dB above the floor.

    Args:
        frame: from `results.read`. The survey's records on the test split are taken, or where it has none those of
            the other studies.

    Returns:
        What to sort by and what the cell says; None where there are no such records.
    """
    tried = frame[(frame["attack"] == attack) & (frame["split"] == "test") & (frame["status"] != "not applicable")]
    survey = tried[tried["study"] == "survey"]
    tried = survey if len(survey) else tried
    found = []
    for (study, model, dataset), cases in tried.groupby(["study", "model", "dataset"]):
        row = results.summarise(cases, ["attack"]).iloc[0]
        if row["ok"]:
            count = sum(sum(images) for images in cases["identified"] if isinstance(images, list))
            images = int(cases["batch_size"].sum())
            said = f"{count} of {images} identified, {row['psnr']:.1f} dB: {model}, {dataset}"
            view = urlencode({"technique": attack, "dataset": dataset, "model": model})
            link = f'<a href="leaderboard.html#{view}">{escape(said)}</a>'
            found.append(
                (count / images, row["above"], link + ("" if study == "survey" else f" <small>{study}</small>"))
            )
    if not found:
        return None
    share, above, said = max(found)
    return 1000 * share + above, said


def known(technique: dict) -> str:
    """The best known result with its source; what was not read in the paper itself is marked."""
    fact = technique["known"]
    if fact is None:
        return '<span class="gi-none">no result read</span>'
    mark = "" if fact["provenance"] == "read" else f", <em>{fact['provenance']}</em>"
    return f"{escape(fact['says'])} <small>({escape(fact['source'])}{mark})</small>"


def row(technique: dict, field: dict, entry: str, ours: tuple[float, str] | None, uri) -> str:
    """One technique as a row of the table; `uri` gives the address of a page as seen from this one."""
    aliases = f"<small>{escape(', '.join(technique['aliases']))}</small>" if technique["aliases"] else ""
    letter, chapter, code = technique["letter"], technique["chapter"], technique["code"]
    address = f"tech-{technique['id']}"
    cite = f'<div class="highlight"><pre>{escape(entry)}</pre></div>'
    cells = {
        "name": f'<a href="#{address}"><b>{escape(technique["name"])}</b></a> {aliases}'
        f"<details><summary>BibTeX</summary>{cite}</details>",
        "authors": escape(technique["authors"]),
        "year": str(technique["year"]),
        "family": escape(field["families"][technique["family"]]),
        "letter": f'<abbr title="{escape(field["letters"][letter])}">{letter}</abbr>' if letter else "–",
        "needs": escape(technique["needs"]),
        "recovers": escape(technique["recovers"]),
        "best known": known(technique),
        "ours": ours[1] if ours else f'<span class="gi-none">{"see the chapter" if chapter else "no record"}</span>',
        "code": f'<a href="{code}">{"GitHub" if "github.com" in code else "code"}</a>' if code else "–",
        "chapter": f'<a href="{uri(chapter)}">chapter</a>' if chapter else f'<span class="gi-none">{NO_CHAPTER}</span>',
    }
    values = {"ours": f' data-value="{ours[0]:.4g}"'} if ours else {}
    body = "".join(
        f'<td data-label="{HEADS.get(name, name)}"{values.get(name, "")}>{cells[name]}</td>' for name in COLUMNS
    )
    return f'<tr id="{address}" data-family="{technique["family"]}">{body}</tr>'


def table(field: dict, entries: dict[str, str], frame, uri) -> str:
    """All techniques in the order of the file."""
    rows = [
        row(t, field, entries[t["bib"]], best(frame, t["ours"]) if t["ours"] else None, uri)
        for t in field["techniques"]
    ]
    head = "".join(f'<th scope="col">{HEADS.get(name, name)}</th>' for name in COLUMNS)
    return (
        '<div id="gi-techniques"><div class="gi-scroll" tabindex="0" role="region" aria-label="All techniques">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


# --- the timeline, in units of the picture

LEFT, WIDE, LINE, TOP = 150, 112, 17, 26


def column(year: int) -> int:
    """2016 to 2018 share the first column."""
    return max(year, 2018) - 2018


def timeline(field: dict, page: str) -> str:
    """One mark a technique by year and family, as an inline SVG in the text's own colour.

    A full mark has a chapter in this book. A click leads to the row of the table on `page`.
    """
    last = max(t["year"] for t in field["techniques"])
    width = LEFT + WIDE * (column(last) + 1)
    parts, y = [], TOP
    for i in range(column(last) + 1):
        said = "to 2018" if i == 0 else str(2018 + i)
        parts.append(f'<text class="gi-year" x="{LEFT + WIDE * i}" y="16">{said}</text>')
    for family, title in field["families"].items():
        members = [t for t in field["techniques"] if t["family"] == family]
        lines = textwrap.wrap(title, 20)
        taken: Counter[int] = Counter()
        parts.append(f'<line class="gi-rule" x1="0" x2="{width}" y1="{y}" y2="{y}"/>')
        for k, line in enumerate(lines):
            parts.append(f'<text class="gi-family" x="0" y="{y + 15 + LINE * k}">{escape(line)}</text>')
        for t in members:
            i = column(t["year"])
            x, at = LEFT + WIDE * i, y + 11 + LINE * taken[i]
            taken[i] += 1
            said = f"{t['name']}, {t['authors']}, {t['year']}" + (": a chapter of this book" if t["chapter"] else "")
            kind = "gi-run" if t["chapter"] else "gi-not-run"
            parts.append(
                f'<a class="{kind}" href="{page}#tech-{t["id"]}"><title>{escape(said)}</title>'
                f'<circle cx="{x + 4}" cy="{at}" r="4"/>'
                f'<text x="{x + 12}" y="{at + 4}">{escape(t.get("short", t["name"]))}</text></a>'
            )
        y += LINE * max(len(lines), *taken.values()) + 10
    said = f"Timeline of {len(field['techniques'])} techniques by year and family; the table of the map says the same."
    return (
        f'<div class="gi-timeline" tabindex="0" role="region" aria-label="Timeline of the field">'
        f'<svg viewBox="0 0 {width} {y}" role="group" aria-label="{said}">{"".join(parts)}</svg></div>'
    )


class Techniques(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        data, works, records = root / "book/techniques.yaml", root / "book/references.bib", root / "results"
        field = yaml.safe_load(data.read_text(encoding="utf-8"))
        if self.arguments[0] == "timeline":
            page = "" if self.env.docname == PAGE else self.uri(PAGE)
            return [nodes.raw("", timeline(field, page), format="html")]
        if self.arguments[0] != "table":
            raise self.error(f"the directive techniques shows a table or a timeline, got {self.arguments[0]!r}")
        entries = bibtex(works)
        lacking = sorted({t["bib"] for t in field["techniques"]} - entries.keys())
        if lacking:
            raise self.error(f"references.bib has no {', '.join(lacking)}, which techniques.yaml names")
        standard = self.env.get_domain("std")
        for technique in field["techniques"]:
            anchor = f"tech-{technique['id']}"
            standard.note_hyperlink_target(anchor, self.env.docname, anchor, technique["name"])
        return [nodes.raw("", table(field, entries, results.read(records), self.uri), format="html")]

    def uri(self, page: str) -> str:
        """The address of a page as seen from this one."""
        return self.env.app.builder.get_relative_uri(self.env.docname, page)


def setup(app):
    app.add_directive("techniques", Techniques)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
