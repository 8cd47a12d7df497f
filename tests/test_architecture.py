"""ARCHITECTURE.md is true: who imports whom, what is imported when, and that importing is inert."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "pyrovae").glob("**/*.py"))
NAMES = [str(path.relative_to(ROOT / "pyrovae").with_suffix("")) for path in FILES]
# A folder is one room: its files may import each other.
ROOM = {path: name.split("/")[0] for path, name in zip(FILES, NAMES, strict=True)}
MODULES = sorted(set(ROOM.values()))
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
HEAVY = ("torchvision", "sklearn", "matplotlib", "PIL")
ARVIZ = ("arviz", "arviz_base", "arviz_stats", "arviz_plots")


class Import(NamedTuple):
    """An imported module, the names taken from it, and whether that happens later or never."""

    module: str
    names: tuple[str, ...]
    later: bool  # inside a function
    typing: bool  # for the type checker alone


class Row(NamedTuple):
    """What a module may import when it is imported itself, and what only later."""

    now: set[str]
    later: set[str]


def imports_of(source: str) -> list[Import]:
    """Every import statement, wherever it stands, and every call of import_module on a name."""
    found = []

    def visit(node: ast.AST, later: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, (), later, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = tuple(alias.name for alias in node.names)
            found.append(Import(module, names, later, typing))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.JoinedStr):  # what stands before the first hole
                name = name.values[0]
            if isinstance(name, ast.Constant):
                found.append(Import(str(name.value), (), later, typing))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, later, True)
            for child in node.orelse:
                visit(child, later, typing)
            return
        inside = later or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside, typing)

    visit(ast.parse(source), False, False)
    return found


def own(found: Import) -> set[str]:
    """The modules of this package that an import names; relative imports count as absolute."""
    module = found.module
    if module.startswith("."):
        module = "pyrovae" + ("." + module.lstrip(".") if module.strip(".") else "")
    if module == "pyrovae":
        # Any other name, or the package itself, comes by way of __init__.
        return {name if name in MODULES else "__init__" for name in found.names or ("",)}
    return {module.split(".")[1]} - {""} if module.startswith("pyrovae.") else set()


def broken(name: str, source: str, table: dict[str, Row]) -> set[str]:
    """The imports of a module that the table does not allow."""
    row = table.get(name, Row(set(), set()))
    return {
        module
        for found in imports_of(source)
        for module in own(found) - {name}
        if module not in row.now and not ((found.later or found.typing) and module in row.later)
    }


def read_table(page: str) -> dict[str, Row]:
    section = page.split("## Who may import whom")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    cells = [[set(re.findall(r"`(\w+)`", cell)) for cell in line] for line in lines[2:]]
    table = {next(iter(name)): Row(now, later) for name, now, later in cells}
    for name in re.findall(r"^\| `(\w+)` \| all of them \|", section, re.MULTILINE):
        table[name].now.update(table.keys() - {name, "__main__"})
    return table


TABLE = read_table(PAGE)


def test_every_file_has_a_row() -> None:
    assert set(TABLE) == set(MODULES)


def test_every_file_has_a_room() -> None:
    section = PAGE.split("## Rooms")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    rooms = {room for cell in cells for room in re.findall(r"`(\w+)(?:\.py|/)`", cell)}
    assert rooms == set(MODULES) - {"__init__", "__main__"}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_are_allowed(path: Path) -> None:
    assert broken(ROOM[path], path.read_text(encoding="utf-8"), TABLE) == set()


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from pyrovae.vae import VAE", {"vae"}),
        ("from pyrovae import vae, errors", {"vae"}),
        ("import pyrovae.vae as v", {"vae"}),
        ("import importlib\nimportlib.import_module(f'pyrovae.vae.{name}')", {"vae"}),
        ("from . import vae", {"vae"}),
        ("from .vae import VAE", {"vae"}),
        ("import pyrovae", {"__init__"}),
        ("from pyrovae import VAE, errors", {"__init__"}),
        ("def f():\n    from pyrovae.vae import VAE", {"vae"}),
        ("if TYPE_CHECKING:\n    from pyrovae.vae import VAE", {"vae"}),
        ("import importlib\nimportlib.import_module('pyrovae.vae')", {"vae"}),
        ("from pyrovae.errors import InputError\nimport pyro", set()),
        ("from pyrovae.data import Data", {"data"}),
        ("def f():\n    from pyrovae.data import Data", set()),
        ("if TYPE_CHECKING:\n    from pyrovae.data import Data", set()),
    ],
)
def test_a_forbidden_import_is_seen(source: str, wrong: set[str]) -> None:
    table = {"importance": Row({"errors"}, {"data"})}
    assert broken("importance", source, table) == wrong


def test_imports_run_one_way() -> None:
    done: set[str] = {"__init__"}
    left = {name: row.now - {"__init__"} for name, row in TABLE.items() if name != "__init__"}
    while left:
        ready = {name for name, needs in left.items() if needs <= done}
        assert ready, f"a circle among {sorted(left)}"
        done |= ready
        left = {name: needs for name, needs in left.items() if name not in ready}


def test_no_drawer_for_odds_and_ends() -> None:
    stems = {path.stem for path in FILES}
    assert not {"utils", "util", "base", "common", "helpers", "misc"} & stems


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_who_imports_other_packages(path: Path) -> None:
    for found in imports_of(path.read_text(encoding="utf-8")):
        package = found.module.split(".")[0]
        if package in HEAVY:
            assert found.later or found.typing, f"{found.module} at the top of {path.name}"
        if package in ARVIZ:
            assert path.name == "diagnostics.py", f"{found.module} in {path.name}"
            assert found.later, f"{found.module} at the top of {path.name}"


def python(code: str) -> str:
    """Run code in a fresh interpreter at the root of the checkout; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:pyrovae", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_costs_no_torch() -> None:
    code = """
import contextlib, sys
import pyrovae, pyrovae.cli
with contextlib.suppress(SystemExit):
    pyrovae.cli.main(["train", "--help"])
print("\\nLOADED", *({"torch", "pyro", "numpy", "matplotlib"} & set(sys.modules)))
"""
    assert python(code).splitlines()[-1] == "LOADED"


STATE = """
import gc, importlib, json, logging, os, pathlib, random, signal, sys, threading, warnings
import matplotlib, numpy, pyro, pyro.distributions, pyro.infer, pyro.optim, torch

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "torch stream": torch.get_rng_state().tolist(),
        "numpy stream": str(numpy.random.get_state()),
        "python stream": str(random.getstate()),
        "numpy errors": numpy.geterr(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "pyro settings": {k: str(v) for k, v in pyro.settings.get().items()},
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.distributions.Normal._validate_args,
        "param store": sorted(pyro.get_param_store().keys()),
        "warnings": list(map(str, warnings.filters)),
        "rcParams": dict(map(lambda kv: (kv[0], str(kv[1])), matplotlib.rcParams.items())),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "log handlers": str(logging.getLogger().handlers),
        "excepthook": str(sys.excepthook),
        "path": list(sys.path),
        "directory": os.getcwd(),
        "thread count": threading.active_count(),
    }

before = state()
{change}
for path in sorted(pathlib.Path("pyrovae").glob("**/*.py")):
    if path.stem not in ("__main__", "__init__"):
        importlib.import_module(".".join(path.with_suffix("").parts))
after = state()
print("IMPORTED", sum(name.startswith("pyrovae.") for name in sys.modules))
print("CHANGED", json.dumps([name for name in before if before[name] != after[name]]))
"""


def changed(change: str = "") -> str:
    imported, found = python(STATE.replace("{change}", change)).splitlines()[-2:]
    assert int(imported.split()[1]) >= len(FILES) - 2  # all but __main__ and the package itself
    return found


def test_importing_changes_nothing() -> None:
    assert changed() == "CHANGED []"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("torch.manual_seed(1)", "torch stream"),
        ("torch.set_default_dtype(torch.float64)", "default dtype"),
        ("pyro.enable_validation(False)", "pyro settings"),
        ("pyro.param('w', torch.zeros(1))", "param store"),
        ("warnings.simplefilter('ignore')", "warnings"),
        ("matplotlib.rcParams['font.size'] = 3", "rcParams"),
    ],
)
def test_a_change_is_seen(change: str, seen: str) -> None:
    assert f'"{seen}"' in changed(change)
