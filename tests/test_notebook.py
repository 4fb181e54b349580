"""The notebook: every cell runs."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="pip install 'moco-det[docs]'")
nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_every_cell_of_the_walk_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("MOCO_DET_WALK", "quick")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "walk.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=800, kernel_name="python3").execute(cwd=str(ROOT))
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # views, curves, detections
    printed = "".join(output.get("text", "") for output in outputs)
    assert "pre-training done" in printed
    assert "AP50" in printed
