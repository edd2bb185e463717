"""The notebooks run from top to bottom, and what is checked in of them is what a reader should see."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
nbformat = pytest.importorskip("nbformat")
MACHINE = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|mnt|Users|work)/")  # paths that a reader has not
LIMIT = 600  # seconds of a cell, on a machine that does other things too


def test_there_are_five():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_"]


@EACH
def test_a_notebook_is_as_it_was_run(path):
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert path.stat().st_size < 400_000
    assert f"notebooks/{path.name}" in (ROOT / "README.md").read_text()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert not MACHINE.search(str(output)), cell.source


@pytest.mark.slow
@EACH
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("JAX_NUMPY_RANK_PROMOTION")  # a reader's jax takes what MJX does
    NotebookClient(nbformat.read(path, 4), timeout=LIMIT, kernel_name="python3").execute()
