"""The corpus that needs no download: the prose that comes with every CPython.

About 2.2 MB of English in 600 documents: the help topics of `pydoc_data` (the language reference), and the docstrings
of the standard library, one document per module. Both differ between Python versions, so compare loss curves only
between data sets with the same sha256. Python Software Foundation licence.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from gpt2repro.options import say

# Test code, and installed packages, which are not part of CPython.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo", "__pycache__"}


def python_docs() -> Iterator[str]:
    """The documents, in an order that depends on the Python version only; takes about two seconds.

    The standard library is parsed and never imported, so none of its code runs.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # in Debian's python3-minimal
        say("pydoc_data is not installed, so the corpus is the docstrings alone")
        topics = {}
    for name in sorted(topics):
        yield topics[name]
    yield from docstrings(Path(sysconfig.get_paths()["stdlib"]))


def docstrings(directory: Path) -> Iterator[str]:
    """The docstrings of all modules below a directory, one document per module."""
    paths = (path.relative_to(directory) for path in directory.rglob("*.py"))
    for path in sorted((path for path in paths if not LEFT_OUT & set(path.parts)), key=Path.as_posix):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                module = ast.parse((directory / path).read_bytes())
            except (SyntaxError, ValueError):  # for another Python version
                continue
        if text := "\n\n".join(_docstrings(module)):
            yield text + "\n"


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, from top to bottom."""
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)
