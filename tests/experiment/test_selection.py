"""Which parameters are the result, with scores that are set rather than trained."""

import json
from types import SimpleNamespace

import pytest
from etils import epath

from vop_jax.config.base import base_config
from vop_jax.errors import UserError
from vop_jax.experiment import export
from vop_jax.experiment.export import BEST_FILE, BEST_NOTE, Selection


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run at step 9 whose parameters are texts."""

    def save(run, trainable, name):
        (run.workdir / name).write_text(json.dumps(trainable))

    def load(path):
        return SimpleNamespace(params=json.loads(path.read_text()))

    monkeypatch.setattr(export, "save_result", save)
    monkeypatch.setattr(export, "load_prompts", load)
    config = base_config()
    config.train.update(select="best", eval_every=1)
    state = SimpleNamespace(step=9, trainable="the last")
    return SimpleNamespace(workdir=epath.Path(tmp_path), config=config, state=state)


def results(t2v, v2t):
    return {"t2v": {"R@1": t2v}, "v2t": {"R@1": v2t}}


def test_the_best_is_kept_and_of_equals_the_first(run):
    selection = Selection(run)
    assert selection.best is None and selection.trainable() == "the last"
    for step, (t2v, v2t) in enumerate([(10, 20), (40, 20), (20, 40), (30, 29)], 1):
        selection.consider(f"of step {step}", step, results(t2v, v2t))
    for restarted in (selection, Selection(run)):
        assert restarted.best == {"split": "val", "step": 2, "score": 30.0}
        assert restarted.trainable() == "of step 2"
    # A step that comes again after a kill replaces itself.
    restarted.consider("of step 2, again", 2, results(25, 25))
    assert restarted.trainable() == "of step 2, again"
    # Without selection the last step is the result.
    run.config.train.select = "last"
    assert Selection(run).trainable() == "the last"


def test_what_an_abandoned_attempt_left_is_not_the_result(run):
    Selection(run).consider("abandoned", 5, results(90, 90))
    run.state.step = 0  # no checkpoint was reached
    selection = Selection(run)
    assert selection.best is None and selection.trainable() == "the last"
    selection.reset()
    assert not (run.workdir / BEST_NOTE).exists() and not (run.workdir / BEST_FILE).exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"step": 2}'])
def test_a_damaged_note_is_one_line(run, content):
    (run.workdir / BEST_NOTE).write_bytes(content)
    with pytest.raises(UserError, match=r"best.json: damaged; delete best.json and best.safeten"):
        Selection(run)
