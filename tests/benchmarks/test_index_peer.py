"""Indexing next to a loop of open_clip, on a tiny CLIP and a few frames."""

import dataclasses
import sys

import numpy as np
import pytest

from tests.checkpoints import SIZES, open_clip_config
from tests.peers import import_open_clip
from tests.video import videos

CONFIG = open_clip_config(dataclasses.replace(SIZES, activation="gelu"))["model_cfg"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    for i in range(3):
        videos.write(tmp_path / f"clips/{i:02}.mp4", 12 + 9 * i, width=64, height=48)
    return tmp_path / "clips"


@pytest.fixture
def model():
    return import_open_clip().model.CLIP(**CONFIG)


def test_both_embed_the_same_frames(folder, model):
    from benchmarks import index_peer

    paths = sorted(folder.iterdir())
    ours = index_peer.load_ours(model, "float32").embed_videos(paths)
    np.testing.assert_allclose(index_peer.Peer(model).embed(paths), ours, atol=0.03)


def test_a_row_for_each_program(folder, model, monkeypatch, capsys):
    from benchmarks import index_peer

    monkeypatch.setattr(index_peer.open_clip, "create_model", lambda *_, **__: model)
    argv = ["index_peer", "--clips=3", f"--folder={folder}", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", argv)
    index_peer.main()
    *_, title, _, heading, _, ours, float32, loop = capsys.readouterr().out.splitlines()
    assert title.startswith("3 clips, 1 rounds") and heading.startswith("| program | clips/s")
    names = [row.split(" | ")[0] for row in (ours, float32, loop)]
    assert names[:2] == ["| build_index, bfloat16", "| build_index, float32"]
    assert names[2] == "| open_clip loop, bfloat16" and " | 1.00 | " in loop
