"""Where prompts stand, against lists put together in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompts import TextLayout, set_visual_prompts

SLOTS, EOT, WIDTH = 9, 99, 2  # one shape of captions, so that operations compile once
PROMPTS = [(2, 3), (0, 2), (3, 0), (0, 0), (1, 1)]


@st.composite
def captions(draw):
    """int32 [3, T]: SOS, words, EOT, padding."""
    rows = []
    for _ in range(3):
        words = draw(st.lists(st.integers(0, 97), max_size=SLOTS - 2))
        rows.append([98, *words, EOT] + [0] * (SLOTS - 2 - len(words)))
    return np.array(rows, np.int32)


def tokens_of(ids):
    """[N, T, D], each token another vector, none of them zero."""
    count = ids.size * WIDTH
    return jnp.arange(1.0, count + 1).reshape(*ids.shape, WIDTH)


def prompts_of(prefix, suffix):
    """[P, D], unlike any token."""
    count = (prefix + suffix) * WIDTH
    return -jnp.arange(1.0, count + 1).reshape(-1, WIDTH)


def by_hand(ids, x, prompts, prefix, suffix):
    """[SOS, prefix, words, suffix, rest] of each caption."""
    rows, x, prompts = [], np.asarray(x), np.asarray(prompts)
    for caption, tokens in zip(ids.tolist(), x, strict=True):
        end = caption.index(EOT) if suffix == "eot" else len(caption) - 1
        before, after = prompts[:prefix], prompts[prefix:]
        rows.append([tokens[0], *before, *tokens[1:end], *after, *tokens[end:]])
    return np.array(rows)


@pytest.mark.parametrize("suffix", ["eot", "released"])
@pytest.mark.parametrize("lengths", PROMPTS)
@settings(max_examples=8, deadline=None)
@given(ids=captions())
def test_text_prompts_stand_where_a_list_would_put_them(ids, lengths, suffix):
    method = MethodConfig(text_prefix=lengths[0], text_suffix=lengths[1], suffix=suffix)
    layout = TextLayout.of(jnp.asarray(ids), method)
    x, prompts = tokens_of(ids), prompts_of(*lengths)
    expected = by_hand(ids, x, prompts, lengths[0], suffix)
    inserted = layout.insert(x)
    np.testing.assert_array_equal(inserted, by_hand(ids, x, 0 * prompts, lengths[0], suffix))
    placed = layout.replace(inserted, prompts)
    np.testing.assert_array_equal(placed, expected)
    np.testing.assert_array_equal(layout.remove(placed), x)
    # A deeper layer's prompts take the place of these.
    again = by_hand(ids, x, 10 * prompts, lengths[0], suffix)
    np.testing.assert_array_equal(layout.replace(placed, 10 * prompts), again)


@pytest.mark.parametrize("suffix", ["eot", "released"])
def test_eot_moves_by_the_number_of_prompts(suffix):
    ids = np.array([[98, EOT, 0, 0, 0], [98, 5, 6, 7, EOT]], np.int32)
    method = MethodConfig(text_prefix=2, text_suffix=1, suffix=suffix)
    layout = TextLayout.of(jnp.asarray(ids), method)
    x = jnp.asarray(ids, jnp.float32)[..., None]
    placed = np.asarray(layout.insert(x))[..., 0]
    last = 4 + layout.tokens
    # The released code reads a short caption's feature where its EOT is not.
    expected = [1 + layout.tokens, last] if suffix == "eot" else [1 + 2, last]
    assert placed.argmax(axis=1).tolist() == expected


@pytest.mark.parametrize("present", [0, 2, 5])  # at 5 the new ones are as many
def test_visual_prompts_stand_between_cls_and_patches(present):
    frames, patches = 3, 4
    x = jnp.arange(1.0 * frames * (1 + present + patches) * WIDTH).reshape(frames, -1, WIDTH)
    prompts = prompts_of(0, 5)
    cls, rest = x[:, :1], x[:, 1 + present :]
    shared = np.repeat(prompts[None], frames, axis=0)
    np.testing.assert_array_equal(
        set_visual_prompts(x, prompts, present), np.concatenate([cls, shared, rest], axis=1)
    )
    np.testing.assert_array_equal(
        set_visual_prompts(x, None, present), np.concatenate([cls, rest], axis=1)
    )


def test_prompts_take_the_precision_of_the_sequence():
    x = jnp.ones((2, 5, WIDTH), jnp.bfloat16)
    prompts = prompts_of(1, 1)
    assert set_visual_prompts(x, prompts, 0).dtype == jnp.bfloat16
    ids = jnp.array([[98, 1, EOT]] * 2)
    layout = TextLayout.of(ids, MethodConfig(text_prefix=1, text_suffix=1))
    assert layout.replace(x, prompts).dtype == jnp.bfloat16
