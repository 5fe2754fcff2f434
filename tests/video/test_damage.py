"""Videos that are damaged at random: each gives frames or a reason, none a crash or a hang."""

import functools
import random

from tests.video import videos
from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Encoded, Preprocessing, encode_clip
from vop_jax.errors import VideoError
from vop_jax.video.workers import in_processes

MUTATIONS = 100
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
        at = rng.randrange(len(damaged))
        place = slice(at, at + rng.choice((1, 4, 64, 1000)))
        old = damaged[place]
        flipped = bytes([old[0] ^ 1 << rng.randrange(8)]) + old[1:]
        noise = rng.randbytes(len(old))
        damaged[place] = rng.choice((flipped, b"", old * 2, bytes(len(old)), noise))
        if rng.random() < 0.03:
            del damaged[at + 1 :]
    return bytes(damaged)


def test_damaged_videos_give_frames_or_a_reason(tmp_path):
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
    outcomes = list(in_processes(encode, clips, 2, seconds=60))
    assert len(outcomes) == MUTATIONS
    for outcome in outcomes:
        assert isinstance(outcome, Encoded | VideoError)
        if isinstance(outcome, VideoError):
            assert str(outcome) and len(str(outcome).splitlines()) == 1
            assert "more than 60 s" not in str(outcome)
            assert "not decodable (" not in str(outcome)  # an exception that nobody foresaw
    # Both kinds occur; else the damage would show nothing.
    assert 10 < sum(isinstance(outcome, Encoded) for outcome in outcomes) < 90
