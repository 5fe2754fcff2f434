"""Datasets by name: the config's `data` section becomes packed records and captions."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from vop_jax.data import shapes
from vop_jax.data.annotations import read_folder
from vop_jax.data.packed import Packed, Preprocessing, pack
from vop_jax.data.records import Clip
from vop_jax.data.tokenizer import Tokenizer
from vop_jax.errors import UserError

Dataset = dict[str, list[Clip]]  # split -> clips


def _folder(data: ConfigDict, workdir: str) -> Dataset:
    for key in ("annotations", "videos"):
        if not data[key]:
            raise UserError(f"config.data.{key} is not set: data.kind='folder' needs it")
    return read_folder(data.annotations, data.videos)


def _clips(data: ConfigDict, workdir: str) -> Dataset:
    rendered = shapes.render(data.videos or os.path.join(workdir, "videos"))
    return read_folder(rendered, os.path.dirname(rendered))


def _stills(data: ConfigDict, workdir: str) -> Dataset:
    rendered = shapes.render_stills(data.videos or os.path.join(workdir, "stills"))
    return read_folder(rendered, os.path.dirname(rendered))


SOURCES: dict[str, Callable[[ConfigDict, str], Dataset]] = {
    "folder": _folder,
    "clips": _clips,
    "stills": _stills,
}

# Of datasets whose captions have an opposite: caption -> {what is turned: other caption}.
CONTRASTS: dict[str, Callable[[str], dict[str, str]]] = {"clips": shapes.contrasts}


def contrasts(kind: str, captions: Sequence[str]) -> dict[str, list[str]]:
    """{what is turned: the other caption of each}, {} for datasets without such."""
    if kind not in CONTRASTS:
        return {}
    turned = [CONTRASTS[kind](caption) for caption in captions]
    return {name: [row[name] for row in turned] for name in turned[0]}


def load(data: ConfigDict, workdir: str) -> Packed:
    """The records of a run: packed on the first call, opened on the next.

    Args:
        data: the config's section of that name.
        workdir: where rendered videos and, without `data.records`, the records go.

    Raises:
        UserError: see `annotations.read_folder` and `packed.pack`.
    """
    dataset = SOURCES[data.kind](data, workdir)
    for key in ("train_split", "eval_split"):
        if not dataset.get(data[key]):
            found = ", ".join(f"{name} ({len(clips)})" for name, clips in dataset.items())
            raise UserError(
                f"config.data.{key}={data[key]!r}: no such split in the annotations; found {found}"
            )
    wanted = {
        data.train_split: dataset[data.train_split],
        data.eval_split: dataset[data.eval_split],
    }
    return pack(
        wanted,
        data.records or os.path.join(workdir, "records"),
        Preprocessing(
            frames=data.frames,
            short_side=data.short_side,
            stored_fps=data.stored_fps,
            jpeg_quality=data.jpeg_quality,
            short_clips=data.short_clips,
        ),
        max_skipped=data.max_skipped,
    )


class CaptionTokenizer:
    """Captions -> ids of a fixed number of slots; can be sent to worker processes."""

    def __init__(self, slots: int):
        self.slots = slots
        self._tokenizer = Tokenizer()

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [N, T]; a caption that is too long is cut, its EOT kept."""
        return self.with_cuts(captions)[0]

    def with_cuts(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [N, T], bool [N]: the caption was cut)."""
        return self._tokenizer(captions, self.slots)
