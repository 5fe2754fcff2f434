import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.errors import UserError
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompt_set import has_frame_tables, interpolate_frames


def tree(frames, width=2):
    rows = np.random.default_rng(0).normal(size=(frames, width)).astype(np.float32)
    return {
        "prompts": {
            "visual": np.ones((3, 4, width), np.float32),
            "position": np.stack([rows[:, None], 2 * rows[:, None]]),  # [L, F, P, D]
            "frame_position": rows,
            "context": {"transformer": {"frame_position": 3 * rows}},
        }
    }


def test_the_same_number_of_frames_is_the_same_table():
    before, after = tree(5)["prompts"], interpolate_frames(tree(5), 5)["prompts"]
    np.testing.assert_array_equal(before["position"], after["position"])
    np.testing.assert_array_equal(before["frame_position"], after["frame_position"])


def test_every_table_and_nothing_else_is_resampled():
    after = interpolate_frames(tree(4), 7)["prompts"]
    assert after["position"].shape == (2, 7, 1, 2)
    assert after["frame_position"].shape == (7, 2)
    assert after["context"]["transformer"]["frame_position"].shape == (7, 2)
    np.testing.assert_array_equal(after["visual"], tree(4)["prompts"]["visual"])
    np.testing.assert_allclose(after["position"][1, :, 0], 2 * after["frame_position"], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(old=st.integers(1, 20), new=st.integers(1, 40))
def test_a_straight_line_stays_one_and_no_row_is_outside(old, new):
    line = ((np.arange(old) + 0.5) / old).astype(np.float32)[:, None]
    out = interpolate_frames({"prompts": {"frame_position": line}}, new)["prompts"]
    at = (np.arange(new) + 0.5) / new  # the middles of segments, as in uniform sampling
    expected = np.clip(at, line[0], line[-1])
    np.testing.assert_allclose(out["frame_position"][:, 0], expected, atol=1e-6)


def test_which_parameters_are_bound_to_a_number_of_frames():
    assert has_frame_tables(tree(3))
    assert not has_frame_tables({"prompts": {"visual": 1, "context": {"lstm": {"bias": 2}}}})
    assert not has_frame_tables({"clip": {"visual": {"positional_embedding": 1}}})


def test_another_number_of_frames_is_named():
    MethodConfig(frames=3).check_frames(3)
    with pytest.raises(UserError, match="clips of 8 frames, but the prompts know 12"):
        MethodConfig().check_frames(8)
