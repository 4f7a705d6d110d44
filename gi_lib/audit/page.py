"""An audit as one page: no script, no request, light and dark, wide and narrow."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gi_lib.audit.report import Audit, Finding

_CLASS = {
    "leaks": "bad",
    "refuse it": "bad",
    "leaks in part": "part",
    "determined nearby": "part",
    "not found": "open",
    "not determined": "open",
    "open": "open",
    "no sign": "open",
    "too few": "open",
    "not tried": "none",
}

# Colours are the page's own, so that the report follows its ground; the four of the answers are read on both.
STYLE = """<style>
.gi-audit{font:1rem/1.5 system-ui,sans-serif;max-width:52rem;margin:0 auto;overflow-wrap:break-word;color:inherit}
.gi-audit :is(h2,h3){font-size:1.15rem;margin:1.6rem 0 .5rem}
.gi-audit section :is(h3,h4){font-size:1rem;margin:0 0 .2rem}
.gi-audit p{margin:.25rem 0}
.gi-audit .gi-said{font-size:1.1rem;font-weight:600;border-left:.35rem solid;padding:.2rem 0 .2rem .7rem}
.gi-audit section{border:1px solid rgba(128,128,128,.45);border-left:.35rem solid;border-radius:.4rem;
 padding:.6rem .8rem;margin:.7rem 0}
.gi-audit .gi-bad{border-left-color:#d0452f}.gi-audit .gi-part{border-left-color:#c98a1b}
.gi-audit .gi-open{border-left-color:#3b82b8}.gi-audit .gi-none{border-left-color:#888}
.gi-audit .gi-answer{font-weight:700}
.gi-audit dl{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.15rem .8rem;margin:.3rem 0;font-size:.92rem}
.gi-audit dt{opacity:.9}.gi-audit dd{margin:0;min-width:0}
.gi-audit table{border-collapse:collapse;width:100%;font-size:.92rem}
.gi-audit th,.gi-audit td{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;
 border-bottom:1px solid rgba(128,128,128,.3);background:transparent;color:inherit}
.gi-audit figure{margin:.5rem .8rem .2rem 0;display:inline-block;vertical-align:top;max-width:100%}
.gi-audit img{image-rendering:pixelated;height:auto;max-width:100%;display:block;background:transparent}
.gi-audit figcaption{font-size:.82rem;max-width:20rem}
.gi-audit ul{margin:.3rem 0;padding-left:1.2rem}
.gi-audit .gi-lead{display:flex;gap:.4rem 1rem;align-items:flex-start;margin:.7rem 0}
.gi-audit .gi-lead figure{flex:none;margin:0}.gi-audit .gi-lead figcaption{max-width:11rem}
.gi-audit .gi-answers{flex:1}
.gi-audit .gi-answers td:nth-child(2){border-left-width:.35rem;border-left-style:solid;padding-left:.5rem;
 white-space:nowrap}
@media(max-width:30rem){.gi-audit .gi-lead figure{display:none}
 .gi-audit .gi-answers :is(th,td:nth-child(2)){display:inline;padding:0 .4rem 0 0}
 .gi-audit .gi-answers td:nth-child(2){padding-left:.4rem}
 .gi-audit .gi-answers :is(th,td){line-height:1.3;font-size:.85rem;padding-top:0}
 .gi-audit .gi-answers tr{padding:.25rem 0}
 .gi-audit dl{grid-template-columns:1fr}.gi-audit :is(tr,th,td){display:block}
 .gi-audit :is(th,td:nth-child(2)){border-width:0;padding-bottom:0}}
</style>"""

READING = (
    ("floor", "the PSNR of the image's own mean colour: what an attacker reaches who finds out no more than that"),
    ("recovered", "at least 6 dB above the floor: half the error of the mean colour"),
    ("dB", "decibels of PSNR, at most 150; from 58.9 on the error is under that of 8 bits"),
    (
        "identified",
        "nearer to its original than to any of the other images that clients may have, or that are embedded",
    ),
    (
        "chance",
        "how often an image is identified by pictures that tell nothing of it, at most, or a label guessed",
    ),
    ("letter", "the threat model in the taxonomy of Carletti et al. (2025), from A, an eavesdropper, to G"),
)


def body(audit: Audit, *, heading: int = 3) -> str:
    """The report as a piece of a page, whose own headings are of levels up to `heading` - 1."""
    h = f"h{heading}"
    care = "".join(f"<li>{escape(text)}</li>" for text in audit.care)
    untried = "".join(f"<li>{escape(what)}: {escape(why)}</li>" for what, why in audit.untried)
    facts = "".join(
        f"<tr><th scope='row'>{escape(what)}</th><td>{escape(value)}</td><td>{escape(means)}</td></tr>"
        for what, value, means in audit.facts
    )
    findings = sorted(audit.findings, key=_weight)
    answers = "".join(
        f"<tr><th scope='row'>{escape(f.question)}</th><td class='gi-{_CLASS[f.answer]}'><b>{escape(f.answer)}</b></td>"
        f"<td>{escape(f.sure)}</td></tr>"
        for f in findings
    )
    advice = "".join(f"<li>{escape(text)}</li>" for text in audit.advice)
    return (
        f"{STYLE}<div class='gi-audit'><p class='gi-said gi-{_CLASS[audit.answer]}'>{escape(audit.headline)}</p>"
        f"<div class='gi-lead'>{_figures(audit.shown)}<table class='gi-answers'><tbody>{answers}</tbody></table></div>"
        f"<{h}>What to change</{h}><ul>{advice}</ul>"
        + (f"<{h}>Take care</{h}><ul>{care}</ul>" if care else "")
        + f"<{h}>What leaks, and how that is known</{h}>"
        + "".join(_section(finding, f"h{heading + 1}") for finding in findings)
        + f"<{h}>What was not tried</{h}><ul>{untried}</ul>"
        f"<{h}>The setting</{h}><table><tbody>{facts}</tbody></table>"
        f"<{h}>How to read it</{h}><dl>{_terms(READING)}</dl>"
        "<p>An audit can show that a model leaks, and never that it does not.</p>"
        f"<{h}>How it was made</{h}><dl>{_terms(tuple(audit.made.items()))}</dl></div>"
    )


def whole(audit: Audit) -> str:
    """The report as a page of its own."""
    return _page(f"Is {audit.name} exposed?", body(audit, heading=2))


def failed(name: str, reason: str) -> str:
    """The page of an audit that could not run."""
    said = f"<p class='gi-said gi-bad'>The audit did not run.</p><p>{escape(reason)}</p>"
    return _page(f"Is {name} exposed?", f"{STYLE}<div class='gi-audit'>{said}</div>")


def _page(title: str, inner: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>:root{{color-scheme:light dark}}"
        "body{font:1rem/1.5 system-ui,sans-serif;margin:1rem auto;padding:0 1rem;max-width:52rem}"
        "h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{inner}</main></body></html>\n"
    )


def _section(finding: Finding, h: str) -> str:
    terms = (("evidence", finding.evidence), ("how sure", finding.sure), ("attacker", finding.attacker))
    return (
        f"<section class='gi-{_CLASS[finding.answer]}'><{h}>{escape(finding.question)}</{h}>"
        f"<p class='gi-answer'>{escape(finding.answer)}</p><dl>{_terms(terms)}</dl>"
        f"{_figures(finding.pictures)}</section>"
    )


def _weight(finding: Finding) -> tuple[int, bool]:
    """The worst answers first, and of those images."""
    return list(_CLASS).index(finding.answer), finding.numbers.get("kind") != "images"


def _figures(pictures: tuple[tuple[str, str], ...]) -> str:
    return "".join(
        f"<figure><img class='dark-light' alt='{escape(caption)}' src='{uri}' style='min-width:min(100%,9rem)'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, uri in pictures
    )


def _terms(pairs: tuple[tuple[str, str], ...]) -> str:
    return "".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in pairs)
