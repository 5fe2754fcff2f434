"""MSR-VTT: its two training splits, both tested on the 1,000 pairs known as 1k-A."""

import functools
from collections.abc import Mapping

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import (
    Benchmark,
    Captions,
    Size,
    caption,
    clips_of,
    find,
    find_optional,
    identifier,
    member,
    read_csv,
    read_json,
    unique,
)

TEST = ("MSRVTT_JSFUSION_test.csv",)
CAPTIONS = ("MSRVTT_data.json",)


def read(
    files: Mapping[str, tuple[str, ...]], folder: epath.Path, split: str
) -> tuple[list[VideoClip], list[str]]:
    """Clips of a split: 20 captions each in train, the one of the list in test.

    Raises:
        UserError: a file is missing or not as published.
    """
    notes: list[str] = []
    path = find(folder, files[split])
    if split == "test":
        captions = _sentences_of_test(path, notes)
        clips = clips_of((path, list(captions)), (path, captions), _video, notes)
        _note_other_sentences(folder, path, clips, notes)
        return clips, notes
    ids = read_train_list(path, notes)
    described = find(folder, CAPTIONS)
    return clips_of((path, ids), (described, _sentences(described, notes)), _video, notes), notes


def read_train_list(path: epath.Path, notes: list[str]) -> list[str]:
    """The ids of a training split.

    Raises:
        UserError: the file is no CSV with a column `video_id`.
    """
    rows = read_csv(path, ("video_id",), notes)
    return unique(
        path, [(line, identifier(f"{path}:{line}", name)) for line, (name,) in rows], notes
    )


def _video(name: str) -> str:
    return f"{name}.mp4"


def _sentences_of_test(path: epath.Path, notes: list[str]) -> Captions:
    captions: Captions = {}
    lines = []
    for line, (name, sentence) in read_csv(path, ("video_id", "sentence"), notes):
        where = f"{path}:{line}"
        name = identifier(where, name)
        lines.append((line, name))
        captions.setdefault(name, []).append(caption(where, sentence))
    unique(path, lines, notes)
    return captions


def _sentences(path: epath.Path, notes: list[str]) -> Captions:
    captions: Captions = {}
    for i, entry in enumerate(member(str(path), read_json(path, notes), "sentences", list)):
        where = f"{path}: sentences[{i}]"
        name = identifier(where, member(where, entry, "video_id", str))
        captions.setdefault(name, []).append(caption(where, member(where, entry, "caption", str)))
    return captions


def _note_other_sentences(
    folder: epath.Path, path: epath.Path, clips: list[VideoClip], notes: list[str]
) -> None:
    """The test sentences are taken from the captions; others hint at files of two versions."""
    described = find_optional(folder, CAPTIONS)
    if described is None:
        return  # needed by train only
    known = {
        name: {_normal(text) for text in own} for name, own in _sentences(described, notes).items()
    }
    other = [
        clip.id
        for clip in clips
        if clip.id in known and not {_normal(text) for text in clip.captions} <= known[clip.id]
    ]
    if other:
        notes.append(
            f"{path.name}: {len(other)} sentences not among the captions of their video in "
            f"{described.name} (first {other[0]}); are the files of one version?"
        )


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _benchmark(name: str, videos: int) -> Benchmark:
    part = name.removeprefix("msrvtt")
    files = {"train": (f"MSRVTT_train.{part}.csv",), "test": TEST}
    sizes = {"train": Size(videos, 20 * videos), "test": Size(1000, 1000)}
    protocol = f"MSR-VTT-{part}, test 1k-A"
    return Benchmark(name, protocol, files, sizes, functools.partial(read, files))


MSRVTT9K = _benchmark("msrvtt9k", 9000)
MSRVTT7K = _benchmark("msrvtt7k", 7010)
