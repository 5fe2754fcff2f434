"""A miniature of every benchmark: official files and videos, prepared, checked, trained on."""

import json

import pytest

from tests.data.datasets.official import BENCHMARKS, write_official
from tests.runs import ROOT, call, write_clip
from tests.video import videos
from vop_jax.config.base import base_config, validate
from vop_jax.data import load, prepare
from vop_jax.errors import UserError

TRAIN, TEST, VAL = 10, 4, 3
CODECS = {".avi": "mpeg4", ".mov": "libx264", ".mp4": "libx264"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.safetensors")


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
    return prepare.main(
        [
            f"--dataset={name}",
            f"--annotations={root / 'annotations'}",
            f"--videos={root / 'videos'}",
            f"--output={root / 'records'}",
            *("--other_sizes", "--frames=3", "--short_side=32", "--workers=2"),
            *options,
        ]
    )


def trained(name, root, clip, workdir, *overrides):
    """The exit status of a short run from the records alone."""
    settings = {
        "init.clip": clip,
        "data.records": root / "records",
        "data.official_sizes": False,
        "data.frames": 3,
        "data.short_side": 32,
        "data.threads": 2,
        "method.visual_prompts": 4,
        "method.specific_prompts": 2,
        "method.text_prefix": 1,
        "method.text_suffix": 1,
        "train.steps": 4,
        "train.batch_size": 8,
        "train.checkpoint_every": 2,
        "eval.batch_size": 8,
        "mesh.data": 1,
    }
    return call(
        f"--config={ROOT / 'configs' / name}.py:vop_f+c",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
        *overrides,
    )


@pytest.mark.parametrize(
    "name",
    [n if n == "msvd" else pytest.param(n, marks=pytest.mark.slow) for n in BENCHMARKS],
)
def test_from_official_files_to_a_summary(name, tmp_path, clip):
    sizes = write_miniature(name, tmp_path)
    assert prepared(name, tmp_path) == 0
    assert trained(name, tmp_path, clip, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == "vop_f+c" and summary["steps"] == 4
    assert summary["dataset"] == name and summary["eval_split"] == "test"
    assert summary["protocol"] == BENCHMARKS[name].protocol
    assert summary["num_videos"] == sizes["test"] and not summary["skipped_videos"]
    texts = 2 if name in ("msvd", "vatex") else 1
    assert summary["num_texts"] == texts * sizes["test"]
    assert ("v2t_per_caption" in summary) == (texts > 1)
    # The same from the files, without `prepare`: packed by the run, equal ranks.
    assert (
        trained(
            name,
            tmp_path,
            clip,
            tmp_path / "direct",
            f"--config.data.records={tmp_path / 'direct_records'}",
            f"--config.data.annotations={tmp_path / 'annotations'}",
            f"--config.data.videos={tmp_path / 'videos'}",
            "--config.train.steps=0",
        )
        == 0
    )
    direct = json.loads((tmp_path / "direct" / "summary.json").read_text())
    for side in ("t2v", "v2t"):
        assert direct[side] == summary["before"][side]


def test_what_a_run_refuses(tmp_path, clip, capsys):
    """Records and annotations that are not what the config says."""
    write_miniature("msrvtt9k", tmp_path)
    run = tmp_path / "run"
    assert trained("msrvtt9k", tmp_path, clip, run) == 2
    assert "no records there; make them with python -m vop_jax.data.prepare" in last(capsys)
    assert prepared("msrvtt9k", tmp_path) == 0
    assert trained("msrvtt7k", tmp_path, clip, run) == 2
    assert "records of 'msrvtt9k', not of 'msrvtt7k'" in last(capsys)
    assert trained("msrvtt9k", tmp_path, clip, run, "--config.data.official_sizes=True") == 2
    assert "msrvtt9k test has 4 videos, 1,000 are expected" in last(capsys)
    assert trained("msrvtt9k", tmp_path, clip, run, "--config.data.frames=2") == 2
    assert "records were made with data.frames=3, not 2" in last(capsys)
    assert trained("msrvtt9k", tmp_path, clip, run, "--config.data.eval_split=val") == 2
    assert "config.data.eval_split='val': no such split" in last(capsys)
    path = tmp_path / "annotations" / "MSRVTT_JSFUSION_test.csv"
    path.write_text(path.read_text().replace("a ", "the "))
    other = f"--config.data.annotations={tmp_path / 'annotations'}"
    assert trained("msrvtt9k", tmp_path, clip, run, other) == 2
    assert "records of split 'test' were made of other clips or captions" in last(capsys)


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


def test_evaluation_needs_its_own_split_only(tmp_path, clip):
    write_miniature("msrvtt9k", tmp_path)
    assert prepared("msrvtt9k", tmp_path, "--splits=test") == 0
    steps = "--config.train.steps=0"
    assert trained("msrvtt9k", tmp_path, clip, tmp_path / "run", steps) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 0 and summary["num_videos"] == TEST


def last(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_best_checkpoint_is_chosen_on_held_out_training_clips(tmp_path, clip, capsys):
    write_miniature("msrvtt9k", tmp_path)
    assert prepared("msrvtt9k", tmp_path) == 0
    best = ("--config.train.select=best", "--config.train.eval_every=1")
    assert trained("msrvtt9k", tmp_path, clip, tmp_path / "run", *best) == 2
    assert "config.data.val_share holds some of train out" in last(capsys)
    best = (*best, "--config.data.val_share=0.3", "--config.train.learning_rate=0.5")
    best = (*best, "--config.train.batch_size=4", "--config.eval.batch_size=4")
    best = (*best, "--config.method.name=vop")
    assert trained("msrvtt9k", tmp_path, clip, tmp_path / "run", *best) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    val = {line["step"]: line for line in lines if "val_t2v/R@1" in line}
    assert sorted(val) == [1, 2, 3, 4]
    # The test split is looked at before and after, never in between.
    assert [line["step"] for line in lines if "t2v/R@1" in line] == [0, 4]
    score = {step: (line["val_t2v/R@1"] + line["val_v2t/R@1"]) / 2 for step, line in val.items()}
    first_best = max(score, key=lambda step: (score[step], -step))
    assert summary["selected"] == {
        "split": "val",
        "step": first_best,
        "score": pytest.approx(score[first_best]),
    }
    exported = (tmp_path / "run" / "prompts.safetensors").read_bytes()
    assert exported == (tmp_path / "run" / "best.safetensors").read_bytes()
    # eval mode tells of the same parameters.
    assert trained("msrvtt9k", tmp_path, clip, tmp_path / "run", *best, "--mode=eval") == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["t2v"] == summary["t2v"] and again["selected"] == summary["selected"]


def test_held_out_clips_stay_out(tmp_path, clip):
    """Disjoint from training, fixed, and about the configured share."""
    write_miniature("msrvtt9k", tmp_path)
    assert prepared("msrvtt9k", tmp_path) == 0
    data = base_config().data
    data.update(kind="msrvtt9k", records=str(tmp_path / "records"), official_sizes=False)
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
