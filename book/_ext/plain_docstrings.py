"""Lets sphinx.ext.autodoc read docstrings that are written for people in a terminal.

The package's docstrings hold formulas such as `D = 1 - <g', g> / (|g'| |g|)` and `x*`, which
reStructuredText takes for markup. Outside of backquotes they are escaped here, and an indented paragraph is
shown as it was typed. Then napoleon reads the sections (Args, Raises).
"""

import re

from sphinx.ext.napoleon import Config, GoogleDocstring

MARKUP = re.compile(r"(`[^`]*`)|([|*])|(\w_)(?=\W|$)")


def escape(line: str) -> str:
    return MARKUP.sub(lambda m: m[1] or (m[2] and "\\" + m[2]) or m[3][:-1] + "\\_", line)


def convert(lines: list[str]) -> list[str]:
    """The same docstring in reStructuredText: indented paragraphs as literal blocks, the rest escaped."""
    converted: list[str] = []
    literal, blank = False, True
    for line in lines:
        indented = line.startswith("    ")
        if indented and blank and not literal and any(converted):
            converted += [".. code-block:: text", ""]
            literal = True
        elif line.strip() and not indented:
            literal = False
        converted.append(line if literal else escape(line))
        blank = not line.strip()
    return converted


def process(app, what, name, obj, options, lines):
    if any(line.lstrip().startswith((".. ", ":class:", ":ref:")) for line in lines):
        return
    # For an attribute napoleon would take "One step: moves ..." for a type and its description.
    kind = "function" if what in {"attribute", "data", "property"} else what
    lines[:] = GoogleDocstring(convert(lines), Config(), app, kind, name, obj, options).lines()


def setup(app):
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
