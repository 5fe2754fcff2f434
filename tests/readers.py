"""A process that has jax and numpy, but neither flax nor this project."""

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
    """What the README of a folder of encoders makes of batches of `video` and `text`."""
    given = {f"{name} {i}": batch for name in rows for i, batch in enumerate(rows[name])}
    np.savez(scratch / "in.npz", **given)
    command = [sys.executable, "-c", SCRIPT, str(scratch / "in.npz"), str(scratch / "out.npz")]
    processes.run(command, cwd=encoders, check=True)
    found = np.load(scratch / "out.npz")
    return {name: [found[f"{name} {i}"] for i in range(len(rows[name]))] for name in rows}
