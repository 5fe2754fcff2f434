"""Folders of finished runs, as training leaves them, and the command that compares them."""

import json
import sys

from vop_jax.config.base import base_config
from vop_jax.report import __main__ as command

TRAINED = {"zero_shot": 0, "vop": 122_880, "vop_p": 368_640, "full": 10**8}
VIDEOS = [f"{i}.mp4" for i in range(4)]
CLIP = "ViT-B/32 from openai (0123456789ab)"


def write_run(
    folder, method="vop", r1=39.0, sizes=(4, 4), ranks=(1, 2, 3, 4), film=None, summary=None, **keys
):
    """A finished run with these config keys; with rankings of captions of `film`, if given."""
    folder.mkdir(parents=True)
    config = base_config()
    config.method.name = method
    config.train.steps = 20
    with config.ignore_type():
        config.update_from_flattened_dict(keys)
    trained = TRAINED.get(method, 10**5)
    results = {
        "method": method,
        "steps": 20 if trained else 0,
        "trainable_params": trained,
        "t2v": {"R@1": r1, "R@5": r1 + 20, "R@10": r1 + 30, "MnR": 100 - r1, "MdR": 2.0},
        "v2t": {"R@1": r1 + 2, "R@5": 70.0, "R@10": 80.0, "MnR": 12.0, "MdR": 2.0},
        "num_texts": sizes[0],
        "num_videos": sizes[1],
        "eval_split": "test",
        "missing_videos_count_as": "miss",
        "skipped_videos": [],
        "clip": CLIP,
    }
    lines = [{"step": 0, "t2v/R@1": 1.0}, {"step": 1, "loss": 3.0}, {"step": 20, "loss": 1.0}]
    rankings = [
        {
            "caption": f"<i>{film}</i> {i}",
            "video": name,
            "rank": rank,
            "top": [*[name] * (rank == 1), *(v for v in VIDEOS if v != name)],
        }
        for i, (name, rank) in enumerate(zip(VIDEOS, ranks, strict=True))
    ]
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "summary.json").write_text(json.dumps(results | (summary or {})))
    for name, values in {"metrics": lines, "rankings": rankings if film else []}.items():
        if values:
            text = "".join(json.dumps(value) + "\n" for value in values)
            (folder / f"{name}.jsonl").write_text(text)
    return folder


def run_command(monkeypatch, *arguments):
    """The exit status of python -m vop_jax.report."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return command.main()


def assert_one_line(err, message):
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
