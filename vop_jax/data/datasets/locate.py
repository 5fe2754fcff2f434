"""Where the videos of official names really are: other extensions, other places, frames."""

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

# ActivityNet's ids are YouTube's with this before them; some downloads are named without.
PREFIX = "v_"

Match = tuple[str, bool]  # a relative path, and whether it is a folder of frames


def locate(
    clips: Sequence[VideoClip], videos: str | os.PathLike
) -> tuple[list[VideoClip], list[str]]:
    """Finds the videos of clips whose paths are official ones, relative to a folder.

    A video that is not at its official path is, anywhere in the folder, the file of that name
    with another extension, or the folder of that name with extracted frames. One that is not
    found keeps its official path, and is reported when it is to be read.

    Returns:
        The clips with the paths of their videos in `videos`.
        Notes: how many were found under other names or not at all, one line each.

    Raises:
        UserError: there is no such folder, or not one of the videos in it.
    """
    root = epath.Path(videos)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of videos")
    there = _at_official_paths(root, clips)
    lost = [clip.path for clip in clips if clip.path not in there]
    names = {name for path in lost for name in _names(path)}
    index = _index(root, names) if lost else {}
    found: dict[str, str] = {}  # official path -> path
    remarks: dict[str, list[str]] = {}  # what -> of which
    for path in lost:
        matches = next((index[name] for name in _names(path) if name in index), [])
        if matches:
            found[path], what = _choose(path, matches)
            remarks.setdefault(what, []).append(found[path])
        else:
            remarks.setdefault("are missing", []).append(path)
        if len(matches) > 1:
            twice = " and ".join(match for match, _ in matches)
            remarks.setdefault("are there twice", []).append(twice)
    if clips and not there and not found:
        raise UserError(_nothing_found(root, clips))
    notes = [
        f"{root}: {len(which)} of {len(clips)} videos {what}, first {which[0]}"
        for what, which in remarks.items()
    ]
    prefix = os.fspath(root)
    return [
        dataclasses.replace(clip, path=os.path.join(prefix, found.get(clip.path, clip.path)))
        for clip in clips
    ], notes


def _names(path: str) -> tuple[str, ...]:
    """The names, without extension, that a video may have; the official one first."""
    stem = name_of(path)
    return (stem, stem.removeprefix(PREFIX)) if stem.startswith(PREFIX) else (stem,)


def _at_official_paths(root: epath.Path, clips: Sequence[VideoClip]) -> set[str]:
    """The official paths that exist; one listing a folder, for stores where asking is slow."""
    there: set[str] = set()
    for folder in {posixpath.dirname(clip.path) for clip in clips}:
        if (root / folder).is_dir():
            there |= {posixpath.join(folder, path.name) for path in (root / folder).iterdir()}
    return there & {clip.path for clip in clips}


def _index(root: epath.Path, names: Container[str]) -> dict[str, list[Match]]:
    """{name without extension: the videos and folders of frames below}."""
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
    official = posixpath.splitext(path)[1].lower()

    def rank(match: Match) -> tuple[bool, bool, str]:
        found, is_folder = match
        return is_folder, posixpath.splitext(found)[1].lower() != official, found

    matches.sort(key=rank)
    is_folder, other_extension, found = rank(matches[0])
    if is_folder:
        return found, "are folders of frames"
    return found, "have another extension" if other_extension else "lie elsewhere or are renamed"


def _nothing_found(root: epath.Path, clips: Sequence[VideoClip]) -> str:
    names = sorted(path.name for path in root.iterdir())[:3]
    return (
        f"{root}: none of the {len(clips)} videos is in this folder; looked for {clips[0].path}, "
        f"for {_names(clips[0].path)[0]} with {' '.join(VIDEOS)}, and for a folder of its frames; "
        f"there are {', '.join(map(repr, names)) or 'no files'}"
    )
