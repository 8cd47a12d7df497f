"""Every notebook is committed executed, and runs from its first cell to its last."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]

# In a process of its own: a kernel's sockets and event loop are no concern of these tests.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
place = {"metadata": {"path": sys.argv[2]}}
NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
text = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
print(len(text), "characters of output")
"""


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook that are not empty."""
    notebook = nbformat.read(path, as_version=4)
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def test_there_is_a_notebook() -> None:
    assert "01_first_vae" in NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_as_executed(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = code_cells(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for c in cells for output in c.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.get("text")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_committed_small_and_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 600_000
    for place in (str(ROOT), str(Path.home()) + os.sep, "site-packages"):
        assert place not in text, f"{place} is a place on one machine"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYROVAE_SMOKE": "1", "PYTHONPATH": str(ROOT)}
    here = tmp_path / "notebooks"  # what it writes stays there, what it reads lies beside it
    here.mkdir()
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(here)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
