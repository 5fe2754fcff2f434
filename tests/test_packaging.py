"""What is installed is what is declared."""

import re
import tomllib

from tests import runs


def names(lines):
    """{name: specifier} of requirement lines; comments are left out."""
    bare = (line.split("#")[0].strip() for line in lines)
    return {re.split(r"[=<>\[]", line)[0]: line for line in bare if line}


def test_requirements_agree():
    project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
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
