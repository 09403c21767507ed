"""Trainings of benchmarks, by `python -m dfed train`: what is finished is not run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from dfed.yaml_io import dump_yaml


def trained(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The summary of a training in ``folder``; None, and what it said on standard error, if it failed.

    Raises:
        RuntimeError: If what is there was trained with another config.
    """
    file, text = folder.with_name(f"{folder.name}.yaml"), dump_yaml(config)
    if (folder / "summary.json").is_file():
        if file.read_text(encoding="utf-8") != text:
            raise RuntimeError(f"{folder} was trained with other settings ({file}): choose another --out")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "dfed", "train", str(file), "--out", str(folder)], capture_output=True,
                              text=True, check=False)
        if done.returncode:
            return None, done.stderr
    return json.loads((folder / "summary.json").read_text(encoding="utf-8")), ""
