"""Videos that are damaged at random: each gives frames or a reason, none a crash or a hang."""

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
    """Bits flipped, bytes removed, doubled or overwritten, at a few places."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at, length = rng.randrange(len(damaged)), rng.choice((1, 4, 64, 1000))
        place = slice(at, at + length)
        size = len(damaged[place])
        replacement = {
            "flip": bytes([damaged[at] ^ 1 << rng.randrange(8)]) + damaged[at + 1 : at + length],
            "remove": b"",
            "double": damaged[place] * 2,
            "zeros": bytes(size),
            "noise": rng.randbytes(size),
        }
        damaged[place] = replacement[rng.choice([*replacement])]
        if rng.random() < 0.03:
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
        outcomes = list(results)
    assert len(outcomes) == MUTATIONS
    for outcome in outcomes:
        assert isinstance(outcome, Encoded | VideoError)
        if isinstance(outcome, VideoError):
            assert str(outcome) and len(str(outcome).splitlines()) == 1
            assert "more than 60 s" not in str(outcome)
            assert "not decodable (" not in str(outcome)  # an exception that nobody foresaw
    # Both kinds occur; else the damage would show nothing.
    assert 20 < sum(isinstance(outcome, Encoded) for outcome in outcomes) < 180
