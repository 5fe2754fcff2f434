"""Runs exported encoders in a process with jax and numpy, but without flax and this project."""

import sys
from pathlib import Path

import numpy as np

from tests import processes

SCRIPT = """
import pathlib, re, sys
for name in ("flax", "vop_jax", "safetensors", "orbax"):
    sys.modules[name] = None  # importing it fails
[code] = re.findall("```python\\n(.*?)```", pathlib.Path("README.md").read_text(), re.DOTALL)
exec(code)
inputs = dict(np.load(sys.argv[1]))
calls = {"video": encode_video, "text": encode_text}
np.savez(sys.argv[2], **{name: calls[name.split()[0]](rows) for name, rows in inputs.items()})
"""


def embed(encoders: Path, scratch: Path, **rows: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The vectors of batches of `video` and `text`, by the code in the README of the encoders."""
    inputs = {f"{name} {i}": batch for name in rows for i, batch in enumerate(rows[name])}
    np.savez(scratch / "in.npz", **inputs)
    command = [sys.executable, "-c", SCRIPT, str(scratch / "in.npz"), str(scratch / "out.npz")]
    processes.run(command, cwd=encoders, check=True)
    outputs = np.load(scratch / "out.npz")
    return {name: [outputs[f"{name} {i}"] for i in range(len(rows[name]))] for name in rows}
