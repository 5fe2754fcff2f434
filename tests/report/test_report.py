"""Rows of finished runs, their ablations, and the page."""

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

import vop_jax.report
from tests.report.finished_runs import VIDEOS, assert_one_line, run_command, write_run
from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.write import WriteOptions, pack
from vop_jax.errors import UserError
from vop_jax.report.examples import compare, failures
from vop_jax.report.runs import best, find_ablations, find_runs, grouped, markdown, read_run

FILM = {"film": "film"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Config keys of records of the four videos that the rankings name."""
    root = tmp_path_factory.mktemp("records")
    for i, name in enumerate(VIDEOS):
        videos.write(root / name, 6 + i, width=120, height=90)
    clips = [VideoClip(name, str(root / name), (name,)) for name in VIDEOS]
    preprocessing = Preprocessing(frames=5, short_side=90)
    options = WriteOptions(2, isolated=False)
    pack({"test": clips}, root / "packed", preprocessing, options=options)
    return {"data.records": str(root / "packed")}


def test_runs_are_found_in_folders_but_not_their_pre_training(tmp_path):
    for name in ("a/seed0", "a/seed0/pretrain", "b"):
        write_run(tmp_path / name)
    expected = [str(tmp_path / "a/seed0"), str(tmp_path / "b")]
    assert [run.workdir for run in find_runs([str(tmp_path)])] == expected
    assert [run.workdir for run in find_runs(expected[1:])] == expected[1:]
    assert len(find_runs([str(tmp_path), expected[1]])) == 2  # else it would count as two seeds
    with pytest.raises(UserError, match="no finished run"):
        find_runs([str(tmp_path / "none")])


def test_seeds_of_one_clip_share_a_row_with_mean_and_deviation(tmp_path):
    accuracy = {"accuracy": {"direction": 50.0, "speed": 60.0}}
    for seed, r1 in enumerate((40.0, 50.0, 60.0)):
        write_run(tmp_path / f"p{seed}", "vop_p", r1, seed=seed, summary=accuracy)
    write_run(tmp_path / "v", "vop", 30.0)
    write_run(tmp_path / "w", "vop", 20.0, summary={"clip": "ViT-B/16 from x (34)"})
    rows = grouped(find_runs([str(tmp_path)]))
    labels = "vop_p", "vop clip=ViT-B/32 from openai", "vop clip=ViT-B/16 from x"
    assert [(row["label"], row["seeds"]) for row in rows] == [*zip(labels, (3, 1, 1), strict=True)]
    assert rows[0]["metrics"]["t2v/R@1"] == (50.0, 10.0)
    assert rows[1]["metrics"]["t2v/R@1"] == (30.0, None)
    winners = best(rows)
    assert winners["t2v/R@1"] == 50.0 and winners["t2v/MnR"] == 50.0  # the lower rank
    table = markdown(rows)
    assert (
        "| vop_p | 368,640 | **50.0 ± 10.0** |" in table
        and f"| {labels[1]} | 122,880 | 30.0 |" in table
    )
    assert "direction" not in table and "direction" in markdown(rows[:1])  # shared columns only


def test_ablations_differ_from_the_most_common_settings(tmp_path):
    write_run(tmp_path / "ref")
    for layer in (1, 3):
        write_run(tmp_path / f"depth{layer}", **{"method.last_layer": layer})
    for prompts in (2, 16):
        lengths = {"method.visual_prompts": prompts, "method.text_prefix": prompts // 2}
        write_run(tmp_path / f"length{prompts}", **lengths)
    write_run(tmp_path / "other", "vop_p")
    runs = find_runs([str(tmp_path)])
    ablations = find_ablations(grouped(runs), {run.workdir: run.settings() for run in runs})
    assert [(a.method, a.keys) for a in ablations] == [
        ("vop", ("method.last_layer",)),
        ("vop", ("method.text_prefix", "method.visual_prompts")),
    ]
    assert [values for values, _ in ablations[0].points] == [(0,), (1,), (3,)]
    assert [values for values, _ in ablations[1].points] == [(1, 2), (4, 8), (8, 16)]
    assert ablations[0].reference == (0,) and ablations[1].reference == (4, 8)


def test_a_comparison_shows_queries_that_one_run_gets_right(tmp_path, records):
    one = read_run(write_run(tmp_path / "one", ranks=(1, 2, 1, 3), **FILM, **records))
    two = read_run(write_run(tmp_path / "two", "vop_p", ranks=(1, 1, 2.5, 4), **FILM, **records))
    comparison = compare(one, two, count=3)
    assert list(comparison.tally.values()) == [1, 1, 1, 1]
    assert [example.caption[-1] for example in comparison.examples] == ["1", "2", "3"]
    example = comparison.examples[0]
    assert example.ranks == (2, 1)
    retrieved = [(result.video, result.right) for result in example.videos[1]]
    assert retrieved == [("1.mp4", True), ("0.mp4", False), ("2.mp4", False)]
    uris = example.videos[0][0].frames
    assert len(uris) == 4 and all(uri.startswith("data:image/jpeg;base64,") for uri in uris)
    picture = Image.open(io.BytesIO(base64.b64decode(uris[0].partition(",")[2])))
    assert picture.size == (96, 72) and np.asarray(picture).std() > 0


def test_failures_are_the_queries_whose_own_video_ranks_worst(tmp_path, records):
    run = read_run(write_run(tmp_path / "run", ranks=(2, 1, 4, 2), **FILM, **records))
    assert [(f.caption[-1], f.rank) for f in failures(run, 9)] == [("2", 4), ("0", 2), ("3", 2)]
    (worst,) = failures(run, 1)
    assert worst.own.video == "2.mp4" and worst.own.right and len(worst.own.frames) == 4
    assert [(v.video, v.right) for v in worst.top] == [(f"{i}.mp4", False) for i in (0, 1, 3)]
    assert all(len(video.frames) == 4 for video in worst.top)


def test_rankings_of_other_queries_are_refused_and_captions_may_hold_line_separators(tmp_path):
    one, two = (write_run(tmp_path / name, **FILM) for name in ("one", "two"))
    first = json.loads((two / "rankings.jsonl").read_text().split("\n")[0])
    line = json.dumps(first | {"caption": "a\u2028b\u0085c"}, ensure_ascii=False)
    (two / "rankings.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="ranked other queries"):
        compare(read_run(one), read_run(two))
    (one / "rankings.jsonl").write_text(line + "\n")
    (example,) = compare(read_run(one), read_run(two)).examples
    assert example.caption == "a\u2028b\u0085c"


LONG = "the_captions_of_my_videos_" * 6 + ".csv"


def test_the_page_has_a_section_for_each_test_data_and_loads_nothing(
    tmp_path, records, monkeypatch, capsys
):
    pytest.importorskip("matplotlib"), pytest.importorskip("jinja2")
    mine = {"data.annotations": f"/a/{LONG}", "data.threads": 3, "film": "squid"}
    summary = {"clip": "tiny <&> clip", "intervals": {"t2v": {"R@1": [1.5, 2.25]}}}
    msvd = {"data.kind": "msvd", "summary": summary} | FILM | records
    write_run(tmp_path / "z", "zero_shot", 2.0, ranks=(4, 4, 4, 4), **msvd)
    write_run(tmp_path / "v", "vop", 30.0, **msvd)
    write_run(tmp_path / "v1", "vop", 25.0, **msvd, **{"method.branches": "text"})
    write_run(tmp_path / "w", "vop_p", 60.0, ranks=(1, 1, 1, 1), **msvd)
    write_run(tmp_path / "x", "vop", 90.0, **mine)
    write_run(tmp_path / "y", "vop", 80.0, **mine | {"data.annotations": "/b/same.csv"}, seed=1)
    output = tmp_path / "report.html"
    assert run_command(monkeypatch, tmp_path, f"--output={output}") == 0
    text = output.read_text()
    assert text.count("<svg") == text.count("</svg>") == 5  # trade-off and curves, an ablation
    loads = re.findall(r"(?:src|href)=.([^\"']*)", text)
    assert loads and all(load.startswith(("data:", "#")) for load in loads)
    assert not re.search(r"@import|<script", text)
    assert "<i>film" not in text and "&lt;i&gt;film" in text and "tiny &lt;&amp;&gt; clip" in text
    assert text.index("zero_shot</td>") < text.index("vop branches=both")
    assert text.count("<small>1.5 to 2.2</small>") == 4  # of each msvd run
    assert "only the second right: 3" in text
    assert f"vop_p ({tmp_path / 'w'})" not in text and "Not shown: every query is right" in text
    first, second = text.split("<section>")[1:]
    assert first.startswith("\n<h2>msvd, test: 4 captions x 4 videos (")
    assert second.startswith(f"\n<h2>folder {LONG}, test: 4 captions x 4 videos (")
    assert "<td>122,880</td><td>2</td>" in second  # two seeds: equal data elsewhere
    assert '<td class="best">60.0<' in first and '<td class="best">' not in second
    monkeypatch.setattr("vop_jax.report.plots._svg", lambda figure: "<svg></svg>")
    assert run_command(monkeypatch, tmp_path / "v", f"--output={output}", "--failures=2") == 0
    alone = output.read_text()
    assert "a comparison needs two rows" in alone and f"vop ({tmp_path / 'v'}):" in alone
    assert [*re.findall(r"at rank (\d)", alone)] == ["4", "3"] and alone.count("<img") == 32
    for pair, status in (("vop_p,vop branches=text", 0), ("vop_p,vop", 2)):
        arguments = f"--compare={pair}", f"--output={output}"
        assert run_command(monkeypatch, tmp_path, *arguments) == status
    assert "are in different tables: their test data differ" in capsys.readouterr().err


def test_equal_runs_give_equal_plots_and_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    plots = pytest.importorskip("vop_jax.report.plots")
    run = write_run(tmp_path / "run")
    rows = grouped(find_runs([run]))
    assert plots.trade_off(rows) == plots.trade_off(rows)
    for name in ("page", "plots"):
        monkeypatch.delitem(sys.modules, f"vop_jax.report.{name}", raising=False)
        monkeypatch.delattr(vop_jax.report, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_command(monkeypatch, run) == 2
    assert 'pip install -e ".[report]"' in capsys.readouterr().err


def test_wrong_calls_and_damaged_runs_get_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib"), pytest.importorskip("jinja2")
    monkeypatch.setattr("vop_jax.report.plots._svg", lambda figure: "<svg></svg>")
    run = write_run(tmp_path / "run", **FILM)
    other = write_run(tmp_path / "other", "vop_p")
    intervals = json.dumps(
        json.loads((run / "summary.json").read_text()) | {"intervals": {"t2v": {"R@1": [0.0, 9.0]}}}
    )
    damaged = []
    for i, (name, content, message) in enumerate(
        (
            ("summary.json", "{", "summary.json: damaged"),
            ("summary.json", "[]", "TypeError"),
            ("summary.json", '{"method": "vop"}', "KeyError: 'clip'"),
            ("summary.json", (run / "summary.json").read_text().replace("2.0", '"2"', 1), "t2v is"),
            ("summary.json", intervals.replace("[0.0, 9.0]", "3"), "TypeError"),
            ("config.json", "[]", "config.json: damaged"),
            ("config.json", '{"data": 3}', "config.json: damaged"),
            ("rankings.jsonl", "[1]", "TypeError"),
            ("rankings.jsonl", "{", "rankings.jsonl: damaged"),
        )
    ):
        damaged.append(([write_run(tmp_path / f"damaged{i}", **FILM)], message))
        (tmp_path / f"damaged{i}" / name).write_text(content)
    for arguments, message in (
        *damaged,
        ([tmp_path / "none"], "none: no finished run (a folder with summary.json) there"),
        ([run, "--compare=vop"], "two labels with a comma"),
        ([run, "--compare=vop,vop_x"], "no run 'vop_x'; allowed are vop"),
        ([run, other, "--compare=vop,vop_p"], "one has no rankings.jsonl"),
        ([run, f"--output={run}/summary.json/r.html"], "summary.json"),
        ([run, "--failures=-1"], "'-1': a number, 0 or more"),
        ([], "RUN_DIR: give at least one"),
    ):
        assert run_command(monkeypatch, *arguments) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert VIDEOS[0] in (run / "rankings.jsonl").read_text()
