"""The notebooks under examples/ run, one after the other, with smaller numbers."""

import os
import sys

import pytest

from tests import processes
from tests.test_docs import NOTEBOOKS, ROOT, code_of

SMALLER = {"train=256": "train=32", "pretrain.steps=200": "pretrain.steps=4", "steps=60": "steps=2"}


@pytest.mark.slow
def test_notebooks_run(tmp_path):
    pytest.importorskip("uvicorn", reason="the second one serves an index: the extra `serve`")
    tune, serve = sorted(NOTEBOOKS, key=lambda notebook: "serve" in notebook.stem)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}  # of `python`, in a shell
    for notebook in (tune, serve):
        code = code_of(notebook).replace("/tmp/vop_tutorial", str(tmp_path / "tutorial"))
        for number, smaller in SMALLER.items():
            code = code.replace(number, smaller)
        script = tmp_path / f"{notebook.stem}.py"
        script.write_text(code)
        done = processes.run([sys.executable, str(script)], cwd=ROOT, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
