"""MTEB's own evaluation of our prompts: its scores are those of our ranks."""

import dataclasses
import importlib.util
import sys
import warnings

import jax
import numpy as np
import pytest

import vop_jax
from tests import runs
from tests.inference.test_retriever import write_prompts
from tests.video import videos
from vop_jax.errors import UserError
from vop_jax.evaluation import metrics
from vop_jax.interop import mteb as program
from vop_jax.video.crops import eval_crop
from vop_jax.video.frames import read_frames
from vop_jax.video.sampling import sample_indices

FRAMES, PAIRS = 3, 30


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(clip.safetensors, prompts.safetensors)"""
    root = tmp_path_factory.mktemp("mteb")
    clip = runs.write_clip(root / "clip.safetensors")
    return str(clip), str(write_prompts(root / "prompts.safetensors", clip, 0))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(files, texts): films of colours that drift, of different sizes, rates and lengths."""
    root = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    files = []
    for i in range(PAIRS):
        first, last = rng.integers(0, 256, (2, 4, 4, 3))
        shares = np.linspace(0, 1, 5 + i)[:, None, None, None]
        small = (first + shares * (last - first)).astype(np.uint8)
        film = small.repeat(8 + 4 * (i % 3), axis=1).repeat(16, axis=2)
        files.append(str(videos.encode(root / f"{i}.mp4", film, rate=10 + i)))
    return files, [f"{('red', 'blue', 'green')[i % 3]} film {i * i}" for i in range(PAIRS)]


@pytest.fixture
def mteb(tmp_path, monkeypatch):
    """The library, quiet, with its results and caches in a folder of the test."""
    for module in ("mteb", "torchcodec"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install '.[mteb]'")
    for name in ("MTEB_CACHE", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        import mteb

        yield mteb


def tasks_of(mteb, files, texts):
    """The pairs as two tasks of MTEB, text to video and video to text."""
    from datasets import Dataset, Video
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    ids = [str(i) for i in range(len(files))]
    sides = {
        "v": Dataset.from_dict({"id": ids, "video": files}).cast_column("video", Video()),
        "t": Dataset.from_dict({"id": ids, "text": texts}),
    }

    def task(category):
        class Pairs(AbsTaskRetrieval):
            metadata = TaskMetadata(
                name=f"Pairs{category.upper()}",
                description="Pairs of films and texts.",
                dataset={"path": "none/none", "revision": "1"},
                type="Any2AnyRetrieval",
                category=category,
                modalities=["text", "video"],
                eval_splits=["test"],
                eval_langs=["eng-Latn"],
                main_score="ndcg_at_10",
                prompt={"query": "Find what matches."},
            )

            def load_data(self, *_, **__):
                queries, corpus = (sides[side] for side in category.split("2"))
                relevant = {number: {number: 1} for number in ids}
                data = RetrievalSplitData(
                    queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None
                )
                self.dataset, self.data_loaded = {"default": {"test": data}}, True

        return Pairs()

    return [task("t2v"), task("v2t")]


@pytest.mark.slow
def test_scores_are_those_of_our_ranks(mteb, places, pairs, tmp_path, monkeypatch, capsys):
    """The command, for prompts and without: R@k of both directions, from mteb's own files."""
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: tasks_of(mteb, *pairs))
    found = []
    for prompts in (places[1], None):
        arguments = [f"--clip={places[0]}", "--task=Pairs", f"--output={tmp_path / 'results'}"]
        arguments += [f"--prompts={prompts}"] if prompts else [f"--frames={FRAMES}"]
        assert runs.call(*arguments, program=program.main) == 0
        retriever = vop_jax.load(places[0], prompts, frames=FRAMES)
        texts, films = retriever.embed_text(pairs[1]), retriever.embed_videos(pairs[0])
        ranks = metrics.rank_pairs(texts, films, np.arange(PAIRS))
        table = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        for row, direction in zip(table[1:], (ranks.t2v, ranks.v2t), strict=True):
            expected = metrics.summarize(direction)
            assert row[1:4] == [f"{expected[f'R@{k}']:.1f}" for k in (1, 5, 10)]
        found.append(table[1:])
    assert found[0] != found[1]
    assert len(list(tmp_path.glob("results/**/PairsT2V.json"))) == 2  # none replaced the other


@pytest.mark.slow
def test_frames_are_those_of_training(mteb, places, tmp_path):
    """Frames show their numbers: all videos of a length, with and without a stored rate."""
    from torchcodec.decoders import VideoDecoder

    from vop_jax.interop.mteb_encoder import ClipCollator

    spec = vop_jax.load(*places).frame_spec
    for count in (1, 2, 3, 10, 41):
        film = videos.write_numbered(tmp_path / "film.mp4", list(range(count)), base=25, rate=25)
        for fps, sampling in ((0.0, "uniform"), (0.0, "linspace"), (5.0, "uniform")):
            chosen = dataclasses.replace(spec, image_size=32, fps=fps, sampling=sampling)
            (clip,) = ClipCollator(chosen)([{"video": VideoDecoder(film)}])["video"]
            frames = read_frames(film, FRAMES, fps=fps, sampling=sampling).pixels
            rows = sample_indices(len(frames), FRAMES, sampling)
            expected = eval_crop([frames[row] for row in rows], 32)
            np.testing.assert_allclose(clip.astype(int), expected, atol=3)


@pytest.mark.slow
def test_wrong_calls(mteb, places, pairs, tmp_path, monkeypatch, capfd):
    arguments = [f"--clip={places[0]}", f"--output={tmp_path}"]

    def offline(self, **options):
        raise ConnectionError("Couldn't reach 'mteb/MSR-VTT' on the Hub")

    monkeypatch.setattr(type(mteb.get_task("MSRVTTT2V")), "load_data", offline)
    for task, message in (
        ("MSRVTTT2W", "--task: 'MSRVTTT2W' not found. Did you mean: 'MSRVTTT2V"),
        ("MSRVTTT2VA", "--task=MSRVTTT2VA: is of the kind t2va; must be t2v or v2t"),
        ("MSRVTTT2V", "MTEB: Couldn't reach 'mteb/MSR-VTT' on the Hub"),
    ):
        status = runs.call(*arguments, f"--task={task}", program=program.main)
        runs.assert_refused((status, *capfd.readouterr()), message)
    sounds = tasks_of(mteb, *pairs)[0]
    sounds.metadata = sounds.metadata.model_copy(update={"category": "t2va"})
    model = program.encoder(vop_jax.load(places[0], frames=FRAMES))
    with pytest.raises(UserError, match="a side has video and audio; must be text or video alone"):
        mteb.evaluate(model, sounds, cache=None)


@pytest.mark.parametrize("missing", ["mteb.models.abs_encoder", "torchcodec"])
def test_without_the_extra(places, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "vop_jax.interop.mteb_encoder", raising=False)
    with pytest.raises(UserError, match=r'MTEB: .*; pip install -e "\.\[mteb\]", and FFmpeg'):
        program.encoder(vop_jax.load(places[0]))
