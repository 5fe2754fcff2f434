"""Levels: a file imports only from lower levels or its own folder."""

import ast
import pathlib
import sys

import pytest

import vop_jax
from tests import processes

PACKAGE = pathlib.Path(vop_jax.__file__).parent
LEVELS = {
    name: level
    for level, names in enumerate(
        (
            ("errors",),
            ("storage", "config"),
            ("cli", "video", "clip"),
            ("tuning",),
            ("data", "model"),
            ("training",),
            ("evaluation", "inference"),
            ("report", "experiment", "convert"),
            ("search", "main", "__init__"),
            ("serve", "interop"),
            ("__main__",),
        )
    )
    for name in names
}
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHT = ("config", "video", "data")  # what worker processes load: without jax
HEAVY = ("jax", "flax", "torch", "tensorflow")


def part(file):
    """The folder or top-level file that a level is given to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def part_of_module(module):
    """`vop_jax.tuning.prompts` -> `tuning`."""
    return module.split(".")[1] if "." in module else "__init__"


def nodes(tree, lazy):
    """All nodes of a syntax tree; those inside functions, which run later, if `lazy`."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if lazy or not isinstance(node, ast.FunctionDef):
            yield from nodes(node, lazy)


def imports(tree, lazy=True):
    """Names of the modules that a syntax tree imports; absolute, as the project writes them."""
    for node in nodes(tree, lazy):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "vop_jax":
                yield from (f"vop_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def syntax(file):
    return ast.parse(file.read_text())


def not_below(importer, module):
    """Why `importer` (a part) may not import `module`, or None."""
    if module.split(".")[0] != "vop_jax":
        return None
    imported = part_of_module(module)
    if imported not in LEVELS:
        return f"{module} has no level"
    if imported == importer or LEVELS[imported] < LEVELS[importer]:
        return None
    return f"level {LEVELS[importer]} imports {module} of level {LEVELS[imported]}"


def test_every_part_has_a_level():
    assert {part(file) for file in FILES} <= LEVELS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_levels_or_its_own_folder(file):
    importer = part(file)
    assert [why for m in imports(syntax(file)) if (why := not_below(importer, m))] == []


@pytest.mark.parametrize(
    ("importer", "module", "allowed"),
    [
        ("model", "vop_jax.clip.model", True),
        ("clip", "vop_jax.tuning.prompts", False),
        ("data", "vop_jax.training.step", False),
        ("training", "vop_jax.evaluation.ranks", False),
        ("experiment", "vop_jax.experiment.setup", True),
        ("clip", "vop_jax.utils", False),
        ("clip", "numpy", True),
    ],
)
def test_the_rule_itself(importer, module, allowed):
    assert (not_below(importer, module) is None) == allowed


def test_training_never_imports_data():
    for file in FILES:
        if part(file) == "training":
            assert not [m for m in imports(syntax(file)) if m.startswith("vop_jax.data")], file


def test_data_is_numpy_only():
    for file in FILES:
        if part(file) in LIGHT:
            modules = {module.split(".")[0] for module in imports(syntax(file))}
            assert not modules & {*HEAVY}, file


def test_torch_is_imported_in_one_place_alone_and_lazily():
    for file in FILES:
        modules = imports(
            syntax(file), lazy=file != PACKAGE / "clip" / "convert" / "vop_checkpoint.py"
        )
        assert "torch" not in {module.split(".")[0] for module in modules}, file


def test_one_helper_starts_the_processes_of_tests():
    """So that none outlives its test."""
    for file in pathlib.Path(__file__).parent.rglob("*.py"):
        if file.name != "processes.py":
            assert not {"subprocess", "multiprocessing"} & {*imports(syntax(file))}, file


def loaded_by(*modules):
    """Which heavy packages a fresh process holds after importing `modules`."""
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*({{*{HEAVY!r}}} & {{*sys.modules}}))"
    )
    command = [sys.executable, "-c", code]
    done = processes.run(command, cwd=PACKAGE.parent, check=True)
    return set(done.stdout.split())


def test_importing_the_package_alone_loads_nothing_heavy():
    assert loaded_by("vop_jax", "vop_jax.main") == set()


def test_importing_light_parts_loads_nothing_heavy():
    files = (
        file.relative_to(PACKAGE.parent).with_suffix("") for file in FILES if part(file) in LIGHT
    )
    names = [".".join(file.parts).removesuffix(".__init__") for file in files]
    assert "vop_jax.data.pipeline" in names
    assert loaded_by(*names) == set()


def test_a_heavy_import_is_seen():
    assert "jax" in loaded_by("vop_jax.model")


def test_load_needs_no_package_of_datasets():
    code = "import sys, vop_jax; vop_jax.load; print(*sys.modules)"
    done = processes.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)
    assert not {"tensorflow_datasets", "array_record", "tensorflow"} & {*done.stdout.split()}
