"""Random CLIP checkpoints as others publish them; written without the rules under test."""

import pathlib
import warnings

import numpy as np
from ml_dtypes import bfloat16

from vop_jax.clip.weights import parameter_shapes
from vop_jax.config.clip import ClipConfig

# Odd on purpose; the rule width // 64 gives two heads and one.
SIZES = ClipConfig(24, 8, 128, 3, 2, 10, 2, 1, 20, context_length=19)


def random_params(sizes: ClipConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """A CLIP, {"visual/conv1/kernel": …}; float32 that float16 and bfloat16 hold exactly."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in parameter_shapes(sizes).items():
        std = np.prod(shape[:-1]) ** -0.5 if name.endswith("kernel") else 0.1
        centre = {"scale": 1.0, "logit_scale": 2.66}.get(name.rpartition("/")[2], 0.0)
        values = rng.standard_normal(shape, np.float32) * std + centre
        params[name] = np.asarray(values, bfloat16).astype(np.float16).astype(np.float32)
    return params


def random_prompts(sizes: ClipConfig, visual: int, text: int) -> dict[str, np.ndarray]:
    """[L, P, D] of both towers, with `visual` and `text` tokens in each layer."""
    rng = np.random.default_rng(1)
    shapes = {
        "visual": (sizes.vision_layers, visual, sizes.vision_width),
        "text": (sizes.text_layers, text, sizes.text_width),
    }
    return {k: rng.standard_normal(shape, np.float32) / 2 for k, shape in shapes.items()}


def openai_state(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights with the names and shapes of OpenAI's model."""
    state = {}
    for name, value in params.items():
        module, dot, kind = name.removeprefix("text/").replace("/", ".").rpartition(".")
        ending = "bias" if kind == "bias" else "weight"
        if kind not in ("kernel", "bias", "scale", "embedding"):
            state[f"{module}{dot}{kind}"] = value
        elif module in ("visual.proj", "text_projection"):
            state[module] = value
        elif module == "visual.conv1":
            state["visual.conv1.weight"] = value.transpose(3, 2, 0, 1)
        elif module.endswith(".query"):
            parts = [params[name.replace("query", part)] for part in ("query", "key", "value")]
            if kind == "kernel":  # [D, H, K] -> [H K, D]
                parts = [part.reshape(len(part), -1).T for part in parts]
            else:
                parts = [part.ravel() for part in parts]
            state[f"{module.removesuffix('query')}in_proj_{ending}"] = np.concatenate(parts)
        elif module.endswith("attn.out"):
            matrix = value.reshape(-1, value.shape[-1]).T if kind == "kernel" else value
            state[f"{module}_proj.{ending}"] = matrix
        elif not module.endswith((".key", ".value")):
            state[f"{module}.{ending}"] = value.T if kind == "kernel" else value
    return {k: np.array(v, order="C") for k, v in state.items()}


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
    state: dict[str, np.ndarray], prompts: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """`VoP_msrvtt9k.pth`: CLIP twice and prompts."""
    released = {f"module.clip.{k}": v for k, v in state.items()}
    for name, value in state.items():
        if name.startswith("visual."):
            released[f"module.image_encoder.{name.removeprefix('visual.')}"] = value
        elif name != "logit_scale":
            released[f"module.text_encoder.{name}"] = value
    return released | {
        "module.visual_prompt_learner.visual_prompts": prompts["visual"][:, None],
        "module.text_prompt_learner.text_prompts": prompts["text"],
    }


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

    tensors = {name: torch.from_numpy(np.array(value, "f2")) for name, value in state.items()}
    tensors["input_resolution"] = torch.tensor(sizes.image_size)
    tensors["context_length"] = torch.tensor(sizes.context_length)
    tensors["vocab_size"] = torch.tensor(sizes.vocab_size)
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scripting is deprecated, the files stay
        torch.jit.save(torch.jit.script(root), path)
    return path
