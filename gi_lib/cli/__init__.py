"""The `gi` command. What a subcommand needs is imported when it runs, so that `--help` waits for nothing."""

import os
import sys

from gi_lib.cli.app import app
from gi_lib.cli.one import attack, audit, from_spec, parse_indices
from gi_lib.cli.studies import check, load_study, run
from gi_lib.cli.tables import list_, score, table

__all__ = [
    "app",
    "attack",
    "audit",
    "check",
    "from_spec",
    "list_",
    "load_study",
    "main",
    "parse_indices",
    "run",
    "score",
    "table",
]


def main() -> None:
    """What the installed `gi` runs."""
    sys.path.append("")  # a user's own models and attacks lie where the command is given
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that has no letter for a name shows a question mark
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read it has enough; Python would complain once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
