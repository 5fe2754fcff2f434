"""What is installed is what is declared."""

import importlib
import re
import shutil
import sys
import tomllib

from tests import processes, runs

PROJECT = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())


def names(lines):
    """{name: specifier} of requirement lines; comments are left out."""
    bare = (line.split("#")[0].strip() for line in lines)
    return {re.split(r"[=<>\[]", line)[0]: line for line in bare if line}


def test_requirements_agree():
    project = PROJECT["project"]
    given = names((runs.ROOT / "requirements.txt").read_text().splitlines())
    extras = project["optional-dependencies"]
    assert given == names([*project["dependencies"], *extras["test"]])
    locked = {
        name.lower().replace("-", "_")
        for name in names((runs.ROOT / "requirements.lock").read_text().splitlines())
    }
    others = [*extras["gcs"], "gcp-storage-emulator", "ruff", "mypy"]
    wanted = {name.lower().replace("-", "_") for name in [*given, *others]}
    assert wanted <= locked


def test_the_licence_of_what_is_bundled_is_named():
    notice = (runs.ROOT / "NOTICE").read_text()
    bundled = [p for p in (runs.ROOT / "vop_jax").rglob("*.gz")]
    assert bundled
    for path in bundled:
        assert str(path.relative_to(runs.ROOT)) in notice


def test_an_installed_package_has_the_shipped_configs(tmp_path):
    """The files of the wheel in a folder, without the clone."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    contents = {name: name for name in wheel["packages"]} | wheel["force-include"]
    for source, target in contents.items():
        shutil.copytree(runs.ROOT / source, tmp_path / target, dirs_exist_ok=True)
    assert (tmp_path / "vop_jax/py.typed").exists()
    # `motion` is made of `demo`, the file beside it.
    command = [sys.executable, "-m", "vop_jax", "params", "--config=motion:vop_c"]
    environment = runs.environment() | {"PYTHONPATH": str(tmp_path)}
    done = processes.run(command, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "vop_f+c" in done.stdout
    name, _, function = PROJECT["project"]["scripts"]["vop"].partition(":")
    assert callable(getattr(importlib.import_module(name), function))
