"""The paper's results beside those of runs: which run goes where."""

import re

import pytest

from tests import runs as commands
from tests.report.finished_runs import CLIP, assert_one_line, run_command, write_run
from tests.tuning.test_methods import PAPER
from vop_jax.report import reproduce
from vop_jax.report.runs import read_run
from vop_jax.tuning.methods import METHODS

DOCUMENT = commands.ROOT / "docs" / "benchmarks" / "paper.md"
OF_PAPER = [name for name in reproduce.TEST_SIZES if name not in ("msvd", "vatex")]


def write(folder, kind="msrvtt9k", method="vop", r1=39.0, **options):
    """A run on a benchmark; by default on its official test split."""
    sizes = options.pop("sizes", reproduce.TEST_SIZES.get(kind)) or (15000, 1500)
    return write_run(folder, method, r1, sizes, **options, **{"data.kind": kind})


def write_document(path):
    text = "".join(
        f"## {name}\n<!-- table: {name} -->\nold\n<!-- end -->\nafter  {name}\n\n"
        for name in reproduce.TEST_SIZES
    )
    path.write_text(f"# Title\r\n{text}no newline at the end", newline="")
    return path


def rows_of(text, name):
    """({label: cells}, headings) of a benchmark's table."""
    content = text.split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
    lines = [line for line in content.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells[2:]}, cells[0][1:]


def test_the_committed_tables_are_those_of_no_runs(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "paper.md"
    copy.write_bytes(DOCUMENT.read_bytes())
    assert run_command(monkeypatch, f"--fill={copy}") == 0
    assert copy.read_bytes() == DOCUMENT.read_bytes()
    assert capsys.readouterr().out == f"{copy}\n"
    for name in reproduce.TEST_SIZES:
        assert reproduce.table(name, []).count(reproduce.UNMEASURED) == len(METHODS)


def test_results_are_filled_in_and_the_text_around_the_tables_stays(tmp_path, monkeypatch, capsys):
    runs, document = tmp_path / "runs", write_document(tmp_path / "doc.md")
    before = document.read_bytes()
    for seed, r1 in enumerate((38.0, 39.0, 40.0)):
        write(runs / f"vop{seed}", r1=r1, seed=seed)
    write(runs / "zero", method="zero_shot", r1=31.5)
    write(runs / "f", "didemo", "vop_f", 44.0)
    write(runs / "f64", "didemo", "vop_f", 46.0, **{"data.frames": 64})
    write(runs / "vop64", "didemo", **{"data.frames": 64})
    write(runs / "msvd", "msvd", r1=45.0)
    folder = write(runs / "folder", "folder", r1=12.3, sizes=(1000, 1000))
    assert run_command(monkeypatch, runs, runs / "f", f"--fill={document}") == 0
    after = document.read_bytes()

    outside = [re.sub(rb"<!-- table: .*?<!-- end -->", b"", x, flags=re.S) for x in (before, after)]
    assert outside[0] == outside[1] and b"old" not in after
    assert run_command(monkeypatch, runs, f"--fill={document}") == 0
    assert document.read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc.md", "runs"]
    text = document.read_text()

    def ours(name, label):
        rows, headings = rows_of(text, name)
        return rows[label][headings.index("ours: t2v R@1") :]

    assert ours("msrvtt9k", "vop") == [
        *("39.0 ± 1.0", "59.0 ± 1.0", "69.0 ± 1.0", "61.0 ± 1.0", "41.0 ± 1.0"),
        *("0.005", "20", "3", "12"),
    ]
    assert ours("msrvtt9k", "zero_shot")[::5] == ["31.5", "–"]  # R@1, learning rate
    assert ours("msrvtt9k", "vop_p")[0] == ours("msrvtt7k", "vop")[0] == reproduce.UNMEASURED
    assert ours("msvd", "vop")[0] == "45.0"
    didemo, _ = rows_of(text, "didemo")
    assert didemo["vop_f"][:3] == ["+3.1", "44.7", "44.0"]
    assert didemo["vop_f, 64 frames"][:3] == ["–", "–", "46.0"]  # not in the paper
    assert didemo["vop_f"][-2:] == ["1", "12"] and didemo["vop_f, 64 frames"][-1] == "64"
    # A run of 64 frames leaves the paper's row unmeasured.
    assert didemo["vop"][2] == reproduce.UNMEASURED and didemo["vop, 64 frames"][2] == "39.0"
    assert list(didemo)[-4:-1] == ["vop_f", "vop_f, 64 frames", "vop_f+p"]
    assert "12.3" not in text
    assert f"{folder}: data.kind=folder, in no table\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sizes": (998, 1000)}, "998 captions x 1,000 videos; the official test split has 1,000"),
        ({"summary": {"eval_split": "val"}}, "split val, not test"),
        ({"summary": {"steps": 5}}, "evaluated after 5 of 20 steps"),
        ({"method.branches": "text"}, "method.branches=text is a variant of it"),
    ],
)
def test_runs_that_are_not_comparable_are_listed_with_the_reason(tmp_path, changes, reason):
    run = read_run(write(tmp_path / "run", r1=99.0, **changes))
    text = reproduce.table("msrvtt9k", [run])
    assert "99.0" not in text and text.count(reproduce.UNMEASURED) == len(METHODS)
    assert text.count("\n- ") == 1
    assert f"\n- `{run.workdir}`, vop: not in the table, {reason}" in text
    ((_, note),) = reproduce.notes([run])
    assert note.startswith(f"listed, not filled in: {reason}")


def test_settings_and_clips_are_not_mixed(tmp_path):
    runs = [
        write(tmp_path / "a", r1=30.0, **{"train.learning_rate": 0.001}),
        write(tmp_path / "b", r1=35.0, **{"train.learning_rate": 0.01}),
        write(tmp_path / "c", r1=50.0, summary={"clip": "ViT-L/14 from openai (ba)"}),
    ]
    text = reproduce.table("msrvtt9k", [read_run(run) for run in runs])
    rows, headings = rows_of(f"<!-- table: x -->{text}", "x")
    at = headings.index("ours: t2v R@1")
    one, two = f"vop learning_rate=0.001, {CLIP}", f"vop learning_rate=0.01, {CLIP}"
    measured = {label: cells[at] for label, cells in rows.items() if label.startswith("vop ")}
    assert measured == {one: "30.0", two: "35.0"}
    assert rows[one][:6] == rows[two][:6]  # the paper's
    other = rows["vop, ViT-L/14 from openai (ba)"]
    assert other[at] == "50.0" and set(other[:at]) == {reproduce.NO_FIGURE}


def test_notes_name_sizes_clip_changed_keys_and_unreadable_videos(tmp_path):
    missing = [{"split": split, "reason": "zero bytes"} for split in ("test", "train")]
    options = {"summary": {"skipped_videos": missing}, "compute.dtype": "bfloat16"}
    run = write(tmp_path / "run", "vatex", **options)
    note = f"15,000 captions x 1,500 videos; {CLIP}; compute.dtype=bfloat16; 1 unreadable videos"
    assert f"- `{run}`: {note} (miss)\n" in reproduce.table("vatex", [read_run(run)])
    plain = reproduce.table("vatex", [read_run(write(tmp_path / "plain", "vatex", seed=3))])
    assert f"{CLIP}\n" in plain
    # A checkpoint that was chosen on another split is a result.
    chosen = write(tmp_path / "best", summary={"steps": 10}, **{"train.select": "best"})
    text = reproduce.table("msrvtt9k", [read_run(chosen)])
    assert "| 39.0 |" in text and "; train.select=best\n" in text


def test_wrong_calls_get_one_line_and_write_nothing(tmp_path, monkeypatch, capsys):
    whole = write_document(tmp_path / "whole.md")
    text = whole.read_text()
    start, end = "<!-- table: didemo -->", "<!-- end -->"
    damaged = []
    for content, message in (
        (text.replace(start, ""), f"no marker {start}"),
        (text + start + end, "is there twice"),
        (text.replace(f"{start}\nold\n{end}", start), f"no {end} after {start}"),
        ("\xff", "not UTF-8 text"),
    ):
        path = tmp_path / f"{len(damaged)}.md"
        path.write_text(content, "latin1")
        damaged.append(([f"--fill={path}"], message))
    for arguments, message in (
        *damaged,
        ([f"--fill={tmp_path}/none.md"], "none.md: No such file"),
        ([tmp_path / "none", f"--fill={whole}"], "none: no finished run"),
        ([f"--fill={whole}", f"--output={tmp_path}/page.html"], "RUN_DIR: give at least one"),
        ([f"--fill={whole}", "--compare=vop,vop_p"], "--compare=vop,vop_p: needs a page"),
    ):
        files = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert run_command(monkeypatch, *arguments) == 2
        assert_one_line(capsys.readouterr().err, message)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_paper_s_tables_agree_with_each_other_and_with_its_methods():
    paper = reproduce.load_paper()
    rows, methods = paper["printed"]["msrvtt9k"]["rows"], paper["methods"]
    assert ["zero_shot", *methods] == list(rows) == list(METHODS)
    relative, full = paper["printed"]["t2v_r1_minus_full"], paper["derived"]["full_t2v_r1"]
    for name in OF_PAPER:
        assert list(relative[name]) == methods
        assert reproduce.NO_FIGURE not in reproduce.paper_cells(name)["vop"]
        derived = full[name] + relative[name]["vop_c"]
        assert derived == pytest.approx(paper["printed"]["vop_c_t2v_r1"][name])
    for method, difference in relative["msrvtt9k"].items():
        assert rows[method]["t2v"][0] == pytest.approx(full["msrvtt9k"] + difference)
    counts = {method: count for method, (_, count, _) in PAPER.items()}
    # Most likely a slip of the paper, see docs/paper.md.
    counts["vop_f+c"] = counts["vop_c"] - (counts["vop_p"] - counts["vop_f+p"])
    for method in methods:
        assert rows[method]["percent"] == round(100 * counts[method] / counts["full"], 3)
        assert rows[method]["params_M"] == round(counts[method] / 1e6, 1)
    assert reproduce.TEST_SIZES["msvd"] == (27_763, 670)  # captions, videos
    assert reproduce.TEST_SIZES["vatex"] is None
