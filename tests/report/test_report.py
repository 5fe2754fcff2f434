"""Runs beside each other: rows, ablations, the page."""

import base64
import html.parser
import io
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

import vop_jax.report
from tests.video import videos
from vop_jax.config.base import base_config
from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Preprocessing
from vop_jax.data.records.tfds_builder import Making
from vop_jax.data.records.write import pack
from vop_jax.errors import UserError
from vop_jax.report import __main__ as command
from vop_jax.report.ablations import find_ablations
from vop_jax.report.examples import compare
from vop_jax.report.runs import best, by_eval_data, find_runs, grouped, markdown, read_run

TRAINED = {"zero_shot": 0, "vop": 3584, "vop_p": 10752, "full": 1000000}
VIDEOS = [f"{i}.mp4" for i in range(4)]


def write_run(
    folder, method="vop", r1=50.0, accuracy=True, ranks=(1, 2, 3, 4), film="film", **settings
):
    """A finished run's folder, as training leaves it; `film` is what captions are of."""
    folder.mkdir(parents=True)
    config = base_config()
    config.method.name = method
    config.update_from_flattened_dict(settings)
    sides = {"R@1": r1, "R@5": 80.0, "R@10": 90.0, "MnR": 100 - r1, "MdR": 2.0}
    summary = {
        "method": method,
        "steps": 20,
        "trainable_params": TRAINED[method],
        "t2v": sides,
        "v2t": sides,
        "num_texts": 4,
        "num_videos": 4,
        "eval_split": "test",
        "clip": "tiny <&> clip",
    }
    if accuracy:
        summary["accuracy"] = {"direction": 50.0, "speed": 60.0}
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": 0, "t2v/R@1": 1.0}, {"step": 1, "loss": 3.0}, {"step": 20, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rankings = [
        {
            "caption": f"<i>{film}</i> {i}",
            "video": name,
            "rank": rank,
            "top": [*VIDEOS[i : i + 1] * (rank == 1), *(v for v in VIDEOS if v != name)][:5],
            "similarities": [0.5] * 4,
        }
        for i, (name, rank) in enumerate(zip(VIDEOS, ranks, strict=True))
    ]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rankings))
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of the four videos that the rankings name."""
    root = tmp_path_factory.mktemp("records")
    for i, name in enumerate(VIDEOS):
        videos.write(root / name, 6 + i, width=120, height=90)
    clips = [VideoClip(name, str(root / name), (name,)) for name in VIDEOS]
    preprocessing = Preprocessing(frames=5, short_side=90)
    making = Making(2, isolated=False, progress=False)
    pack({"test": clips}, root / "packed", preprocessing, making=making)
    return root / "packed"


def test_runs_are_found_in_folders_but_not_their_pre_training(tmp_path):
    write_run(tmp_path / "a/seed0")
    write_run(tmp_path / "a/seed0/pretrain", method="full")
    write_run(tmp_path / "b")
    found = [run.workdir for run in find_runs([str(tmp_path)])]
    assert found == [str(tmp_path / "a/seed0"), str(tmp_path / "b")]
    assert [run.workdir for run in find_runs([str(tmp_path / "b")])] == [str(tmp_path / "b")]
    twice = find_runs([str(tmp_path), str(tmp_path / "b")])
    assert len(twice) == 2  # or else it would count as two seeds
    with pytest.raises(UserError, match="no finished run"):
        find_runs([str(tmp_path / "none")])


def test_seeds_share_a_row_with_mean_and_deviation(tmp_path):
    for seed, r1 in enumerate((40.0, 50.0, 60.0)):
        write_run(tmp_path / f"p{seed}", "vop_p", r1, seed=seed)
    write_run(tmp_path / "v", "vop", 30.0)
    rows = grouped(find_runs([str(tmp_path)]))
    assert [(row["label"], row["seeds"]) for row in rows] == [("vop_p", 3), ("vop", 1)]
    assert rows[0]["metrics"]["t2v/R@1"] == (50.0, 10.0)
    assert rows[1]["metrics"]["t2v/R@1"] == (30.0, None)
    winners = best(rows)
    assert winners["t2v/R@1"] == 50.0 and winners["t2v/MnR"] == 50.0  # the lower rank
    table = markdown(rows)
    assert "| vop_p | 10,752 | **50.0 ± 10.0** |" in table and "| vop | 3,584 | 30.0 |" in table


def test_columns_are_those_that_all_runs_have(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "full", accuracy=False)
    assert "direction" not in markdown(grouped(find_runs([str(tmp_path)])))


def test_ablations_are_what_differs_from_the_common_settings(tmp_path):
    write_run(tmp_path / "ref")
    for layer in (1, 3):
        write_run(tmp_path / f"depth{layer}", **{"method.last_layer": layer})
    for prompts in (2, 16):
        sizes = {"method.visual_prompts": prompts, "method.text_prefix": prompts // 2}
        write_run(tmp_path / f"length{prompts}", **sizes)
    write_run(tmp_path / "other", "vop_p")
    runs = find_runs([str(tmp_path)])
    rows = grouped(runs)
    found = find_ablations(rows, {run.workdir: run.settings() for run in runs})
    assert [(a.method, a.keys) for a in found] == [
        ("vop", ("method.last_layer",)),
        ("vop", ("method.text_prefix", "method.visual_prompts")),
    ]
    assert [values for values, _ in found[0].points] == [(0,), (1,), (3,)]
    assert [values for values, _ in found[1].points] == [(1, 2), (4, 8), (8, 16)]
    assert found[0].reference == (0,) and found[1].reference == (4, 8)


def test_a_comparison_shows_what_one_run_gets_right_and_the_other_wrong(tmp_path, records):
    settings = {"data.records": str(records)}
    one = read_run(write_run(tmp_path / "one", ranks=(1, 2, 1, 3), **settings))
    two = read_run(write_run(tmp_path / "two", "vop_p", ranks=(1, 1, 2.5, 4), **settings))
    found = compare(one, two, count=3)
    assert found.tally == {
        "only the second right": 1,
        "only the first right": 1,
        "neither right": 1,
        "both right": 1,
    }
    assert [example.caption[-1] for example in found.examples] == ["1", "2", "3"]
    example = found.examples[0]
    assert example.ranks == (2, 1)
    assert [answer.right for answer in example.answers[1]] == [True, False, False]
    assert [answer.video for answer in example.answers[1]] == ["1.mp4", "0.mp4", "2.mp4"]
    frames = example.answers[0][0].frames
    assert len(frames) == 4 and all(f.startswith("data:image/jpeg;base64,") for f in frames)
    picture = Image.open(io.BytesIO(base64.b64decode(frames[0].partition(",")[2])))
    assert picture.size == (96, 72) and np.asarray(picture).std() > 0


def test_runs_of_other_queries_are_not_compared(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", "vop_p")
    lines = (two / "rankings.jsonl").read_text().split("\n")
    (two / "rankings.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(UserError, match="ranked other queries"):
        compare(read_run(one), read_run(two))


def test_captions_may_hold_any_separator_of_lines(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        first = json.loads((run / "rankings.jsonl").read_text().split("\n")[0])
        line = json.dumps(first | {"caption": "a\u2028b\u0085c"}, ensure_ascii=False)
        (run / "rankings.jsonl").write_text(line + "\n")
    found = compare(*map(read_run, runs))
    assert [example.caption for example in found.examples] == ["a\u2028b\u0085c"]


class Page(html.parser.HTMLParser):
    """Which tags a page opens and closes, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href")]


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return command.main()


def test_the_page_is_whole_and_loads_nothing(tmp_path, records, monkeypatch, capsys):
    pytest.importorskip("matplotlib"), pytest.importorskip("jinja2")
    settings = {"data.records": str(records)}
    write_run(tmp_path / "z", "zero_shot", 2.0, ranks=(4, 4, 4, 4), **settings)
    write_run(tmp_path / "v", "vop", 30.0, **settings)
    write_run(tmp_path / "v1", "vop", 25.0, **settings, **{"method.branches": "text"})
    write_run(tmp_path / "p", "vop_p", 60.0, ranks=(1, 1, 1, 1), **settings)
    output = tmp_path / "report.html"
    assert run_command(monkeypatch, tmp_path, f"--output={output}") == 0
    text = output.read_text()
    page = Page(text)
    assert page.open == []
    assert page.seen.count("svg") == 3  # trade-off, one ablation, curves
    assert all(load.startswith(("data:", "#")) for load in page.loads)
    assert not re.search(r"(src|href)=.https?:|@import|<script", text)
    assert "<i>film" not in text and "&lt;i&gt;film" in text and "tiny &lt;&amp;&gt; clip" in text
    assert text.index("zero_shot</td>") < text.index("vop branches=both</td>")
    assert "only the second right: 3" in text
    assert run_command(monkeypatch, tmp_path, f"--output={output}") == 0
    assert output.read_text() == text  # equal runs, equal bytes


LONG = "the_captions_of_my_videos_" * 6 + ".csv"


def test_each_test_data_has_a_table_of_its_own(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib"), pytest.importorskip("jinja2")
    msvd = {"data.kind": "msvd", "train.steps": 7500, "data.stored_fps": 3.0, "film": "squid"}
    mine = {"data.annotations": f"/a/{LONG}", "data.threads": 3}
    write_run(tmp_path / "a", "vop", 30.0, **msvd)
    write_run(tmp_path / "b", "full", 20.0, **msvd, **{"train.batch_size": 64})
    write_run(tmp_path / "c", "full", 10.0, **msvd, **{"train.log_every": 7})
    write_run(tmp_path / "d", "vop", 90.0, **mine)
    write_run(tmp_path / "e", "vop", 80.0, **mine | {"data.annotations": "/b/same.csv"}, seed=1)
    runs = find_runs([str(tmp_path)])
    groups = {str(data): grouped(own) for data, own in by_eval_data(runs).items()}
    names = [name.partition(" (")[0] for name in groups]
    sizes = "4 captions x 4 videos"
    assert names == [f"msvd, test: {sizes}", f"folder {LONG}, test: {sizes}"]
    labels = [[row["label"] for row in rows] for rows in groups.values()]
    assert labels == [["vop", "full batch_size=64", "full batch_size=32"], ["vop"]]
    assert [row["seeds"] for row in groups[list(groups)[1]]] == [2]  # of the same data elsewhere
    output = tmp_path / "report.html"
    assert run_command(monkeypatch, tmp_path, f"--output={output}") == 0
    text = output.read_text()
    assert Page(text).open == [] and text.count("<table>") == 2
    first, second = text.split("<section>")[1:]
    assert '<td class="best">30.0</td>' in first and '<td class="best">' not in second
    pair = "--compare=vop,full batch_size=64"
    assert run_command(monkeypatch, tmp_path, pair, f"--output={output}") == 0
    (tmp_path / "a/rankings.jsonl").unlink()
    assert run_command(monkeypatch, tmp_path, pair, f"--output={output}") == 2
    assert "are in different tables: their test data differ" in capsys.readouterr().err


def test_runs_over_another_clip_are_not_the_same(tmp_path):
    for name, source in (("a", "ViT-B/32 from x (12)"), ("b", "ViT-B/16 from x (34)")):
        path = write_run(tmp_path / name) / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"clip": source}))
    labels = [row["label"] for row in grouped(find_runs([str(tmp_path)]))]
    assert labels == ["vop clip=ViT-B/32 from x", "vop clip=ViT-B/16 from x"]


def test_wrong_calls_get_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib"), pytest.importorskip("jinja2")
    run = write_run(tmp_path / "run")
    torn = write_run(tmp_path / "torn")
    (torn / "summary.json").write_text("{")
    other = write_run(tmp_path / "other", "vop_p")
    (other / "rankings.jsonl").unlink()
    garbled = write_run(tmp_path / "garbled", "vop_p")
    (garbled / "rankings.jsonl").write_text("{")
    damaged = []
    for i, (name, content, message) in enumerate(
        (
            ("summary.json", "[]", "TypeError"),
            ("summary.json", '{"method": "vop"}', "KeyError: 'clip'"),
            ("summary.json", (run / "summary.json").read_text().replace("2.0", '"2"', 1), "t2v is"),
            ("config.json", "[]", "config.json: damaged"),
            ("config.json", '{"data": 3}', "config.json: damaged"),
            ("rankings.jsonl", "[1]", "TypeError"),
        )
    ):
        damaged.append(([write_run(tmp_path / f"damaged{i}")], message))
        (tmp_path / f"damaged{i}" / name).write_text(content)
    for arguments, message in (
        *damaged,
        ([tmp_path / "none"], "none: no finished run there"),
        ([torn], "summary.json: damaged"),
        ([run, "--compare=vop"], "two labels with a comma"),
        ([run, "--compare=vop,vop_x"], "no run 'vop_x'; there are vop"),
        ([run, other, "--compare=vop,vop_p"], "one has no rankings.jsonl"),
        ([run, garbled], "rankings.jsonl: damaged"),
        ([run, f"--output={run}/summary.json/r.html"], "summary.json"),
    ):
        assert run_command(monkeypatch, *arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    for module in list(sys.modules):
        if module in ("vop_jax.report.page", "vop_jax.report.plots"):
            monkeypatch.delitem(sys.modules, module)
            monkeypatch.delattr(vop_jax.report, module.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_command(monkeypatch, run) == 2
    assert 'pip install -e ".[report]"' in capsys.readouterr().err
