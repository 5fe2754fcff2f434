"""The table of methods, the paper's parameter counts, and a method that is not in the paper."""

import dataclasses

import flax.linen as nn
import jax
import pytest

from tests import tiny
from vop_jax.config.base import base_config
from vop_jax.config.clip import PRESETS
from vop_jax.errors import UserError
from vop_jax.experiment import counts
from vop_jax.experiment.counts import count_parameters
from vop_jax.storage import tensors
from vop_jax.training.step import TrainState, make_optimizer, make_train_step
from vop_jax.tuning.methods import METHODS, Method, MethodConfig
from vop_jax.tuning.partition import partition
from vop_jax.tuning.prompt_set import PromptSet, load_prompts, save_prompts
from vop_jax.tuning.prompts import GENERATORS

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


def test_parameter_counts_are_the_papers():
    counts = count_parameters(base_config())
    assert counts.keys() == METHODS.keys()  # so every pattern of every method matches
    for name, row in counts.items():
        expected = PAPER[name]
        assert (row["trainable"], row["paper"], f"{row['percent']:.3f}") == expected, name


class Deviation(nn.Module):
    """A frame's own prompts, made from how its CLS token differs from the mean of its clip."""

    method: MethodConfig
    width: int
    tokens: int
    activation: str
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, cls):
        deviation = cls - cls.mean(axis=1, keepdims=True)  # [B, F, D]
        out = nn.Dense(self.tokens * self.width, dtype=self.dtype)(deviation)
        return out.reshape(*cls.shape[:2], self.tokens, self.width)


def test_a_new_method_is_one_row_and_its_parts(monkeypatch, tmp_path):
    row = Method((r"prompts/.*", r"clip/.*/ln_post/.*"), prompts=True, specific="deviation")
    monkeypatch.setitem(METHODS, "vop_d", row)
    monkeypatch.setitem(GENERATORS, "deviation", Deviation)
    values = {"name": "vop_d", "visual_prompts": 3, "specific_prompts": 2, "frames": tiny.FRAMES}
    method = MethodConfig.from_mapping(values)
    clip = dataclasses.replace(tiny.CLIP, vision_layers=1, text_layers=1)  # compiles fast
    model, params = tiny.model_and_params(method, clip=clip)
    trainable, frozen = partition(params, method.trainable_patterns(clip))
    config = base_config().train
    config.update(warmup=0.0, learning_rate=1e-2)
    optimizer = make_optimizer(config)
    step = jax.jit(make_train_step(model, optimizer))
    state, ids = TrainState.create(trainable, optimizer), tiny.captions(4, 12)
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, {"frames": tiny.frames(4), "ids": ids})
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    before, after = tensors.flatten(trainable), tensors.flatten(state.trainable)
    assert {name.split("/")[1] for name in after if name.startswith("prompts/")} == {
        *("text", "visual", "deviation")
    }
    assert all((before[name] != after[name]).any() for name in after)
    save_prompts(tmp_path / "p", PromptSet(state.trainable, method, "f", "tiny", clip))
    assert load_prompts(tmp_path / "p").method == method


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "vopp"}, "method.name='vopp': allowed are zero_shot, .*vop"),
        ({"branches": "audio"}, "method.branches='audio': allowed are .*both.*visual.*text"),
        ({"visual_prompts": -1}, "method.visual_prompts=-1: must be 0 or more"),
        ({"split_layer": -2}, "method.split_layer=-2: must be -1 or more"),
        ({"first_layer": 0}, "first_layer=0, last_layer=0: layers count from 1"),
        ({"first_layer": 3, "last_layer": 2}, "the last .* is not before the first"),
        (
            {"visual_prompts": 0, "text_prefix": 0, "text_suffix": 0},
            "method.name=vop: no prompt token in branches=both",
        ),
        ({"branches": "visual", "visual_prompts": 0}, "no prompt token in branches=visual"),
        (
            {"name": "vop_p", "specific_prompts": 9},
            "method.specific_prompts=9: at most all method.visual_prompts=8",
        ),
        ({"prompts": 8}, "method.prompts: unknown; known are adapter_width, .*visual_prompts"),
        # Of a CLIP of other sizes:
        ({"last_layer": 5}, "last_layer=5: this CLIP has layers 1 to 4"),
        ({"first_layer": 5}, "first_layer=5, .*: this CLIP has layers 1 to 4"),
        ({"first_layer": 4}, "the text tower has only 3 layers; .* branches without text"),
        (
            {"name": "vop_f", "split_layer": 5},
            "split_layer=5: this CLIP has 4 vision layers; allowed are 0 to 4, or -1",
        ),
        ({"text_prefix": 28, "text_suffix": 2}, "= 30: at most 29 of 32 positions can be prompts"),
        # The largest that fit:
        ({"first_layer": 4, "branches": "visual"}, None),
        ({"last_layer": 4}, None),
        ({"text_prefix": 27, "text_suffix": 2}, None),
        ({"text_prefix": 99, "branches": "visual"}, None),
        ({"name": "proj", "text_prefix": 99}, None),
        ({"name": "vop_f", "split_layer": 4}, None),
        ({"name": "vop", "specific_prompts": 99, "split_layer": 99}, None),
    ],
)
def test_wrong_values_are_refused(values, message):
    def check():
        MethodConfig.from_mapping(values).check_fits(TINY)

    if message is None:
        return check()
    with pytest.raises(UserError, match=message) as caught:
        check()
    assert "\n" not in str(caught.value)


def test_a_table_of_parameters_needs_a_method_that_fits(monkeypatch):
    monkeypatch.setattr(counts, "METHODS", {"vop_f": METHODS["vop_f"]})
    config = base_config()
    config.clip.arch, config.method.split_layer = "tiny", 5
    with pytest.raises(UserError, match="split_layer=5: this CLIP has 4 vision layers"):
        count_parameters(config)


def test_what_depends_on_the_depth_of_towers():
    method = MethodConfig(first_layer=2)
    for last, layers in ((0, [1, 2, 3]), (3, [1, 2]), (9, [1, 2, 3])):
        assert list(dataclasses.replace(method, last_layer=last).layers(4)) == layers
    assert MethodConfig("partial").trainable_patterns(TINY) == (
        r"clip/visual/transformer/resblocks\.3/.*",
        r"clip/text/transformer/resblocks\.2/.*",
    )
    assert MethodConfig().text_slots(B32) == 69
    assert MethodConfig(branches="visual").text_slots(B32) == 77
    assert MethodConfig("full").text_slots(B32) == 77
    for depth, split in ((12, 8), (24, 16), (6, 4), (4, 2), (1, 0)):
        assert MethodConfig("vop_f").resolved_split_layer(depth) == split
        assert MethodConfig("vop_p").resolved_split_layer(depth) == depth
        assert MethodConfig("vop_f", branches="text").resolved_split_layer(depth) == depth


def test_another_number_of_frames_is_refused():
    with pytest.raises(UserError, match="clips of 8 frames, but the prompts know 12"):
        MethodConfig().check_frames(8)
