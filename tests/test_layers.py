"""Imports point downwards only, and no attack can see the truth."""

import ast
from pathlib import Path

import pytest

import gi_lib

ROOT = Path(gi_lib.__file__).parent
GROUND = {"types", "provenance", "progress"}  # they import nothing of the package
TOOLS = {"execution", "copies", "matching", "priors", "parametrisations", "checkpoints", "models", "data"}
ABOVE = {  # module -> the modules of gi_lib that it may import
    **dict.fromkeys(GROUND, set()),
    **dict.fromkeys(("execution", "parametrisations"), {"types"}),
    "matching": {"types", "execution"},
    "checks": {"types", "copies", "models"},
    "checkpoints": set(),
    "copies": {"types", "execution"},
    "training": {"types", "progress", "models", "data", "checkpoints"},
    "priors": {"types", "copies", "matching"},
    "models": {"types", "copies", "models"},
    "data": {"types", "data"},
    "labels": {"types", "copies", "models", "labels"},
    "federated": {"types", "execution", "copies", "models", "labels"},
    "defenses": {"types", "copies", "matching", "models", "federated", "defenses"},
    "metrics": {"types", "data"},
    "optimise": {"types", "execution", "progress"},
    "search": {"types", "execution", "labels", "matching", "optimise"},
    "results": {"types", "metrics", "results"},
}
ABOVE["provenance"] = {"gi_lib"}  # its version
ABOVE["attacks"] = (TOOLS - {"data", "checkpoints"}) | {"types", "progress", "labels", "optimise", "search", "attacks"}
ABOVE["bench"] = ABOVE.keys() | {"bench"}
ABOVE["pages"] = {"types", "metrics", "results", "provenance", "attacks"}
ABOVE["audit"] = ABOVE.keys() - {"bench", "pages"} | {"audit"}
ABOVE["plots"] = {"types", "results", "pages", "bench"}
ABOVE["__init__"] = {"types", "federated", "metrics"}
ABOVE["cli"] = ABOVE.keys() - {"__init__"} | {"gi_lib"}
TRUTH = {"Batch", "Scores", "observe", "evaluate"}


def imports(path):
    """(module of gi_lib, name) for every import of gi_lib in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: name the module from gi_lib on"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gi_lib":
            for alias in node.names:
                module = (node.module.split(".")[1:] or [alias.name])[0]
                is_module = (ROOT / module).exists() or (ROOT / f"{module}.py").exists()
                yield (module if is_module else "gi_lib"), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "gi_lib":
                    yield (alias.name.split(".")[1:] or ["gi_lib"])[0], alias.name


def module_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    module = module_of(path)
    assert module in ABOVE, f"{module} is new: say in this table what it may import"
    found = {name for name, _ in imports(path)}
    assert found <= ABOVE[module] | {module}, f"{module} may not import {found - ABOVE[module] - {module}}"


OF_ATTACKS = [path for path in FILES if module_of(path) in ABOVE["attacks"] - {"types"}]


@pytest.mark.parametrize("path", OF_ATTACKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_neither_an_attack_nor_what_it_is_made_of_sees_the_truth(path):
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    names |= {name for _, name in imports(path)}
    assert not names & TRUTH


@pytest.mark.parametrize(
    "source",
    [
        "from gi_lib import metrics",
        "from gi_lib.types import Batch",
        "import gi_lib.metrics",
        "from .. import metrics",
        "from ..federated import FedAvg",
        "import gi_lib\ngi_lib.observe",
    ],
)
def test_the_layer_tests_see_a_breach(source, monkeypatch):
    breach = ROOT / "attacks" / "x.py"
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    with pytest.raises(AssertionError):
        test_imports_point_downwards(breach)
        test_neither_an_attack_nor_what_it_is_made_of_sees_the_truth(breach)
