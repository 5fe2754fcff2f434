"""What stood first in rankings written by hand."""

import json

import pytest

from benchmarks.first_found import KINDS, first_found, table

LEFT = "a red circle moves slowly to the left at the top"
RIGHT = "a red circle moves slowly to the right at the top"
QUICK = "a red circle moves quickly to the left at the top"
OTHER = "a blue circle moves slowly up on the left"
VIDEOS = {LEFT: "0.mp4", RIGHT: "1.mp4", QUICK: "2.mp4", OTHER: "3.mp4"}


def write(folder, firsts):
    folder.mkdir(parents=True)
    lines = [
        {"caption": caption, "video": video, "top": [VIDEOS[first]]}
        for (caption, video), first in zip(VIDEOS.items(), firsts, strict=True)
    ]
    path = folder / "rankings.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_each_miss_is_of_one_kind(tmp_path):
    path = write(tmp_path / "run", [LEFT, LEFT, LEFT, LEFT])
    assert first_found(path) == dict(zip(KINDS, (25, 25, 25, 25), strict=True))
    path = write(tmp_path / "other", [OTHER, RIGHT, RIGHT, OTHER])
    assert first_found(path) == dict(zip(KINDS, (50, 0, 0, 50), strict=True))


def test_a_row_for_each_method(tmp_path):
    write(tmp_path / "vop/seed0", [LEFT, RIGHT, QUICK, OTHER])
    write(tmp_path / "vop/seed1", [RIGHT, RIGHT, QUICK, OTHER])
    write(tmp_path / "vop_c/seed0", [LEFT, RIGHT, OTHER, OTHER])
    first, second = table(tmp_path).splitlines()[2:]
    assert first == "| vop | 87.5 ± 17.7 | 12.5 ± 17.7 | 0.0 ± 0.0 | 0.0 ± 0.0 |"
    assert second == "| vop_c | 75.0 | 0.0 | 0.0 | 25.0 |"


def test_a_folder_without_such_runs(tmp_path):
    with pytest.raises(SystemExit, match=r"no METHOD/SEED/rankings\.jsonl in it"):
        table(tmp_path)
    path = write(tmp_path / "vop/seed0", [LEFT, RIGHT, QUICK, OTHER])
    path.write_text(path.read_text().replace(LEFT, "a squid talks"))
    with pytest.raises(SystemExit, match=r"rankings\.jsonl: not of the motion benchmark's clips"):
        table(tmp_path)
