"""What freezing CLIP saves: a prompt-tuning step costs two forward passes, not three."""

import dataclasses

import pytest

from benchmarks.step_cost import step_flops
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.tuning.methods import MethodConfig

# Few layers, but widths at which matrix products outweigh the rest as in a real CLIP.
SMALL = ClipConfig(
    image_size=96,
    patch_size=16,
    vision_width=256,
    vision_layers=2,
    vision_heads=4,
    text_width=128,
    text_layers=2,
    text_heads=2,
    embed_dim=128,
)


def ratio(clip, name, frames):
    forward, step = step_flops(clip, MethodConfig(name), frames, batch=2)
    return step / forward


def test_a_prompt_tuning_step_costs_two_forward_passes():
    """Less in the first block, where prompts alone have a gradient: hence more blocks than two."""
    deeper = dataclasses.replace(SMALL, vision_layers=4, text_layers=4)
    assert 1.8 <= ratio(deeper, "vop", frames=4) <= 2.1


def test_prompts_are_no_part_of_the_sequence():
    """Their keys and values are made, once for all frames: next to nothing beside plain CLIP."""
    prompts = dataclasses.replace(MethodConfig("vop"), visual_prompts=64)
    forward, _ = step_flops(SMALL, prompts, frames=4, batch=2)
    plain, _ = step_flops(SMALL, MethodConfig("proj"), frames=4, batch=2)
    assert forward / plain < 1.15  # as part of it they would make 2.4 times as many tokens


def test_forward_flops_are_those_of_the_matrix_products():
    """By hand for plain CLIP; attention, norms and activations add a little."""
    c, frames, batch = SMALL, 4, 2

    def block(width, tokens, read):
        # Keys and values of all tokens; of those that are read query and out, 2 D^2, and the MLP.
        dense = 2 * width**2 * tokens + 10 * width**2 * read
        return 2 * (dense + 2 * width * tokens * read)

    def blocks(layers, width, tokens):
        return (layers - 1) * block(width, tokens, tokens) + block(width, tokens, 1)

    patches = 2 * c.patches * 3 * c.patch_size**2 * c.vision_width
    frame = patches + blocks(c.vision_layers, c.vision_width, 1 + c.patches)
    caption = blocks(c.text_layers, c.text_width, c.context_length)
    forward, _ = step_flops(c, MethodConfig("proj"), frames, batch)
    assert 1 <= forward / (batch * (frames * frame + caption)) <= 1.15


@pytest.mark.slow
def test_full_tuning_costs_three():
    assert 2.7 <= ratio(SMALL, "full", frames=4) <= 3.3


@pytest.mark.slow
def test_vit_b32_with_twelve_frames():
    assert 1.8 <= ratio(PRESETS["ViT-B/32"], "vop", frames=12) <= 2.1
