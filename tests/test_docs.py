"""What the docs mention exists: links, files, modules, config keys, code."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import runpy
import sys

import pytest

from tests import processes
from vop_jax.config.keys import KEYS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FILE = re.compile(
    r"(?<![\w/.-])((?:vop_jax|tests|benchmarks|configs|tools|docs|examples)/[\w/.+-]+\.\w+)"
)
SECTIONS = "|".join({key.split(".")[0] for key in KEYS if "." in key})
# `data.frames` or config.data.frames; not the names of files, nor of keys in general.
KEY = re.compile(rf"(?:config\.|`)((?:{SECTIONS})\.(?!safetensors|json|prepare|check)[a-z]\w+)")
MODULE = re.compile(r"python -m ((?:vop_jax|benchmarks)[\w.]*)")


def code_of(notebook):
    """The code cells of a notebook as one script; a line `!COMMAND` runs in a shell."""
    cells = json.loads(notebook.read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    shell = r"__import__('subprocess').run(f'''\1''', shell=True, check=True)"
    return re.sub(r"^!(.*)$", shell, source, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    # Links are relative to the page; other names are relative to the root.
    names = set(FILE.findall(re.sub(r"\]\([^)]*\)", "", text)))
    missing += [name for name in names if not (ROOT / name).exists()]
    missing += [m for m in MODULE.findall(text) if importlib.util.find_spec(m.rstrip(".")) is None]
    missing += [key for key in KEY.findall(text) if key not in KEYS]
    assert missing == []


def test_the_paper_page_names_code_that_exists():
    code = " ".join(file.read_text() for file in (ROOT / "vop_jax").rglob("*.py"))
    names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", (ROOT / "docs" / "paper.md").read_text())
    words = {word for name in names for word in name.split(".")}
    words -= {"weight", "P_i", "G_i", "c", "E"}  # PyTorch's, and letters of equations
    assert [word for word in sorted(words) if not re.search(rf"\b{word}\b", code)] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_python_of_the_pages_is_python():
    for page in PAGES:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            ast.parse(code)


def test_the_config_page_is_made_from_the_config():
    page = runpy.run_path(str(ROOT / "docs" / "config_page.py"))
    assert page["render"]() == page["PAGE"].read_text(), "run python docs/config_page.py"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_import_what_exists(notebook):
    for node in ast.walk(ast.parse(code_of(notebook))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.slow
def test_notebooks_run(tmp_path):
    """One after the other, with smaller numbers."""
    pytest.importorskip("uvicorn", reason="the second one serves an index: the extra `serve`")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}  # of `python`, in a shell
    smaller = {"train=256": "train=32", "pretrain.steps=200": "pretrain.steps=4"}
    smaller |= {"steps=60": "steps=2", "/tmp/vop_tutorial": str(tmp_path / "tutorial")}
    for notebook in reversed(NOTEBOOKS):  # tuning comes before serving
        code = code_of(notebook)
        for number, other in smaller.items():
            code = code.replace(number, other)
        script = tmp_path / f"{notebook.stem}.py"
        script.write_text(code)
        done = processes.run([sys.executable, str(script)], cwd=ROOT, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
