"""Videos that were damaged at random: each gives frames or a reason, none a crash or a hang."""

import contextlib
import functools
import random

from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Encoded, Preprocessing, encode_clip
from vop_jax.errors import VideoError
from vop_jax.video.workers import in_processes

MUTATIONS = 200
KINDS = {
    "h264.mp4": {"codec": "libx264"},
    "hevc.mkv": {"codec": "libx265", "width": 128, "height": 128},
    "mpeg4.avi": {"codec": "mpeg4"},
    "vp9.webm": {"codec": "libvpx-vp9"},
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut out, doubled or overwritten, here and there."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at, length = rng.randrange(len(damaged)), rng.choice((1, 4, 64, 1000))
        what = rng.choice(("flip", "cut", "double", "zeros", "noise", "truncate"))
        if what == "flip":
            damaged[at] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del damaged[at : at + length]
        elif what == "double":
            damaged[at:at] = damaged[at : at + length]
        elif what == "zeros":
            damaged[at : at + length] = bytes(len(damaged[at : at + length]))
        elif what == "noise":
            damaged[at : at + length] = rng.randbytes(len(damaged[at : at + length]))
        elif rng.random() < 0.2:
            del damaged[at:]
        if not damaged:
            break
    return bytes(damaged)


def test_two_hundred_damaged_videos(tmp_path):
    rng = random.Random(17)
    whole = {name: videos.write(tmp_path / name, 24, **options) for name, options in KINDS.items()}
    clips = []
    for i in range(MUTATIONS):
        name = rng.choice(list(whole))
        path = tmp_path / f"{i}_{name}"
        path.write_bytes(mutate(whole[name].read_bytes(), rng))
        clips.append(VideoClip(str(i), str(path), ("x",)))
    preprocessing = Preprocessing(frames=4, short_side=32, stored_fps=2.0, short_clips="repeat")
    encode = functools.partial(encode_clip, preprocessing=preprocessing)
    with contextlib.closing(in_processes(encode, clips, 2, seconds=60)) as results:
        found = list(results)
    assert len(found) == MUTATIONS
    for result in found:
        assert isinstance(result, Encoded | VideoError)
        if isinstance(result, VideoError):
            assert str(result) and len(str(result).splitlines()) == 1
            assert "more than 60 s" not in str(result)
            assert "not decodable (" not in str(result)  # an exception that nobody thought of
    # Both sorts are there, or the damage says nothing.
    usable = sum(isinstance(result, Encoded) for result in found)
    assert 20 < usable < 180
