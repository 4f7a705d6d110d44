"""What came of an audit: one finding a question, the report of all, and its files."""

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gi_lib.audit import page

ANSWERS = ("leaks", "leaks in part", "not found", "not tried")
"""From the worst. None of them says "safe"."""
REFUSED, NO_SIGN = "refuse it", "no sign"
"""Answers to whether the model looks planted."""
BOUND = "Where a bound is needed whoever attacks: DP-SGD, with accounting over all rounds. Nothing else here gives one."


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Args:
        question: what is asked.
        answer: one of ANSWERS; of what is counted "determined nearby", "not determined", "too few", or "open"; of the
            client's checks "refuse it" or "no sign".
        sure: how sure that is, and why.
        evidence: what was measured, each number with its floor and its chance.
        attacker: what the attacker must know or do, with the letter of the threat model.
        numbers: the same numbers, for the JSON.
        pictures: caption and data URI.
        change: what makes the answer better, or surer.
    """

    question: str
    answer: str
    sure: str
    evidence: str
    attacker: str
    numbers: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[tuple[str, str], ...] = ()
    change: str = ""

    @property
    def leaks(self) -> bool:
        """Whether something was shown to leak, at least in part."""
        return self.answer in ANSWERS[:2]


@dataclass(frozen=True)
class Audit:
    """What was asked of a model, and what came of it.

    Args:
        name: of the model.
        facts: what it is, its value, and what that means for what leaks.
        findings: one a question.
        untried: what was not tried, and why.
        care: warnings that bear on the result.
        made: what made the numbers.
    """

    name: str
    facts: tuple[tuple[str, str, str], ...]
    findings: tuple[Finding, ...]
    untried: tuple[tuple[str, str], ...]
    care: tuple[str, ...]
    made: dict[str, str]

    @property
    def answer(self) -> str:
        """The worst of ANSWERS that was found on images, of a server that is honest."""
        honest = [f for f in self.findings if f.numbers.get("kind") == "images" and not f.numbers.get("malicious")]
        return min((f.answer for f in honest), key=ANSWERS.index, default="not tried")

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change: of each finding that leaks, and how to look again where no images were found."""
        leaking = [f.change for f in self.findings if (f.leaks or f.answer == REFUSED) and f.change]
        again = [f.change for f in self.findings if f.answer == self.answer == "not found" and f.change]
        return (*dict.fromkeys(leaking + again), BOUND)

    @property
    def shown(self) -> tuple[tuple[str, str], ...]:
        """The pictures of the worst that was found: of an honest server, if images leak to one."""
        leaking = [f for f in self.findings if f.leaks and f.pictures]
        ranked = sorted(leaking, key=lambda f: (bool(f.numbers.get("malicious")), ANSWERS.index(f.answer)))
        return tuple((f"{f.question} {caption}", uri) for f in ranked[:1] for caption, uri in f.pictures[:1])

    @property
    def headline(self) -> str:
        """One sentence: the worst that was found of an honest server, and of one that changes the model."""
        said = {
            "leaks": "Exposed: images come back from the update",
            "leaks in part": "Exposed in part: some of an image comes back from the update",
            "not found": "No image was found within this budget, which proves nothing beyond it",
            "not tried": "No attack on the images could be run",
        }[self.answer]
        more = []
        if any(f.leaks for f in self.findings if f.numbers.get("kind") == "labels"):
            more.append("labels leak")
        if any(f.leaks for f in self.findings if f.numbers.get("kind") == "statistics"):
            more.append("the batch's statistics leak")
        if any(f.leaks for f in self.findings if f.numbers.get("malicious")):
            more.append("a server that changes the model gets images")
        if any(f.answer == REFUSED for f in self.findings):
            more.append("the model itself looks planted")
        return f"{said}{'; ' if more else ''}{'; '.join(more)}."

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, of types that JSON has."""
        findings = [{k: v for k, v in vars(f).items() if k != "pictures"} for f in self.findings]
        return {
            "name": self.name,
            "headline": self.headline,
            "what_to_change": list(self.advice),
            "facts": {what: value for what, value, _ in self.facts},
            "findings": findings,
            "not_tried": dict(self.untried),
            "take_care": list(self.care),
            "made": self.made,
        }

    def page(self) -> str:
        """The report as one self-contained HTML page."""
        return page.whole(self)

    def _repr_html_(self) -> str:
        return page.body(self)


def write(path: str | Path, html: str, values: dict[str, Any]) -> Path:
    """Write a report and the JSON beside it, each whole or not at all; returns where the JSON is.

    Raises:
        ValueError: the page would have the name of the JSON.
        OSError: they can't be written; then what was there before is still there.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(f"{path} would be the page and its JSON at once: name the page {path.with_suffix('.html')}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.with_suffix(".json").is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder has the name of the numbers", str(path.with_suffix(".json")))
    texts = {path: html, path.with_suffix(".json"): json.dumps(values, indent=1, ensure_ascii=False) + "\n"}
    parts = {where: where.with_name(f".{where.name}.{os.getpid()}.part") for where in texts}
    try:
        for where, text in texts.items():
            parts[where].write_text(text, encoding="utf-8")
        for where, part in parts.items():
            part.replace(where)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return path.with_suffix(".json")


def write_failure(path: str | Path, name: str, reason: str) -> bool:
    """Write the page of an audit that could not run, and its JSON, unless a report is there; returns whether it was.

    Only what an audit that could not run has left there is replaced.

    Raises:
        OSError: they can't be written.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    if path.exists() or beside.exists():
        try:
            earlier = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if not isinstance(earlier, dict) or earlier.keys() != {"name", "error"}:
            return False
    write(path, page.failed(name, reason), {"name": name, "error": reason})
    return True
