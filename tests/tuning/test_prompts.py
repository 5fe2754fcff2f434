"""Where text prompts stand, against lists put together in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompts import TextLayout

SLOTS, EOT, WIDTH = 9, 99, 2  # one shape of captions, so that operations compile once


@st.composite
def captions(draw):
    """int32 [3, T]: SOS, words, EOT, padding."""
    rows = []
    for _ in range(3):
        words = draw(st.lists(st.integers(0, 97), max_size=SLOTS - 2))
        rows.append([98, *words, EOT] + [0] * (SLOTS - 2 - len(words)))
    return np.array(rows, np.int32)


def by_hand(ids, x, prompts, prefix, suffix):
    """[SOS, prefix, words, suffix, rest] of each caption."""
    rows = []
    for caption, tokens in zip(ids.tolist(), x, strict=True):
        end = caption.index(EOT) if suffix == "eot" else len(caption) - 1
        before, after = prompts[:prefix], prompts[prefix:]
        rows.append([tokens[0], *before, *tokens[1:end], *after, *tokens[end:]])
    return np.array(rows)


@pytest.mark.parametrize("suffix", ["eot", "released"])
@pytest.mark.parametrize("lengths", [(2, 3), (3, 0), (0, 0)])
@settings(max_examples=8)
@given(ids=captions())
def test_text_prompts_stand_where_a_list_would_put_them(ids, lengths, suffix):
    method = MethodConfig(text_prefix=lengths[0], text_suffix=lengths[1], suffix=suffix)
    layout = TextLayout.of(jnp.asarray(ids), method)
    x = np.arange(1.0, ids.size * WIDTH + 1, dtype=np.float32).reshape(*ids.shape, WIDTH)
    prompts = -np.arange(1.0, sum(lengths) * WIDTH + 1, dtype=np.float32).reshape(-1, WIDTH)
    expected = by_hand(ids, x, prompts, lengths[0], suffix)
    placed, rows = np.zeros_like(expected), np.arange(len(ids))[:, None]
    placed[rows, layout.words] = x
    placed[rows, layout.prompts] = prompts
    np.testing.assert_array_equal(placed, expected)
    np.testing.assert_array_equal(layout.insert(x, prompts[None]), expected)
    # Under the causal mask a word attends to the prompts that stand before it in that list.
    for row, mask in zip(expected[..., 0].tolist(), layout.mask.tolist(), strict=True):
        words = [i for i, token in enumerate(row) if token > 0]
        places = [i for i, token in enumerate(row) if token < 0]
        assert mask == [[p < w for p in places] for w in words]
