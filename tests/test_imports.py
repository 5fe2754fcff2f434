"""Levels: a file imports only from lower levels or its own folder, and no imports form a circle."""

import ast
import functools
import graphlib
import pathlib
import sys

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
            ("search", "main", "push", "__init__"),
            ("serve", "interop"),
            ("__main__",),
        )
    )
    for name in names
}
LIGHT = ("config", "video", "data")  # what worker processes load: without jax
HEAVY = ("jax", "flax", "torch", "tensorflow")
CONVERTER = "vop_jax.clip.convert.vop_checkpoint"  # the one file that imports torch, in a function


def name_of(file):
    """vop_jax/tuning/prompts.py -> vop_jax.tuning.prompts."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def part(module):
    """The folder or top-level file that has a level: vop_jax.tuning.prompts -> tuning."""
    return module.split(".")[1] if "." in module else "__init__"


def nodes(tree, lazy):
    """All nodes of a syntax tree; with `lazy` those inside functions too, which run later."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if lazy or not isinstance(node, ast.FunctionDef):
            yield from nodes(node, lazy)


@functools.cache
def imports(file, lazy=True):
    """The modules that a file imports; imports are absolute, as the project writes them."""
    modules = []
    for node in nodes(ast.parse(file.read_text()), lazy):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += [name if name in FILES else node.module for name in names]
    return modules


def is_allowed(importer, module):
    """Whether a part, such as clip, may import a module."""
    if module.split(".")[0] != "vop_jax":
        return True
    if importer == "training" and part(module) == "data":
        return False
    return part(module) == importer or LEVELS.get(part(module), 99) < LEVELS[importer]


def test_the_rule_itself():
    assert is_allowed("model", "vop_jax.clip.model")
    assert is_allowed("experiment", "vop_jax.experiment.setup")
    assert is_allowed("clip", "numpy")
    assert not is_allowed("clip", "vop_jax.tuning.prompts")
    assert not is_allowed("training", "vop_jax.data.load")
    assert not is_allowed("clip", "vop_jax.utils")


def test_a_file_imports_only_from_lower_levels_or_its_own_folder():
    assert {part(name) for name in FILES} <= LEVELS.keys()
    wrong = [
        f"{name} imports {module}"
        for name, file in FILES.items()
        for module in imports(file)
        if not is_allowed(part(name), module)
    ]
    assert wrong == []


def test_no_imports_form_a_circle():
    graph = {name: {*imports(file, lazy=False)} - {name} for name, file in FILES.items()}
    order = [*graphlib.TopologicalSorter(graph).static_order()]
    assert order.index("vop_jax.errors") < order.index("vop_jax.main")


def test_light_files_import_nothing_heavy_and_one_file_imports_torch():
    for name, file in FILES.items():
        packages = {module.split(".")[0] for module in imports(file, lazy=name != CONVERTER)}
        assert not packages & {*(HEAVY if part(name) in LIGHT else ["torch"])}, name


def test_one_helper_starts_the_processes_of_tests():
    """So that no process outlives its test."""
    for file in pathlib.Path(__file__).parent.rglob("*.py"):
        if file.name != "processes.py":
            assert not {"subprocess", "multiprocessing"} & {*imports(file)}, file


def test_what_imports_load():
    """In fresh processes, whose last line is which of the packages they have loaded."""
    light = ["vop_jax", "vop_jax.main", *(name for name in FILES if part(name) in LIGHT)]
    assert "vop_jax.data.pipeline" in light
    videos = ("av", "PIL", "ftfy")  # what a query with a text does without
    datasets = ("tensorflow_datasets", "tensorflow", "array_record")
    for statement, packages, loaded in (
        (f"import {', '.join(light)}", HEAVY, set()),
        ("from vop_jax.search import open", ("jax", *datasets, *videos), {"jax"}),
    ):
        code = f"import sys\n{statement}\nprint(*({{*{packages!r}}} & {{*sys.modules}}))"
        done = processes.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True)
        assert {*done.stdout.split()} == loaded
