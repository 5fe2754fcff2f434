"""Rows whose similarities are exact in float32, so that ties are ties; and random unit rows."""

import numpy as np
from hypothesis import strategies as st


@st.composite
def pairs(draw):
    """(texts, videos, video of each text, a bound on elements); few sizes, so few programs."""
    videos = draw(st.sampled_from([1, 5]))
    count = videos + draw(st.sampled_from([0, 6]))
    extra = draw(st.lists(st.integers(0, videos - 1), min_size=count - videos, max_size=count))
    owner = np.array(draw(st.permutations([*range(videos), *extra[: count - videos]])))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    width = 2
    texts = rng.integers(-4, 5, (count, width)) / np.float32(8)
    candidates = rng.integers(-4, 5, (videos, width)) / np.float32(8)
    # One query at a time, a few, all.
    elements = draw(st.sampled_from([1, 3 * count, 10**6]))
    return texts.astype(np.float32), candidates.astype(np.float32), owner, elements


def random_pairs(texts, videos, seed=0, width=8, similar=1.0):
    """Unit rows in general position; texts lie near their videos, several per video."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.arange(texts) % videos)
    video_rows = rng.standard_normal((videos, width))
    text_rows = similar * video_rows[owner] + rng.standard_normal((texts, width))
    return unit(text_rows), unit(video_rows), owner


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
