"""A dataset before anything is decoded: splits of clips with captions."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class VideoClip:
    """One video, or a segment of one, with its captions.

    Attributes:
        id: unique in its split; reports call the clip by it.
        path: the video file.
        captions: at least one.
        start, end: seconds in the file; None is the file's own beginning or end.
        where: "FILE:LINE" of its row, where it has one.
    """

    id: str
    path: str
    captions: tuple[str, ...]
    start: float | None = None
    end: float | None = None
    where: str = ""


Dataset = dict[str, list[VideoClip]]  # split -> clips in file order
