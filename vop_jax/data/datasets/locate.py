"""Finds videos whose files are not named as a benchmark names them."""

import dataclasses
import os
import posixpath
from collections.abc import Container, Sequence

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.errors import UserError
from vop_jax.storage.files import walk
from vop_jax.video.files import VIDEOS, name_of
from vop_jax.video.images import is_picture

# ActivityNet's ids are YouTube's after this prefix; some downloads are named without it.
PREFIX = "v_"

Match = tuple[str, bool]  # a relative path, and whether it is a folder of frames


def locate(
    clips: Sequence[VideoClip], videos: str | os.PathLike
) -> tuple[list[VideoClip], list[str]]:
    """Finds the videos of clips whose paths are official ones, relative to a folder.

    A video that is not at its official path is, anywhere in the folder, the file of that name
    with another extension, or the folder of that name with extracted frames. A video that is
    missing keeps its official path, and is reported when it is decoded.

    Returns:
        The clips with the paths of their videos in `videos`.
        Notes: how many have other names or are missing, one line each.

    Raises:
        UserError: the folder does not exist, or contains none of the videos.
    """
    root = epath.Path(videos)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of videos")
    official = _at_official_paths(root, clips)
    absent = [clip.path for clip in clips if clip.path not in official]
    names = {name for path in absent for name in _names(path)}
    index = _index(root, names) if absent else {}
    actual: dict[str, str] = {}  # official path -> path
    remarks: dict[str, list[str]] = {}  # what differs -> videos
    for path in absent:
        matches = next((index[name] for name in _names(path) if name in index), [])
        if matches:
            actual[path], what = _choose(path, matches)
            remarks.setdefault(what, []).append(actual[path])
        else:
            remarks.setdefault("are missing", []).append(path)
        if len(matches) > 1:
            both = " and ".join(match for match, _ in matches)
            remarks.setdefault("are there twice", []).append(both)
    if clips and not official and not actual:
        raise UserError(_none_message(root, clips))
    notes = [
        f"{root}: {len(which)} of {len(clips)} videos {what}, first {which[0]}"
        for what, which in remarks.items()
    ]
    prefix = os.fspath(root)
    return [
        dataclasses.replace(clip, path=os.path.join(prefix, actual.get(clip.path, clip.path)))
        for clip in clips
    ], notes


def _names(path: str) -> tuple[str, ...]:
    """The names, without extension, that a video may have; the official one first."""
    stem = name_of(path)
    return (stem, stem.removeprefix(PREFIX)) if stem.startswith(PREFIX) else (stem,)


def _at_official_paths(root: epath.Path, clips: Sequence[VideoClip]) -> set[str]:
    """The official paths that exist; lists folders, because a bucket is slow to ask for each."""
    paths: set[str] = set()
    for folder in {posixpath.dirname(clip.path) for clip in clips}:
        if (root / folder).is_dir():
            paths |= {posixpath.join(folder, path.name) for path in (root / folder).iterdir()}
    return paths & {clip.path for clip in clips}


def _index(root: epath.Path, names: Container[str]) -> dict[str, list[Match]]:
    """{name without extension: the videos and folders of frames below `root`}."""
    index: dict[str, list[Match]] = {}
    for folder, _, files in walk(root):
        name = name_of(folder)
        if name in names and any(map(is_picture, files)):
            index.setdefault(name, []).append((folder, True))
        for file in files:
            if file.lower().endswith(VIDEOS) and (name := name_of(file)) in names:
                index.setdefault(name, []).append((posixpath.join(folder, file), False))
    return index


def _choose(path: str, matches: list[Match]) -> tuple[str, str]:
    """(the match to use, how it differs): the official extension first, frames last."""
    extension = posixpath.splitext(path)[1].lower()

    def rank(match: Match) -> tuple[bool, bool, str]:
        name, is_folder = match
        return is_folder, posixpath.splitext(name)[1].lower() != extension, name

    matches.sort(key=rank)
    is_folder, other_extension, name = rank(matches[0])
    if is_folder:
        return name, "are folders of frames"
    return name, "have another extension" if other_extension else "lie elsewhere or are renamed"


def _none_message(root: epath.Path, clips: Sequence[VideoClip]) -> str:
    names = sorted(path.name for path in root.iterdir())[:3]
    return (
        f"{root}: none of the {len(clips)} videos is in this folder; looked for {clips[0].path}, "
        f"for {_names(clips[0].path)[0]} with {' '.join(VIDEOS)}, and for a folder of its frames; "
        f"there are {', '.join(map(repr, names)) or 'no files'}"
    )
