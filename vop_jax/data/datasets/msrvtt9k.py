"""MSR-VTT: 9,000 videos to train on, tested on the 1,000 pairs known as 1k-A."""

import functools

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import AnnotationFiles, Captions, captions_of_entries, member
from vop_jax.data.datasets.source import Benchmark, SplitSize

TEST = ("MSRVTT_JSFUSION_test.csv",)
CAPTIONS = ("MSRVTT_data.json",)
VIDEO = "{}.mp4".format


def read_split(train: tuple[str, ...], files: AnnotationFiles, split: str) -> list[VideoClip]:
    """Clips of a split: 20 captions each in train, the one of the list in test."""
    if split == "test":
        return _read_test(files)
    path, described = files.find(train), files.find(CAPTIONS)
    listed = path, train_ids(files, path)
    return files.clips(listed, (described, _captions(files, described)), VIDEO)


def train_ids(files: AnnotationFiles, path: epath.Path) -> list[str]:
    """The ids of a training list, a CSV file with a column `video_id`."""
    rows = files.read_csv(path, ("video_id",))
    return files.unique_ids(path, ((line, name) for line, (name,) in rows))


def _read_test(files: AnnotationFiles) -> list[VideoClip]:
    path = files.find(TEST)
    captions = files.captions_of_rows(path, files.read_csv(path, ("video_id", "sentence")))
    clips = files.clips((path, list(captions)), (path, captions), VIDEO)
    if (described := files.find_optional(CAPTIONS)) is not None:
        _note_other_sentences(files, path, clips, described)
    return clips


def _captions(files: AnnotationFiles, path: epath.Path) -> Captions:
    entries = member(str(path), files.read_json(path), "sentences", list)
    return captions_of_entries(f"{path}: sentences", entries, "video_id", "caption")


def _note_other_sentences(
    files: AnnotationFiles, path: epath.Path, clips: list[VideoClip], described: epath.Path
) -> None:
    """Test sentences are taken from the captions; others hint at files of two versions."""
    known = {name: set(map(_normalise, own)) for name, own in _captions(files, described).items()}
    other = [
        clip.id
        for clip in clips
        if clip.id in known and not set(map(_normalise, clip.captions)) <= known[clip.id]
    ]
    if other:
        files.notes.append(
            f"{path.name}: {len(other)} sentences not among the captions of their video in "
            f"{described.name} (first {other[0]}); are the files of one version?"
        )


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def benchmark(kind: str, protocol: str, train: str, videos: int) -> Benchmark:
    """MSR-VTT with a training list of so many videos."""
    return Benchmark(
        kind,
        protocol,
        {"train": SplitSize(videos, 20 * videos), "test": SplitSize(1000, 1000)},
        {"train": (train,), "test": TEST},
        functools.partial(read_split, (train,)),
    )


DATASET = benchmark("msrvtt9k", "MSR-VTT-9k, test 1k-A", "MSRVTT_train.9k.csv", 9000)
