"""Random CLIP checkpoints as others publish them; written without the rules under test."""

import pathlib
import re
import warnings

import numpy as np
from ml_dtypes import bfloat16

from vop_jax.config.clip import ClipConfig

# Odd on purpose; the rule width // 64 gives two heads and one.
SIZES = ClipConfig(24, 8, 128, 3, 2, 10, 2, 1, 20, context_length=19)
TOWERS = (("visual.transformer", "vision_model"), ("transformer", "text_model"))


def _shapes(sizes: ClipConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of OpenAI's model, by its names."""
    v, t, patch = sizes.vision_width, sizes.text_width, sizes.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (sizes.context_length, t),
        "text_projection": (t, sizes.embed_dim),
        "logit_scale": (),
        "visual.class_embedding": (v,),
        "visual.positional_embedding": (sizes.patches + 1, v),
        "visual.proj": (v, sizes.embed_dim),
        "visual.conv1.weight": (v, 3, patch, patch),
        "token_embedding.weight": (sizes.vocab_size, t),
    }
    norms = [("visual.ln_pre", v), ("visual.ln_post", v), ("ln_final", t)]
    widths = ((v, sizes.vision_layers), (t, sizes.text_layers))
    for (prefix, _), (width, layers) in zip(TOWERS, widths, strict=True):
        for i in range(layers):
            block = f"{prefix}.resblocks.{i}"
            norms += [(f"{block}.ln_1", width), (f"{block}.ln_2", width)]
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
                f"{block}.attn.out_proj.weight": (width, width),
                f"{block}.attn.out_proj.bias": (width,),
                f"{block}.mlp.c_fc.weight": (4 * width, width),
                f"{block}.mlp.c_fc.bias": (4 * width,),
                f"{block}.mlp.c_proj.weight": (width, 4 * width),
                f"{block}.mlp.c_proj.bias": (width,),
            }
    return shapes | {f"{norm}.{k}": (width,) for norm, width in norms for k in ("weight", "bias")}


def openai_state(sizes: ClipConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """OpenAI's names and shapes; float32 values that float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in _shapes(sizes).items():
        std = 0.1 if len(shape) < 2 or "embedding" in name else np.prod(shape[1:]) ** -0.5
        centre = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
        centre = 2.66 if name == "logit_scale" else centre
        values = rng.standard_normal(shape, np.float32) * std + centre
        rounded = np.asarray(values, bfloat16).astype(np.float16)
        state[name] = rounded.astype(np.float32)
    return state


def count_blocks(state: dict[str, np.ndarray], tower: str) -> int:
    """Blocks of `visual.transformer` or `transformer` in OpenAI's names."""
    return sum(name.startswith(tower) and name.endswith("ln_1.bias") for name in state)


def custom_text_state(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """open_clip's CustomTextCLIP: the text tower under `text.`."""
    outside = ("visual.", "logit_scale")
    return {k if k.startswith(outside) else f"text.{k}": v for k, v in state.items()}


HUGGING_FACE_NAMES = (
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(\d)", r".layer_norm\1"),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^ln_final", "text_model.final_layer_norm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
)


def hugging_face_state(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights with transformers' names: query, key, value apart, linear projections."""
    length = len(state["positional_embedding"])
    renamed = {"text_model.embeddings.position_ids": np.arange(length)[None]}
    for name, value in state.items():
        for pattern, replacement in HUGGING_FACE_NAMES:
            name = re.sub(pattern, replacement, name)
        if "in_proj" in name:
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            renamed[name] = value.T if name.endswith("projection.weight") else value
    return {k: np.array(v, order="C") for k, v in renamed.items()}


def open_clip_config(sizes: ClipConfig, **preprocess) -> dict:
    """open_clip_config.json of these sizes, as open_clip's `push_to_hf_hub` writes it."""
    vision = {
        "image_size": sizes.image_size,
        "layers": sizes.vision_layers,
        "width": sizes.vision_width,
        "head_width": sizes.vision_width // sizes.vision_heads,
        "patch_size": sizes.patch_size,
        "mlp_ratio": (sizes.vision_mlp or 4 * sizes.vision_width) / sizes.vision_width,
    }
    text = {
        "context_length": sizes.context_length,
        "vocab_size": sizes.vocab_size,
        "width": sizes.text_width,
        "heads": sizes.text_heads,
        "layers": sizes.text_layers,
        "mlp_ratio": (sizes.text_mlp or 4 * sizes.text_width) / sizes.text_width,
    }
    model = {"embed_dim": sizes.embed_dim, "vision_cfg": vision, "text_cfg": text}
    model["quick_gelu"] = sizes.activation == "quick_gelu"
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def hugging_face_config(sizes: ClipConfig) -> dict:
    """config.json of these sizes, as transformers writes it."""

    def tower(name, **more):
        width = getattr(sizes, f"{name}_width")
        return {
            "model_type": f"clip_{name}_model",
            "hidden_act": sizes.activation,
            "hidden_size": width,
            "intermediate_size": getattr(sizes, f"{name}_mlp") or 4 * width,
            "layer_norm_eps": 1e-5,
            "num_attention_heads": getattr(sizes, f"{name}_heads"),
            "num_hidden_layers": getattr(sizes, f"{name}_layers"),
            **more,
        }

    lengths = {"max_position_embeddings": sizes.context_length, "vocab_size": sizes.vocab_size}
    return {
        "model_type": "clip",
        "projection_dim": sizes.embed_dim,
        "text_config": tower("text", eos_token_id=sizes.vocab_size - 1, **lengths),
        "vision_config": tower("vision", image_size=sizes.image_size, patch_size=sizes.patch_size),
    }


def released_state(
    state: dict[str, np.ndarray], visual: int, text: int, std: float = 0.5, seed: int = 1
) -> dict[str, np.ndarray]:
    """`VoP_msrvtt9k.pth`: CLIP twice and `visual` and `text` prompt tokens per layer."""
    rng = np.random.default_rng(seed)
    released = {f"module.clip.{k}": v for k, v in state.items()}
    for name, value in state.items():
        if name.startswith("visual."):
            released[f"module.image_encoder.{name.removeprefix('visual.')}"] = value
        elif name != "logit_scale":
            released[f"module.text_encoder.{name}"] = value
    layers = count_blocks(state, "visual"), count_blocks(state, "transformer")
    shape = layers[0], 1, visual, len(state["visual.proj"])
    prompts = std * rng.standard_normal(shape, np.float32)
    released["module.visual_prompt_learner.visual_prompts"] = prompts
    shape = layers[1], text, len(state["text_projection"])
    prompts = std * rng.standard_normal(shape, np.float32)
    released["module.text_prompt_learner.text_prompts"] = prompts
    return released


def save_torch(path: pathlib.Path, state: dict[str, np.ndarray], *nesting: str, **others):
    """A PyTorch file: the state dict under the keys `nesting`, `others` beside it."""
    import torch

    value = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
    for key in nesting:
        value = {key: value, **others}
    torch.save(value, path)
    return path


def save_torchscript(path: pathlib.Path, state: dict[str, np.ndarray], sizes: ClipConfig):
    """A TorchScript archive as OpenAI's: float16, and three sizes among the tensors."""
    import torch

    root = torch.nn.Module()

    def put(name, tensor, register):
        module = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        getattr(module, register)(leaf, tensor)

    for name, value in state.items():
        half = torch.from_numpy(np.array(value, np.float16))
        put(name, torch.nn.Parameter(half), "register_parameter")
    stated = {
        "input_resolution": sizes.image_size,
        "context_length": sizes.context_length,
        "vocab_size": sizes.vocab_size,
    }
    for name, size in stated.items():
        put(name, torch.tensor(size), "register_buffer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated, the files stay
        torch.jit.save(torch.jit.script(root), path)
    return path
