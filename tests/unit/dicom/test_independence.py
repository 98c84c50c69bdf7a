"""The pure room reads datasets by itself, so that pydicom is an independent second reading."""

import ast
from pathlib import Path

import dicomscp.dicom

OF_PIXELS = {
    "pixels.py",
    "render.py",
    "transcode.py",
}  # which pydicom decodes, so other peers are asked of them
TABLES = {"pydicom.charset", "pydicom.datadict", "pydicom._dicom_dict", "pydicom._private_dict"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "pydicom":
                yield from (f"pydicom.{alias.name}" for alias in node.names)


def test_of_pydicom_only_dictionaries_and_character_sets_are_used():
    used = {
        name
        for path in Path(dicomscp.dicom.__file__).parent.glob("*.py")
        if path.name not in OF_PIXELS
        for name in imported(path)
        if name.split(".")[0] == "pydicom"
    }
    assert used
    assert used <= TABLES
