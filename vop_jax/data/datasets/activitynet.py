"""ActivityNet Captions: all sentences of a video as one paragraph; tested on val_1."""

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets.parsing import (
    Benchmark,
    Captions,
    Size,
    caption,
    expect,
    find,
    find_optional,
    identifier,
    member,
    note_ids,
    read_json,
    without_empty,
)

FILES = {
    "train": ("activitynet_train.json", "train.json"),
    "test": ("activitynet_val_1.json", "val_1.json"),
}
IDS = {
    "train": ("activitynet_train_ids.json", "train_ids.json"),
    "test": ("activitynet_val_ids.json", "val_ids.json"),
}


def read(folder: epath.Path, split: str) -> tuple[list[VideoClip], list[str]]:
    """Clips of a split, one paragraph each: the sentences, stripped, joined by one space.

    Raises:
        UserError: a file is missing or not as published.
    """
    notes: list[str] = []
    path = find(folder, FILES[split])
    sentences: Captions = {}
    for name, entry in expect(str(path), read_json(path, notes), dict).items():
        name = identifier(str(path), name)
        where = f"{path}: {name}"
        own = member(where, entry, "sentences", list)
        sentences.setdefault(name, []).extend(caption(where, text) for text in own)
    kept = without_empty(path, sentences, notes)
    note_ids(path, [n for n in sentences if n not in kept], "without a sentence, left out", notes)
    _compare_with_ids(folder, split, path, list(sentences), notes)
    return [VideoClip(name, f"{name}.mp4", (" ".join(own),)) for name, own in kept.items()], notes


def _compare_with_ids(
    folder: epath.Path, split: str, described: epath.Path, names: list[str], notes: list[str]
) -> None:
    """The list of ids holds videos that nobody described; captions decide, the list is noted."""
    path = find_optional(folder, IDS[split])
    if path is None:
        return
    ids = [
        identifier(f"{path}: [{i}]", name)
        for i, name in enumerate(expect(str(path), read_json(path, notes), list))
    ]
    undescribed, unlisted = sorted(set(ids) - set(names)), sorted(set(names) - set(ids))
    note_ids(path, undescribed, f"not in {described.name}", notes)
    note_ids(described, unlisted, f"not in {path.name}", notes)


ACTIVITYNET = Benchmark(
    "activitynet",
    "ActivityNet Captions, paragraphs, test is val_1",
    FILES,
    {"train": Size(10009, 10009), "test": Size(4917, 4917)},
    read,
)
