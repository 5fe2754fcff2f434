"""CLIP's preprocessing against torchvision's rules, restated with Pillow."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vop_jax.video.crops import (
    _draw_box,
    apply_crop,
    centre_crop,
    draw_crop,
    eval_crop,
    resize_short_side,
)

SIZE = 24


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth enough to have a direction, rough enough to show errors."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def clip_preprocess(frame: np.ndarray, size: int) -> np.ndarray:
    """Resize(size, BICUBIC) and CenterCrop(size), as OpenAI's CLIP composes them."""
    height, width = frame.shape[:2]
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    image = Image.fromarray(frame)
    for sides in ((new_width, height), (new_width, new_height)):  # as one call before Pillow 13
        image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@settings(deadline=None, max_examples=50)
@given(height=st.integers(5, 90), width=st.integers(5, 90))
def test_eval_crop_is_clips(height, width):
    frames = [picture(height, width, seed) for seed in range(2)]
    expected = np.stack([clip_preprocess(frame, SIZE) for frame in frames])
    np.testing.assert_array_equal(eval_crop(frames, SIZE), expected)
    centre = apply_crop(frames, SIZE, centre_crop((height, width), SIZE))
    np.testing.assert_array_equal(centre, expected)


def test_a_crop_is_the_resized_box_of_all_frames():
    frames = [picture(60, 80, seed) for seed in range(2)]
    crop = draw_crop((60, 80), SIZE, np.random.default_rng(0), flip=False)
    cropped = apply_crop(frames, SIZE, crop)
    assert cropped.shape == (2, SIZE, SIZE, 3) and cropped.dtype == np.uint8
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    for frame, pixels in zip(frames, cropped, strict=True):
        resized = Image.fromarray(frame).crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pixels, resized)


def test_flip_mirrors_half_of_the_clips():
    frame = picture(SIZE, SIZE)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    mirrored = 0
    for seed in range(200):
        crop = draw_crop((SIZE, SIZE), SIZE, np.random.default_rng(seed), flip=True, **whole)
        expected = frame[:, ::-1] if crop.mirrored else frame
        np.testing.assert_array_equal(apply_crop([frame], SIZE, crop)[0], expected)
        mirrored += crop.mirrored
        plain = draw_crop((SIZE, SIZE), SIZE, np.random.default_rng(seed), flip=False, **whole)
        np.testing.assert_array_equal(apply_crop([frame], SIZE, plain)[0], frame)
    assert 70 <= mirrored <= 130


@settings(deadline=None)
@given(
    h=st.integers(8, 200), w=st.integers(8, 200), seed=st.integers(0, 10**6), low=st.floats(0.1, 1)
)
def test_boxes_are_inside_and_of_the_allowed_sizes(h, w, seed, low):
    scale, ratio = (low, 1.0), (3 / 4, 4 / 3)
    top, left, height, width = _draw_box((h, w), np.random.default_rng(seed), scale, ratio)
    assert 0 <= top <= h - height and 0 <= left <= w - width and height > 0 and width > 0
    # Whole pixels, so a little beyond the ranges; the fallback for long frames may be smaller.
    assert (width - 1) / (height + 1) <= ratio[1] and (width + 1) / (height - 0.99) >= ratio[0]
    if max(h, w) <= 1.3 * min(h, w):
        assert (height + 1) * (width + 1) >= low * h * w


def test_the_short_side_is_enlarged_only_if_allowed():
    frame = picture(20, 30)
    assert resize_short_side(frame, 40, enlarge=False) is frame
    assert resize_short_side(frame, 40).shape == (40, 60, 3)
    assert resize_short_side(frame, 10, enlarge=False).shape == (10, 15, 3)
