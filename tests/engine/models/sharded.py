"""Folders with an index of weight files."""

import json
from pathlib import Path

from logitcask.engine.models.weight_files import INDEX


def write_index(folder: Path, *files: object) -> None:
    """Write an index that names these files."""
    weight_map = {f"tensor{i}": file for i, file in enumerate(files)}
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content))
