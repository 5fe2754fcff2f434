"""The paper's figures beside ours: where runs go, and where they do not."""

import json
import sys

import pytest

from tests import runs as commands
from vop_jax.config.base import base_config
from vop_jax.experiment import results
from vop_jax.report import __main__ as command
from vop_jax.report import reproduce
from vop_jax.report.runs import read_run
from vop_jax.tuning.methods import METHODS

DOCUMENT = commands.ROOT / "docs" / "benchmarks" / "paper.md"
OF_PAPER = [name for name in reproduce.TEST_SIZES if name not in ("msvd", "vatex")]
OPENAI = "ViT-B/32 from openai (0123456789ab)"


def write_run(folder, kind="msrvtt9k", method="vop", r1=39.0, sizes=None, summary=None, **settings):
    """A finished run's folder on a benchmark; of the official test sizes unless told otherwise."""
    folder.mkdir(parents=True)
    config = base_config()
    config.method.name = method
    config.train.steps = 20
    with config.ignore_type():
        config.update_from_flattened_dict(settings)
    config = config.to_dict()
    config["data"]["kind"] = kind
    texts, videos = sizes or reproduce.TEST_SIZES[kind] or (15000, 1500)
    told = {
        "method": method,
        "steps": 20 if method != "zero_shot" else 0,
        "trainable_params": 122_880 if method != "zero_shot" else 0,
        "t2v": {"R@1": r1, "R@5": r1 + 20, "R@10": r1 + 30, "MnR": 17.0, "MdR": 2.0},
        "v2t": {"R@1": r1 + 2, "R@5": 70.0, "R@10": 80.0, "MnR": 12.0, "MdR": 2.0},
        "num_texts": texts,
        "num_videos": videos,
        "eval_split": "test",
        "missing_videos_count_as": "miss",
        "skipped_videos": [],
        "clip": OPENAI,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(told | (summary or {})))
    return folder


def empty_document(path):
    path.write_text(
        "# Title\r\n"
        + "".join(
            f"## {name}\n<!-- table: {name} -->\nold\n<!-- end -->\nafter  {name}\n\n"
            for name in reproduce.TEST_SIZES
        )
        + "no newline at the end",
        newline="",
    )
    return path


def fill(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return command.main()


def rows_of(text, name):
    """{label: {heading: cell}} of a benchmark's table; headings that repeat have their place."""
    content = text.split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
    lines = [line for line in content.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(cells) for cells in split}) == 1
    return {cells[0]: cells[1:] for cells in split[2:]}, split[0][1:]


def ours(text, name, label):
    """{heading: cell} of our columns in a row."""
    rows, headings = rows_of(text, name)
    first = headings.index("ours: t2v R@1")
    return dict(zip(headings[first:], rows[label][first:], strict=True))


def test_the_committed_tables_are_those_of_no_runs(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "reproduce.md"
    copy.write_bytes(DOCUMENT.read_bytes())
    assert fill(monkeypatch, f"--fill={copy}") == 0
    assert copy.read_bytes() == DOCUMENT.read_bytes()
    assert capsys.readouterr().out == f"{copy}\n"


def test_without_runs_nothing_is_claimed():
    for name in reproduce.TEST_SIZES:
        text = reproduce.table(name, [])
        assert text.count(reproduce.UNMEASURED) == len(METHODS)


def test_what_lies_outside_of_the_markers_stays(tmp_path, monkeypatch):
    document = empty_document(tmp_path / "doc.md")
    before = document.read_bytes()
    write_run(tmp_path / "runs/vop")
    assert fill(monkeypatch, tmp_path / "runs", f"--fill={document}") == 0
    after = document.read_bytes()
    assert b"old" in before and b"old" not in after

    def outside(text):
        pieces = text.split(b"<!-- table: ")
        return [piece.split(b"<!-- end -->")[-1] for piece in pieces]

    assert outside(after) == outside(before)
    assert fill(monkeypatch, tmp_path / "runs", f"--fill={document}") == 0
    assert document.read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc.md", "runs"]  # alone


def test_runs_land_in_their_cells(tmp_path, monkeypatch):
    runs, document = tmp_path / "runs", empty_document(tmp_path / "doc.md")
    for seed, r1 in enumerate((38.0, 39.0, 40.0)):
        write_run(runs / f"vop{seed}", r1=r1, seed=seed)
    write_run(runs / "zero", method="zero_shot", r1=31.5)
    write_run(runs / "f", "didemo", "vop_f", 44.0)
    write_run(runs / "f64", "didemo", "vop_f", 46.0, **{"data.frames": 64})
    write_run(runs / "msvd", "msvd", r1=45.0)
    assert fill(monkeypatch, runs, runs / "f", f"--fill={document}") == 0
    text = document.read_text()
    assert ours(text, "msrvtt9k", "vop") == {
        "ours: t2v R@1": "39.0 ± 1.0",
        "R@5": "59.0 ± 1.0",
        "R@10": "69.0 ± 1.0",
        "MnR": "17.0 ± 0.0",
        "v2t R@1": "41.0 ± 1.0",
        "learning rate": "0.005",
        "steps": "20",
        "seeds": "3",
        "frames": "12",
    }
    zero = ours(text, "msrvtt9k", "zero_shot")
    assert (zero["ours: t2v R@1"], zero["learning rate"], zero["steps"]) == ("31.5", "–", "0")
    assert ours(text, "msrvtt9k", "vop_p")["ours: t2v R@1"] == reproduce.UNMEASURED
    assert ours(text, "msrvtt7k", "vop")["ours: t2v R@1"] == reproduce.UNMEASURED
    assert ours(text, "msvd", "vop")["ours: t2v R@1"] == "45.0"
    didemo, _ = rows_of(text, "didemo")
    assert didemo["vop_f"][:3] == ["+3.1", "44.7", "44.0"]
    assert didemo["vop_f, 64 frames"][:3] == ["–", "–", "46.0"]  # the paper has none
    assert didemo["vop_f"][-2:] == ["1", "12"] and didemo["vop_f, 64 frames"][-1] == "64"
    first = text.split("<!-- table: didemo -->")[1]
    assert first.index("| vop_f |") < first.index("| vop_f, 64 frames |") < first.index("vop_f+p")


def test_only_64_frames_leave_the_papers_row_unmeasured(tmp_path):
    run = read_run(write_run(tmp_path / "f", "activitynet", **{"data.frames": 64}))
    rows, _ = rows_of(f"<!-- table: x -->{reproduce.table('activitynet', [run])}", "x")
    assert rows["vop"][2] == reproduce.UNMEASURED and rows["vop, 64 frames"][2] == "39.0"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"sizes": (998, 998)},
            "998 captions x 998 videos; the official test split has 1,000 captions x 1,000 videos",
        ),
        ({"sizes": (1000, 2000)}, "1,000 captions x 2,000 videos; the official"),
        ({"summary": {"eval_split": "val"}}, "split val, not test"),
        ({"summary": {"steps": 5}}, "evaluated after 5 of 20 steps"),
        ({"method.branches": "text"}, "method.branches=text is a variant of it"),
    ],
)
def test_other_runs_are_listed_with_the_reason_and_not_filled_in(tmp_path, changes, reason):
    folder = write_run(tmp_path / "run", r1=99.0, **changes)
    text = reproduce.table("msrvtt9k", [read_run(folder)])
    assert "99.0" not in text and text.count(reproduce.UNMEASURED) == len(METHODS)
    assert text.count("\n- ") == 1
    assert f"\n- `{folder}`, vop: not in the table, {reason}" in text


def test_settings_and_clips_are_not_mixed(tmp_path):
    runs = [
        write_run(tmp_path / "a", r1=30.0, **{"train.learning_rate": 0.001}),
        write_run(tmp_path / "b", r1=35.0, **{"train.learning_rate": 0.01}),
        write_run(tmp_path / "c", r1=50.0, summary={"clip": "ViT-L/14 from openai (ba)"}),
    ]
    text = reproduce.table("msrvtt9k", [read_run(run) for run in runs])
    rows, headings = rows_of(f"<!-- table: x -->{text}", "x")
    at = headings.index("ours: t2v R@1")
    found = {label: cells[at] for label, cells in rows.items() if label.startswith("vop ")}
    one, two = f"vop learning_rate=0.001, {OPENAI}", f"vop learning_rate=0.01, {OPENAI}"
    assert found == {one: "30.0", two: "35.0"}
    assert rows[one][:6] == rows[two][:6]  # the paper's
    other = rows["vop, ViT-L/14 from openai (ba)"]
    assert other[at] == "50.0" and set(other[:at]) == {reproduce.NO_FIGURE}


def test_what_a_figure_is_of_stands_below(tmp_path):
    missing = [
        {"split": "test", "id": "a", "path": "a", "reason": "zero bytes"},
        {"split": "train", "id": "b", "path": "b", "reason": "zero bytes"},
    ]
    summary, bfloat16 = {"skipped_videos": missing}, {"compute.dtype": "bfloat16"}
    run = write_run(tmp_path / "run", "vatex", summary=summary, **bfloat16)
    told = f"15,000 captions x 1,500 videos; {OPENAI}; compute.dtype=bfloat16; 1 unreadable videos"
    assert f"- `{run}`: {told} (miss)\n" in reproduce.table("vatex", [read_run(run)])
    plain = reproduce.table("vatex", [read_run(write_run(tmp_path / "plain", "vatex", seed=3))])
    assert f"{OPENAI}\n" in plain


def test_a_checkpoint_chosen_on_another_split_is_a_result_and_told(tmp_path):
    folder = write_run(tmp_path / "run", summary={"steps": 10}, **{"train.select": "best"})
    text = reproduce.table("msrvtt9k", [read_run(folder)])
    assert "| 39.0 |" in text and "; train.select=best\n" in text


def test_other_data_is_in_no_table(tmp_path, monkeypatch, capsys):
    document = empty_document(tmp_path / "doc.md")
    assert fill(monkeypatch, f"--fill={document}") == 0
    empty = document.read_bytes()
    run = write_run(tmp_path / "run", "folder", sizes=(1000, 1000))
    assert fill(monkeypatch, run, f"--fill={document}") == 0
    assert document.read_bytes() == empty
    assert capsys.readouterr().err == f"{run}: data.kind=folder, in no table\n"


def test_fill_goes_with_a_page(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib"), pytest.importorskip("jinja2")
    document, run = empty_document(tmp_path / "doc.md"), write_run(tmp_path / "run")
    page = tmp_path / "page.html"
    assert fill(monkeypatch, run, f"--fill={document}", f"--output={page}") == 0
    assert page.exists() and "| 39.0 |" in document.read_text()


def test_wrong_calls_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys):
    whole = empty_document(tmp_path / "whole.md")
    text = whole.read_text()
    start, end = "<!-- table: didemo -->", "<!-- end -->"
    without, twice, endless, binary = (tmp_path / name for name in ("a", "b", "c", "d"))
    without.write_text(text.replace(start, ""))
    twice.write_text(text + start + end)
    endless.write_text(text.replace(f"{start}\nold\n{end}", start))
    binary.write_bytes(b"\xff" + text.encode())
    for arguments, message in (
        ([f"--fill={without}"], f"no marker {start}"),
        ([f"--fill={twice}"], "is there twice"),
        ([f"--fill={endless}"], f"no {end} after {start}"),
        ([f"--fill={binary}"], "not UTF-8 text"),
        ([f"--fill={tmp_path}/none.md"], "none.md: No such file"),
        ([tmp_path / "none", f"--fill={whole}"], "none: no finished run there"),
        ([f"--fill={whole}", f"--output={tmp_path}/page.html"], "RUN_DIR: give at least one"),
        ([], "RUN_DIR: give at least one"),
        ([f"--fill={whole}", "--compare=vop,vop_p"], "--compare=vop,vop_p: is for a page"),
    ):
        files = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert fill(monkeypatch, *arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_paper_has_every_method_of_its_benchmarks():
    paper = reproduce.load_paper()
    assert ["zero_shot", *paper["methods"]] == list(METHODS)
    assert list(paper["printed"]["msrvtt9k"]["rows"]) == list(METHODS)
    relative = paper["printed"]["t2v_r1_minus_full"]
    for name in OF_PAPER:
        assert list(relative[name]) == paper["methods"]
        assert reproduce.NO_FIGURE not in reproduce.paper_cells(name)["vop"]
        derived = paper["derived"]["full_t2v_r1"][name]
        assert derived + relative[name]["vop_c"] == pytest.approx(
            paper["printed"]["vop_c_t2v_r1"][name]
        )


def test_the_papers_tables_agree_with_each_other():
    paper = reproduce.load_paper()
    rows = paper["printed"]["msrvtt9k"]["rows"]
    full = rows["full"]["t2v"][0]
    assert full == paper["derived"]["full_t2v_r1"]["msrvtt9k"]
    for method, less in paper["printed"]["t2v_r1_minus_full"]["msrvtt9k"].items():
        assert rows[method]["t2v"][0] == pytest.approx(full + less)


def test_the_papers_parameters_are_those_of_its_methods():
    rows = reproduce.load_paper()["printed"]["msrvtt9k"]["rows"]
    counts = results.count_parameters(base_config())
    # Most likely a slip of the paper, see docs/paper.md.
    saved = counts["vop_p"]["percent"] - counts["vop_f+p"]["percent"]
    counts["vop_f+c"]["percent"] = counts["vop_c"]["percent"] - saved
    for method in reproduce.load_paper()["methods"]:
        percent = counts[method]["percent"]
        assert rows[method]["percent"] == round(percent, 3)
        assert rows[method]["params_M"] == round(percent / 100 * counts["full"]["paper"] / 1e6, 1)


def test_the_official_test_sizes():
    assert reproduce.TEST_SIZES == {
        "msrvtt9k": (1000, 1000),
        "msrvtt7k": (1000, 1000),
        "didemo": (1004, 1004),
        "activitynet": (4917, 4917),
        "lsmdc": (1000, 1000),
        "msvd": (27_763, 670),
        "vatex": None,
    }
