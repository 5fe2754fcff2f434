import dataclasses

import pytest

from vop_jax.config.base import base_config
from vop_jax.config.clip import PRESETS
from vop_jax.errors import UserError
from vop_jax.experiment.results import count_parameters
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import parameter_count, partition

B32 = PRESETS["ViT-B/32"]
TINY = PRESETS["tiny"]  # 4 vision layers, 3 text layers, 32 positions

# (trainable, the paper's convention, the paper's percentage as it is printed)
PAPER = {
    "zero_shot": (0, 0, "0.000"),
    "full": (151_277_313, 119_826_432, "100.000"),
    "bias": (171_008, 124_928, "0.104"),
    "proj": (655_360, 655_360, "0.547"),
    "partial": (10_240_256, 7_680_512, "6.410"),
    "adapter_attn": (1_982_976, 1_982_976, "1.655"),
    "adapter_ffn": (1_982_976, 1_982_976, "1.655"),
    "vop": (122_880, 122_880, "0.103"),
    "vop_p": (528_384, 528_384, "0.441"),
    "vop_c": (14_251_008, 14_257_152, "11.898"),
    "vop_f": (132_096, 122_880, "0.103"),
    "vop_f+p": (402_432, 393_216, "0.328"),
    # The paper prints 14.1 M (11.785 %), which the architecture it describes does not give.
    "vop_f+c": (14_272_512, 14_269_440, "11.908"),
}


@pytest.fixture(scope="module")
def counts():
    return count_parameters(base_config())


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_papers(counts, name):
    row = counts[name]
    assert (row["trainable"], row["paper"], f"{row['percent']:.3f}") == PAPER[name]


def test_every_method_is_counted(counts):
    assert counts.keys() == METHODS.keys()


def test_every_pattern_matches_something_and_zero_shot_trains_nothing():
    for name in METHODS:
        method = MethodConfig(name)
        model = TextVideoModel(TINY, method)
        params = tensors.unflatten(model.shapes())
        trainable, _ = partition(params, method.trainable_patterns(TINY))
        assert bool(parameter_count(trainable)) == (name != "zero_shot")


def test_partial_trains_the_last_layer_of_each_tower():
    patterns = MethodConfig("partial").trainable_patterns(TINY)
    assert patterns == (
        r"clip/visual/transformer/resblocks\.3/.*",
        r"clip/text/transformer/resblocks\.2/.*",
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "vopp"}, "method.name='vopp': allowed are zero_shot, .*vop"),
        ({"branches": "audio"}, "method.branches='audio': allowed are both, visual, text"),
        ({"suffix": "sos"}, "method.suffix='sos': allowed are eot, released"),
        ({"visual_prompts": -1}, "method.visual_prompts=-1: must be 0 or more"),
        ({"text_prefix": -2}, "method.text_prefix=-2: must be 0 or more"),
        ({"text_suffix": -3}, "method.text_suffix=-3: must be 0 or more"),
        ({"last_layer": -1}, "method.last_layer=-1: must be 0 or more"),
        ({"first_layer": 0}, "first_layer=0, last_layer=0: layers count from 1"),
        ({"first_layer": 3, "last_layer": 2}, "the last .* is not before the first"),
        (
            {"visual_prompts": 0, "text_prefix": 0, "text_suffix": 0},
            "method.name=vop: no prompt token in branches=both",
        ),
        ({"branches": "visual", "visual_prompts": 0}, "no prompt token in branches=visual"),
        ({"cmm": "gru"}, "method.cmm='gru': allowed are bilstm, lstm, transformer"),
        ({"cmm_role": "patches"}, "method.cmm_role='patches': allowed are prompts, cls"),
        ({"split_layer": -2}, "method.split_layer=-2: must be -1 or more"),
        ({"adapter_width": 0}, "method.adapter_width=0: must be 1 or more"),
        (
            {"name": "vop_p", "specific_prompts": 9},
            "method.specific_prompts=9: at most all method.visual_prompts=8",
        ),
        ({"prompts": 8}, "method.prompts: unknown; known are adapter_width, .*visual_prompts"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message) as caught:
        MethodConfig.from_mapping(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"last_layer": 5}, "last_layer=5: this CLIP has layers 1 to 4"),
        ({"first_layer": 5}, "first_layer=5, .*: this CLIP has layers 1 to 4"),
        ({"first_layer": 4}, "the text tower has only 3 layers; .* branches without text"),
        (
            {"name": "vop_f", "split_layer": 5},
            "split_layer=5: this CLIP has 4 vision layers; allowed are 0 to 4, or -1",
        ),
        ({"text_prefix": 28, "text_suffix": 2}, "= 30: at most 29 of 32 positions can be prompts"),
    ],
)
def test_values_that_do_not_fit_a_clip(values, message):
    method = MethodConfig.from_mapping(values)
    with pytest.raises(UserError, match=message):
        method.check_fits(TINY)


@pytest.mark.parametrize(
    "values",
    [
        {"first_layer": 4, "branches": "visual"},
        {"last_layer": 4},
        {"text_prefix": 27, "text_suffix": 2},
        {"text_prefix": 99, "branches": "visual"},
        {"name": "proj", "text_prefix": 99},
        {"name": "vop_f", "split_layer": 4},
        {"name": "vop_f+c", "split_layer": 0},
        {"name": "vop", "specific_prompts": 99, "split_layer": 99},
    ],
)
def test_values_that_just_fit(values):
    MethodConfig.from_mapping(values).check_fits(TINY)


def test_depth():
    method = MethodConfig(first_layer=2)
    assert list(method.layers(4)) == [1, 2, 3]
    assert list(dataclasses.replace(method, last_layer=3).layers(4)) == [1, 2]
    assert list(dataclasses.replace(method, last_layer=9).layers(4)) == [1, 2, 3]


def test_only_prompts_in_the_text_take_slots():
    assert MethodConfig().text_slots(B32) == 69
    assert MethodConfig(branches="visual").text_slots(B32) == 77
    assert MethodConfig("full").text_slots(B32) == 77


@pytest.mark.parametrize(("depth", "split"), [(12, 8), (24, 16), (6, 4), (4, 2), (1, 0)])
def test_frames_meet_after_two_thirds_of_the_layers_by_default(depth, split):
    assert MethodConfig("vop_f").resolved_split_layer(depth) == split
    assert MethodConfig("vop_p").resolved_split_layer(depth) == depth
    assert MethodConfig("vop_f", branches="text").resolved_split_layer(depth) == depth


def formula(name, clip, frames, specific, split):
    """Trained parameters of the video prompt methods, counted by hand from the description."""
    d, p, layers = clip.vision_width, 8, clip.vision_layers
    before = split if "_f" in name else layers
    total = clip.text_layers * 8 * clip.text_width
    own = specific if name[-1] in "pc" else 0
    total += before * (p - own) * d + (layers - before) * p * d
    if name.endswith("p") and name != "vop":
        total += before * frames * own * d
    if name.endswith("c"):
        total += 2 * (4 * d * 2 * d + 4 * d) + (2 * d * own * d + own * d)
    return total + (frames * d if "_f" in name else 0)


@pytest.mark.parametrize("arch", ["tiny", pytest.param("ViT-L/14", marks=pytest.mark.slow)])
def test_parameter_counts_follow_the_formula_at_other_sizes(arch):
    config = base_config()
    config.clip.arch, config.data.frames = arch, 5
    config.method.specific_prompts = 3
    clip, counts = PRESETS[arch], count_parameters(config)
    split = clip.vision_layers * 2 // 3
    for name in ("vop_p", "vop_c", "vop_f", "vop_f+p", "vop_f+c"):
        assert counts[name]["trainable"] == formula(name, clip, 5, 3, split), name


def test_a_split_that_cannot_be_is_named_by_the_parameter_table_too():
    config = base_config()
    config.clip.arch, config.method.split_layer = "tiny", 8
    with pytest.raises(UserError, match="split_layer=8: this CLIP has 4 vision layers"):
        count_parameters(config)
