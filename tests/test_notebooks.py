"""The notebooks: they run from top to bottom in a strange directory, define nothing, and are committed with outputs."""

import ast
import base64
import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
LARGEST_IMAGE = 1.5e6  # bytes
# A path of the machine that executed it says nothing to the reader, and too much about the machine.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|Users|private|var|opt)/|[A-Z]:\\\\Users")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_four_notebooks_are_there():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@each_notebook
def test_a_notebook_calls_code_and_defines_none(path):
    for cell in cells(path, "code"):
        lines = [line for line in source(cell).splitlines() if not line.startswith(("%", "!"))]
        nodes = list(ast.walk(ast.parse("\n".join(lines))))
        assert not [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]
    assert "google.colab" in source(cells(path, "code")[0])


@each_notebook
def test_a_notebook_is_committed_as_it_ran_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    images = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= 4
    assert max(len(base64.b64decode(image)) for image in images) < LARGEST_IMAGE


@each_notebook
def test_outputs_name_no_path_of_the_machine_that_made_them(path):
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            assert not ABSOLUTE_PATH.search(json.dumps([output.get("text", ""), data], ensure_ascii=False))


@pytest.mark.notebook
@each_notebook
def test_a_notebook_runs_in_a_strange_directory(path, tmp_path, monkeypatch, root):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    search = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    for name, value in {
        "NOTEBOOK_FAST": "1",
        "PYTHONPATH": search,
        "TMPDIR": str(tmp_path),
        "TEMP": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel brings its own
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises the first error of a cell
    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(shown) >= 4
