"""The notebooks run from the first cell to the last, without an error and without a warning."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_without_error_or_warning(path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}, allow_errors=False
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", f"cell {cell.id} wrote to stderr: {output['text']}"
    # Lines, as the kernel joins what is printed in quick succession.
    printed = [o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    assert "".join(printed).count("\n") > 10, "hardly a line was printed: did the notebook run?"


def test_all_are_found():
    assert [path.stem for path in NOTEBOOKS] == [
        "cache_budget",
        "compose_transforms",
        "distill_transfer",
        "one_backbone_two_teachers",
        "sampling",
        "your_own_model",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_clean_as_committed(path):
    """Outputs are cleared, cells are short, and no machine's paths are in it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert re.search(r"/(home|work|tmp|Users)/", path.read_text(encoding="utf-8")) is None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"cell {cell.id} has outputs: clear them"
            assert len(cell.source.splitlines()) <= 45, f"cell {cell.id} is long: split it"


def test_every_code_cell_is_explained():
    """A newcomer reads prose at least before every third code cell."""
    for path in NOTEBOOKS:
        run = 0
        for cell in nbformat.read(path, as_version=4).cells:
            run = run + 1 if cell.cell_type == "code" else 0
            assert run <= 3, f"{path.stem}: more than three code cells in a row at {cell.id}"
