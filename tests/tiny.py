"""A CLIP small enough for tests, and random data for it."""

import jax
import numpy as np

from vop_jax.config.clip import ClipConfig
from vop_jax.model import TextVideoModel
from vop_jax.storage.tensors import unflatten
from vop_jax.tuning.methods import MethodConfig

CLIP = ClipConfig(
    image_size=16,
    patch_size=8,
    vision_width=32,
    vision_layers=3,
    vision_heads=2,
    text_width=16,
    text_layers=2,
    text_heads=2,
    embed_dim=24,
    context_length=20,
    vocab_size=60,
)
EOT = CLIP.vocab_size - 1
FRAMES = 3


def captions(count: int, slots: int, seed: int = 0) -> np.ndarray:
    """int32 [count, slots]: SOS, words, EOT, zeros, of different lengths."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((count, slots), np.int32)
    for row in ids:
        length = rng.integers(2, slots)
        row[0] = EOT - 1
        row[1:length] = rng.integers(0, EOT - 1, length - 1)
        row[length] = EOT
    return ids


def frames(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, F, S, S, 3]."""
    shape = (count, FRAMES, CLIP.image_size, CLIP.image_size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def model_and_params(
    method: MethodConfig, seed: int = 0, clip: ClipConfig = CLIP
) -> tuple[TextVideoModel, dict]:
    """A model and random parameters, none of them zero or one.

    Drawn by shape: the initialisers themselves take seconds to compile.
    """
    model = TextVideoModel(clip, method)
    shapes = unflatten(model.shapes())
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(centre, 0.2, leaf.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)
