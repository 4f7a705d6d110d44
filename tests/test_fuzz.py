"""Odd input over the public API, in a process of its own: right answers, or errors of the package's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_odd_input_gets_a_right_answer_or_an_error_of_the_packages_own():
    command = [sys.executable, "tests/fuzz.py", "--count", "600", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (errors of the package's own|right answers)", done.stdout)}
    assert counts["right answers"] > 30 and counts["errors of the package's own"] > 200
