"""Official annotation files of every benchmark in miniature: a real layout, invented content."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable

from vop_jax.data.datasets import registry

BENCHMARKS = {s.kind: s for s in map(registry.get, registry.kinds()) if s.sizes}

Sizes = dict[str, int]  # split -> videos
Paths = dict[str, list[str]]  # split -> official paths of its videos, in order

# What differs between clips is short: the text tower of tests has few slots.
NOUNS = ("dog", "cat", "man", "car", "bird", "fish", "girl", "boat")
VERBS = ("runs", "sits", "turns", "waits", "falls", "swims", "dances", "sleeps")


def sentence(video: int, caption: int) -> str:
    return f"a {NOUNS[video % 8]} {VERBS[(video // 8 + caption) % 8]} {video}.{caption}"


def sentences(video: int, number: int) -> list[str]:
    return [sentence(video, i) for i in range(number)]


def numbered(sizes: Sizes) -> dict[str, range]:
    """Numbers of the videos of each split, no two alike."""
    ends, splits = 0, {}
    for split, size in sizes.items():
        splits[split] = range(ends, ends + size)
        ends += size
    return splits


def lines(texts: Iterable[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def write_json(path: pathlib.Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


def write_msrvtt(part: str, root: pathlib.Path, sizes: Sizes, captions: int) -> Paths:
    splits = numbered(sizes)
    every = [i for own in splits.values() for i in own]
    texts = [
        {"video_id": f"video{i}", "caption": text, "sen_id": 0}
        for i in every
        for text in sentences(i, captions)
    ]
    videos = [{"video_id": f"video{i}", "id": i} for i in every]
    write_json(root / "MSRVTT_data.json", {"videos": videos, "sentences": texts})
    if "train" in splits:
        rows = lines(f"video{i}" for i in splits["train"])
        (root / f"MSRVTT_train.{part}.csv").write_text(f"video_id\n{rows}")
    if "test" in splits:
        rows = lines(f'ret{i},msr{i},video{i},"{sentence(i, 0)}"' for i in splits["test"])
        (root / "MSRVTT_JSFUSION_test.csv").write_text(f"key,vid_key,video_id,sentence\n{rows}")
    return {split: [f"video{i}.mp4" for i in own] for split, own in splits.items()}


def write_didemo(root: pathlib.Path, sizes: Sizes, captions: int) -> Paths:
    paths: Paths = {}
    for split, own in numbered(sizes).items():
        names = {i: f"{i}@N00_{i:05}_ab.{'mov' if i % 3 else 'avi'}" for i in own}
        entries = [
            {"video": name, "description": text, "times": [[0, 1], [0, 0]], "annotation_id": i}
            for i, name in names.items()
            for text in sentences(i, captions)
        ]
        write_json(root / f"{split}_data.json", entries)
        (root / f"{split}_list.txt").write_text(lines(names.values()))
        paths[split] = [*names.values()]
    return paths


def write_activitynet(root: pathlib.Path, sizes: Sizes, captions: int) -> Paths:
    for split, own in numbered(sizes).items():
        entries = {
            f"v_{i:011}": {
                "duration": 5.0 * captions,
                "timestamps": [[5.0 * k, 5.0 * (k + 1)] for k in range(captions)],
                "sentences": [f" {text}." for text in sentences(i, captions)],
            }
            for i in own
        }
        write_json(root / {"train": "train.json", "test": "val_1.json"}[split], entries)
        write_json(root / {"train": "train_ids.json", "test": "val_ids.json"}[split], list(entries))
    return {split: [f"v_{i:011}.mp4" for i in own] for split, own in numbered(sizes).items()}


def write_lsmdc(root: pathlib.Path, sizes: Sizes, captions: int) -> Paths:
    """One sentence each, whatever `captions` is."""
    files = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }
    paths: Paths = {}
    for split, own in numbered(sizes).items():
        rows, paths[split] = [], []
        for i in own:
            film = f"{i % 3:04}_A_FILM"
            start, end = f"00.{i // 60 % 60:02}.{i % 60:02}.000", f"01.00.00.{i % 1000:03}"
            clip = f"{film}_{start}-{end}"
            cells = (clip, start, end, start, end, f'SOMEONE said "{sentence(i, 0)}')
            rows.append("\t".join(cells) + "\n")
            paths[split].append(f"{film}/{clip}.avi")
        (root / files[split]).write_text("".join(rows))
    return paths


def write_by_id(
    file: str, extension: str, root: pathlib.Path, sizes: Sizes, captions: int
) -> Paths:
    texts, paths = {}, {}
    for split, own in numbered(sizes).items():
        names = {f"-{i:010}_1_{9 + i}": sentences(i, captions) for i in own}
        (root / f"{split}_list.txt").write_text(lines(names))
        paths[split] = [name + extension for name in names]
        texts |= names
    write_json(root / file, texts)
    return paths


WRITERS: dict[str, Callable[[pathlib.Path, Sizes, int], Paths]] = {
    "msrvtt9k": functools.partial(write_msrvtt, "9k"),
    "msrvtt7k": functools.partial(write_msrvtt, "7k"),
    "didemo": write_didemo,
    "activitynet": write_activitynet,
    "lsmdc": write_lsmdc,
    "msvd": functools.partial(write_by_id, "captions_msvd.json", ".avi"),
    "vatex": functools.partial(write_by_id, "ref_captions.json", ".mp4"),
}


def write_official(
    name: str, root: pathlib.Path, sizes: Sizes, captions_per_video: int = 2
) -> Paths:
    """Writes the annotation files of a benchmark into a folder; {split: paths of its videos}.

    Args:
        captions_per_video: or sentences of a paragraph; LSMDC and MSR-VTT's test have one.
    """
    root.mkdir(parents=True, exist_ok=True)
    return WRITERS[name](root, sizes, captions_per_video)


def read_benchmark(name: str, annotations: pathlib.Path, **options: object):
    """(clips with official paths by split, notes) of a benchmark."""
    return registry.get(name).read(annotations, None, **options)
