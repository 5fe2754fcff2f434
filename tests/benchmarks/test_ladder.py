"""The motion benchmark, shrunk to a step of two methods."""

import contextlib
import functools
import json
import runpy
import types
from concurrent.futures import Future

import pytest
from ml_collections import ConfigDict

from benchmarks import ladder
from tests import runs
from vop_jax import cli
from vop_jax.config import clip
from vop_jax.data.datasets import clips, registry, stills
from vop_jax.errors import UserError
from vop_jax.experiment import train
from vop_jax.tuning import methods
from vop_jax.tuning.methods import METHODS

CONFIG = """
from vop_jax.config import base_config

def get_config(method="vop"):
    c = base_config()
    c.method.name = method
    c.clip.arch = "tiny"
    c.data.kind = "clips"
    c.data.update(frames=8, short_side=32, augment=False, threads=2, rendered=16)
    c.pretrain.update(steps=1, batch_size=8)
    c.train.update(steps=1, batch_size=8)
    c.eval.batch_size = 8
    c.mesh.data = 1
    return c
"""


@pytest.fixture(scope="module")
def run_study(tmp_path_factory):
    """`ladder.run_study` on a few clips; everything lies below its attribute `root`."""
    root = tmp_path_factory.mktemp("ladder")
    (root / "config.py").write_text(CONFIG)
    patch = pytest.MonkeyPatch()
    patch.setattr(clips, "render", functools.partial(clips.render, val=8, test=8))
    patch.setattr(stills, "render", functools.partial(stills.render, train=16, test=8))
    patch.setattr(ladder, "use_compile_cache", lambda workdir: None)  # the tests have their own
    run = functools.partial(ladder.run_study, str(root / "config.py"), str(root))
    run.root = root
    yield run
    patch.undo()


@pytest.mark.slow
def test_methods_share_a_clip_and_finished_runs_are_read(run_study, monkeypatch):
    rows = run_study("methods", [0, 1], only=["zero_shot", "vop"])
    assert [(row["label"], row["seeds"]) for row in rows] == [("zero_shot", 1), ("vop", 2)]
    assert rows[1]["trainable"] == 3584 and rows[1]["metrics"]["t2v/R@1"][1] is not None
    for row in rows:
        assert {"accuracy/direction", "accuracy/speed"} <= set(row["metrics"])
        assert row["gflop_per_clip"] > 0 and row["ms_per_clip"] > 0
    configs = [json.loads(p.read_text()) for p in run_study.root.glob("methods/*/*/config.json")]
    assert len(configs) == 3 and len({c["init"]["clip"] for c in configs}) == 1
    assert len(list(run_study.root.glob("**/clip.safetensors"))) == 1
    monkeypatch.setattr(train, "train", None)
    again = run_study("methods", [0, 1], only=["zero_shot", "vop"])
    assert [row["metrics"] for row in again] == [row["metrics"] for row in rows]


def test_runs_side_by_side_are_started_once_each_seed_by_seed(monkeypatch, tmp_path):
    """After the records that all of them read were made, and without what is finished; no
    process here."""
    done = []

    class Pool(contextlib.nullcontext):
        def __init__(self, jobs, context, initializer, arguments):
            super().__init__(self)
            done.append((jobs, context.get_start_method(), arguments))

        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(ladder, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(ladder, "_run", lambda config, run: done.append(run))
    monkeypatch.setattr(ladder, "_pack", lambda config, run: done.append(f"records of {run}"))
    monkeypatch.setattr(ladder, "_finished", lambda run, config: run == "vop_p/0")
    pairs = [(ConfigDict({"seed": s}), f"{m}/{s}") for m in ("vop", "vop_p") for s in (0, 1)]
    ladder._run_side_by_side(pairs, str(tmp_path), 3)
    pool = (3, "spawn", (str(tmp_path),))
    assert done == ["records of vop/0", pool, "vop/0", "vop/1", "vop_p/1"]
    ladder._run_side_by_side([pairs[2]], str(tmp_path), 3)
    assert len(done) == 5


def test_records_are_packed_as_asked(tmp_path, monkeypatch):
    from vop_jax.data import load
    from vop_jax.data.records.write import WriteOptions

    asked = []
    monkeypatch.setattr(load, "pack", lambda *_, options, **__: asked.append(options))
    config = runpy.run_path(str(runs.ROOT / "configs/motion.py"))["get_config"]("vop")
    source = types.SimpleNamespace(
        sizes={},
        records_name="folder",
        locations=lambda *_: ("captions.csv", "videos"),
        read=lambda *_, **__: ({"train": [1], "test": [1]}, []),
    )
    monkeypatch.setattr(registry, "get", lambda kind: source)
    load.load(config.data, str(tmp_path))
    ladder._pack(config, str(tmp_path))
    assert asked == [load.IN_A_RUN, WriteOptions()] and asked[1].isolated


def test_rates_are_of_the_val_split_and_its_records(monkeypatch, tmp_path):
    """From summaries alone; with the runs themselves below, which is slow."""
    asked = []
    monkeypatch.setattr(ladder, "use_compile_cache", lambda workdir: None)
    monkeypatch.setattr(ladder, "_backbone", lambda config, workdir: {"init.clip": "clip"})

    def stop(pairs, workdir, jobs):
        asked.extend(config for config, _ in pairs)
        raise UserError("enough")

    monkeypatch.setattr(ladder, "_run_side_by_side", stop)
    config = str(runs.ROOT / "configs/motion.py")
    for study in ("learning_rates", "methods"):
        with pytest.raises(UserError, match="enough"):
            ladder.run_study(config, str(tmp_path), study, [0], only=["vop"], jobs=2)
    *swept, tested = asked
    assert [c.train.learning_rate for c in swept] == list(ladder.RATES)
    assert {c.data.eval_split for c in swept} == {"val"} and tested.data.eval_split == "test"
    assert {c.data.records for c in swept} == {str(tmp_path / "records_val")}
    assert tested.data.records == str(tmp_path / "records_test")


def test_wrong_calls_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)
    call = ["ladder", f"--workdir={tmp_path}", "--config=nowhere.py"]
    monkeypatch.setattr("sys.argv", call)
    with pytest.raises(SystemExit, match="2"):
        ladder.main()
    assert capsys.readouterr().err == "error: --config=nowhere.py: no such file\n"


@pytest.mark.parametrize("config_file", ["demo.py", "motion.py"])
@pytest.mark.parametrize("study", ladder.STUDIES)
def test_every_study_is_of_settings_that_can_be(study, config_file):
    """Each is accepted by the config's CLIP; all differ."""
    from vop_jax.config.base import validate

    get_config = runpy.run_path(str(runs.ROOT / "configs" / config_file))["get_config"]
    seen = set()
    for label, settings in ladder.STUDIES[study]().items():
        config = get_config(settings["method.name"])
        config.update_from_flattened_dict(dict(settings))
        validate(config)
        method = methods.method_of(config)
        method.check_fits(clip.preset(config))
        setting = json.dumps(config.to_dict(), sort_keys=True)
        assert setting not in seen, label
        seen.add(setting)
    if study == "methods":
        assert len(seen) == len(METHODS)
