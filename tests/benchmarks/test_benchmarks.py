"""A miniature of every benchmark: official files and videos, prepared, checked, trained on."""

import json
import shutil

import pytest

from tests.data.datasets.official import BENCHMARKS, write_official
from tests.runs import ROOT, call
from tests.video import videos
from vop_jax.config.base import base_config, validate
from vop_jax.data import load, prepare
from vop_jax.errors import UserError
from vop_jax.training.writer import read_metrics

TRAIN, TEST, VAL = 10, 4, 3
CODECS = {".avi": "mpeg4", ".mov": "libx264", ".mp4": "libx264"}


def write_miniature(name, root):
    """Official annotation files, and films for them under their official names."""
    sizes = {"train": TRAIN, "test": TEST, "val": VAL}
    sizes = {split: sizes[split] for split in BENCHMARKS[name].sizes}
    paths = write_official(name, root / "annotations", sizes)
    for i, path in enumerate(p for split in paths.values() for p in split):
        film = root / "videos" / path
        film.parent.mkdir(parents=True, exist_ok=True)
        # Each of its own length; 35 s where only the first 30 count.
        rate, count = (1, 35 + i) if name == "didemo" else (10, 8 + i)
        videos.write(film, count, width=32, height=32, rate=rate, codec=CODECS[film.suffix])
    return sizes


def prepared(name, root, *options):
    places = {"annotations": root / "annotations", "videos": root / "videos"}
    places["output"] = root / "records"
    flags = [f"--{key}={path}" for key, path in places.items()]
    sizes = ("--other_sizes", "--frames=3", "--short_side=32", "--workers=1")
    return prepare.main([f"--dataset={name}", *flags, *sizes, *options])


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """That of msrvtt9k, prepared."""
    root = tmp_path_factory.mktemp("msrvtt9k")
    write_miniature("msrvtt9k", root)
    assert prepared("msrvtt9k", root) == 0
    return root


@pytest.fixture
def trained(clip, capsys):
    """The exit status of a short run from the records alone, and what it wrote at last."""

    def trained(name, root, workdir, *overrides):
        settings = {
            "init.clip": clip,
            "data.records": root / "records",
            "data.official_sizes": False,
            "data.frames": 3,
            "data.short_side": 32,
            "data.threads": 2,
            "method.visual_prompts": 4,
            "method.text_prefix": 1,
            "method.text_suffix": 1,
            "train.steps": 2,
            "train.batch_size": 4,
            "train.learning_rate": 0.5,
            "eval.batch_size": 4,
            "mesh.data": 1,
        }
        keys = (f"{key}={value}" for key, value in settings.items())
        flags = [f"--config.{setting}" for setting in (*keys, *overrides)]
        status = call(f"--config={ROOT / 'configs' / name}.py:vop", f"--workdir={workdir}", *flags)
        return status, capsys.readouterr().err.strip().splitlines()[-1:]

    return trained


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.mark.parametrize(
    "name",
    [n if n == "msvd" else pytest.param(n, marks=pytest.mark.slow) for n in BENCHMARKS],
)
def test_from_official_files_to_a_summary(name, tmp_path, trained):
    sizes = write_miniature(name, tmp_path)
    run, prepared_run = tmp_path / "run", tmp_path / "prepared"
    places = [f"data.{key}={tmp_path / key}" for key in ("annotations", "videos")]
    places.append(f"data.records={tmp_path / 'packed'}")  # by the run itself
    assert trained(name, tmp_path, run, *places)[0] == 0
    summary = summary_of(run)
    assert summary["method"] == "vop" and summary["steps"] == 2
    assert summary["dataset"] == name and summary["eval_split"] == "test"
    assert summary["protocol"] == BENCHMARKS[name].protocol
    assert summary["num_videos"] == sizes["test"] and not summary["skipped_videos"]
    texts = 2 if name in ("msvd", "vatex") else 1
    assert summary["num_texts"] == texts * sizes["test"]
    assert ("v2t_per_caption" in summary) == (texts > 1)
    # Equal ranks from prepared records, of which an evaluation needs its own split only.
    assert prepared(name, tmp_path, "--splits=test") == 0
    assert trained(name, tmp_path, prepared_run, "train.steps=0")[0] == 0
    for side in ("t2v", "v2t"):
        assert summary_of(prepared_run)[side] == summary["before"][side]


def test_what_a_run_refuses(tmp_path, miniature, trained):
    """Records and annotations that are not what the config says."""
    other = tmp_path / "annotations"
    shutil.copytree(miniature / "annotations", other)
    path = other / "MSRVTT_JSFUSION_test.csv"
    path.write_text(path.read_text().replace("a ", "the "))
    for name, root, override, message in (
        ("msrvtt9k", tmp_path, "seed=0", "no records there; make them with python -m vop_jax.data"),
        ("msrvtt7k", miniature, "seed=0", "records of 'msrvtt9k', not of 'msrvtt7k'"),
        *(
            ("msrvtt9k", miniature, override, message)
            for override, message in (
                ("data.official_sizes=True", "msrvtt9k test has 4 videos, 1,000 are expected"),
                ("data.frames=2", "records were made with data.frames=3, not 2"),
                ("data.eval_split=val", "config.data.eval_split='val': no such split"),
                (f"data.annotations={other}", "'test' were made of other clips or captions"),
                ("train.select=best", "config.data.val_share holds some of train out"),
            )
        ),
    ):
        status, [line] = trained(name, root, tmp_path / "run", override, "train.eval_every=1")
        assert status == 2 and message in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.val_split": "train"}, "is the train split"),
        ({"data.val_split": "test"}, "is the eval split"),
        ({"data.train_split": "test"}, "none of it can be held out"),
        ({"train.eval_every": 0}, "needs config.train.eval_every > 0"),
    ],
)
def test_what_cannot_be_chosen_on(settings, message):
    config = base_config()
    best = {"train.select": "best", "train.eval_every": 5, "data.val_share": 0.1}
    config.update_from_flattened_dict(best | settings)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_share_can_be_held_out_beside_the_test_split_that_was(tmp_path):
    """Both are chosen by a hash of the ids: not by the same."""
    for i in range(40):
        videos.write(tmp_path / f"{i}.mp4", 4, width=32, height=32)
    lines = "".join(f"{i}.mp4,clip {i}\n" for i in range(40))
    (tmp_path / "captions.csv").write_text("video,caption\n" + lines)
    data = base_config().data
    data.update(annotations=str(tmp_path / "captions.csv"), videos=str(tmp_path))
    data.update(frames=3, short_side=32, val_share=0.1)
    splits = load.load(data, str(tmp_path / "run"), select="best").splits
    assert sum(map(len, splits.values())) == 40 and 1 <= len(splits["val"]) <= 9


def test_the_best_checkpoint_is_chosen_on_held_out_training_clips(tmp_path, miniature, trained):
    best = ("train.select=best", "train.eval_every=1", "data.val_share=0.3")
    assert trained("msrvtt9k", miniature, tmp_path, *best)[0] == 0
    summary = summary_of(tmp_path)
    lines = read_metrics(tmp_path)
    val = {line["step"]: line for line in lines if "val_t2v/R@1" in line}
    assert sorted(val) == [1, 2]
    # The test split is looked at before and after, never in between.
    assert [line["step"] for line in lines if "t2v/R@1" in line] == [0, 2]
    score = {step: (line["val_t2v/R@1"] + line["val_v2t/R@1"]) / 2 for step, line in val.items()}
    first_best = max(score, key=lambda step: (score[step], -step))
    assert summary["selected"] == {
        "split": "val",
        "step": first_best,
        "score": pytest.approx(score[first_best]),
    }
    exported = (tmp_path / "prompts.safetensors").read_bytes()
    assert exported == (tmp_path / "best.safetensors").read_bytes()
    # An evaluation is of the same parameters.
    assert call(f"--workdir={tmp_path}", "--mode=eval") == 0
    again = summary_of(tmp_path)
    assert again["t2v"] == summary["t2v"] and again["selected"] == summary["selected"]


def test_held_out_clips_stay_out(miniature, tmp_path):
    """Disjoint from training, fixed, and about the configured share."""
    data = base_config().data
    data.update(kind="msrvtt9k", records=str(miniature / "records"), official_sizes=False)
    data.update(frames=3, short_side=32, val_share=0.3)
    packed = load.load(data, str(tmp_path), select="best")
    train, val = packed.splits["train"], packed.splits["val"]
    assert len(train) + len(val) == TRAIN and len(val) and not {*train.ids} & {*val.ids}
    assert len(load.load(data, str(tmp_path)).splits["train"]) == TRAIN
    whole = packed.splits["train"]._whole
    for part in (train, val):
        for i, name in enumerate(part.ids):
            assert part[i] == whole[whole.ids.index(name)]
            assert part.captions[i] == whole.captions[whole.ids.index(name)]
