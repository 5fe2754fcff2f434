"""ActivityNet Captions: all sentences of a video as one paragraph; tested on val_1."""

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import (
    AnnotationFiles,
    captions_by_id,
    expect,
    identifier,
)
from vop_jax.data.datasets.source import Benchmark, SplitSize

FILES = {
    "train": ("activitynet_train.json", "train.json"),
    "test": ("activitynet_val_1.json", "val_1.json"),
}
IDS = {
    "train": ("activitynet_train_ids.json", "train_ids.json"),
    "test": ("activitynet_val_ids.json", "val_ids.json"),
}


def read_split(files: AnnotationFiles, split: str) -> list[VideoClip]:
    """Clips of a split, one paragraph each: the sentences, stripped, joined by one space."""
    path = files.find(FILES[split])
    sentences = captions_by_id(path, files.read_json(path), "sentences")
    clips = files.clips((path, list(sentences)), (path, sentences), "{}.mp4".format, paragraph=True)
    if (id_file := files.find_optional(IDS[split])) is not None:
        _compare_ids(files, id_file, path, set(sentences))
    return clips


def _compare_ids(
    files: AnnotationFiles, id_file: epath.Path, caption_file: epath.Path, described: set[str]
) -> None:
    """Notes differences: the list of ids names videos without captions, and captions decide."""
    ids = {
        identifier(f"{id_file}: [{i}]", name)
        for i, name in enumerate(expect(str(id_file), files.read_json(id_file), list))
    }
    files.note_ids(id_file, sorted(ids - described), f"not in {caption_file.name}")
    files.note_ids(caption_file, sorted(described - ids), f"not in {id_file.name}")


DATASET = Benchmark(
    "activitynet",
    "ActivityNet Captions, paragraphs, test is val_1",
    {"train": SplitSize(10009, 10009), "test": SplitSize(4917, 4917)},
    FILES,
    read_split,
)
