"""Imports point downwards only, and no attack can see the truth."""

import ast
from pathlib import Path

import pytest

import gi_lib

ROOT = Path(gi_lib.__file__).parent
ABOVE = {  # module -> the modules of gi_lib that it may import
    "types": set(),
    "matching": {"types"},
    "priors": {"types"},
    "parametrisations": {"types"},
    "labels": {"types"},
    "defenses": {"types"},
    "federated": {"types", "defenses"},
    "execution": {"types"},
    "optimise": {"types", "execution"},
    "targets": {"types", "optimise"},
    "models": {"types", "models"},
    "attacks": {"types", "matching", "priors", "parametrisations", "labels", "optimise", "targets", "attacks"},
    "data": {"types", "data"},
    "metrics": {"types", "data"},
    "provenance": {"gi_lib"},
    "results": {"types"},
}
ABOVE["bench"] = ABOVE.keys() - {"bench"}
ABOVE["pages"] = {"types", "results", "provenance"}
ABOVE["plots"] = {"types", "results", "provenance", "pages"}
ABOVE["__init__"] = {"types", "federated", "metrics"}
ABOVE["cli"] = ABOVE.keys() - {"cli", "__init__"} | {"gi_lib"}
TRUTH = {"Batch", "Scores", "observe", "evaluate"}


def imports(path):
    """(module of gi_lib, name) for every import of gi_lib in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
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


@pytest.mark.parametrize("path", sorted((ROOT / "attacks").glob("*.py")), ids=lambda p: p.name)
def test_no_attack_sees_the_truth(path):
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {name for _, name in imports(path)}
    assert not names & TRUTH


def test_the_layer_tests_see_a_breach(tmp_path, monkeypatch):
    breach = ROOT / "attacks" / "x.py"
    source = "from gi_lib import metrics\nfrom gi_lib.types import Batch\n"
    monkeypatch.setattr(Path, "read_text", lambda self: source)
    assert dict(imports(breach)) == {"metrics": "metrics", "types": "Batch"}
