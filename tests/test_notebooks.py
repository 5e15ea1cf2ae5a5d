"""The notebooks: they run from top to bottom, and their committed outputs are complete and tidy.

python tests/test_notebooks.py      runs all of them in full and writes the new outputs into the files
"""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
IMAGES = {"01_grpo_step_by_step": 7, "02_advantage_estimators": 15}  # at least so many pictures; 1 for others
WIDGET = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|private|var|mnt|content|usr)/|[A-Z]:\\\\?Users")


def with_palette(png: str) -> str:
    """The picture in at most 256 colours, which looks the same and takes a third of the room: base64 -> base64."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def execute(path: Path):
    """The notebook with fresh outputs from a kernel that starts in its folder; raises if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, resources=resources, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata.pop("widgets", None)  # sliders need a kernel; what a reader without one sees is in other cells
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = with_palette(output.data["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}  # no version numbers that differ between machines
    return notebook


def check_outputs(notebook, images: int) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not run once, top to bottom"
    outputs = [output for cell in cells for output in cell.outputs]
    for output in outputs:
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", f"a warning or a progress bar: {output.text[:300]}"
        data = output.get("data", {})
        texts = [output.get("text", ""), *(x for kind, x in data.items() if not kind.startswith("image/"))]
        found = [text for text in texts if MACHINE_PATH.search(str(text))]
        assert not found, f"names a folder of one machine: {found[0][:300]}"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= images


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", "3")  # of the full training run in it, to save time
    check_outputs(execute(path), IMAGES.get(path.stem, 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook, IMAGES.get(path.stem, 1))
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 10**6


@pytest.mark.parametrize(
    "text, caught",
    [("in /home/ann/runs", True), ("'/tmp/x1/run'", True), (r"C:\Users\ann", True), ("and/or 3/work/2 a/tmp/b", False)],
)
def test_what_counts_as_a_machine_path(text, caught):
    assert bool(MACHINE_PATH.search(text)) == caught


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(execute(path), path)
        print(f"wrote {path.name}", file=sys.stderr)
