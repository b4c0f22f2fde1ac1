"""The house: who may import whom. Outer rooms -> root -> support, and no circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEART = "clip_text unet vae model reflow loss data train sample fid".split()
NETWORKS = {"clip_text", "unet", "vae"}
# Inside the root: whom each module may import, of the root.
ALLOWED = {
    "clip_text": set(), "unet": set(), "vae": {"unet"}, "model": NETWORKS, "reflow": set(), "loss": set(),
    "data": {"reflow"}, "train": {"model", "reflow", "loss", "data", *NETWORKS}, "sample": {"model", "reflow"},
    "fid": set(),
}  # fmt: skip
ROOMS = "support", "evaluation", "miniature", "paper", "tools"
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]
    if file.stem != "__init__"
}


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def test_the_root_holds_ten_modules():
    assert sorted(name for name in MODULES if "." not in name) == sorted(HEART)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_inwards(module):
    room = module.partition(".")[0] if "." in module else "root"
    for other in imports(module):
        if room == "support":
            assert other.startswith("support."), f"{module} imports {other}"
        elif room == "root":
            assert other.startswith("support.") or other in ALLOWED[module], f"{module} imports {other}"
    if module in ("reflow", "loss"):
        assert not imports(module)


def test_imports_have_no_circle():
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()  # raises CycleError


def test_nobody_imports_a_helper_from_sample():
    """Its `generate` and its table of samplers are what it is for."""
    for module, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "sample":
                assert {alias.name for alias in node.names} <= {"generate", "SAMPLERS"}, module
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sample":
                assert node.attr in {"generate", "SAMPLERS"} or module.startswith("support"), f"{module}: {node.attr}"
