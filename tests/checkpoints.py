"""Random CLIP checkpoints as others publish them; written without the rules under test."""

import pathlib
import warnings

import numpy as np

from vop_jax.config.clip import ClipConfig

# Odd on purpose, with two heads and one by the rule width // 64.
SIZES = ClipConfig(24, 8, 128, 3, 2, 10, 2, 1, 20, context_length=19)


def openai_state(sizes: ClipConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """OpenAI's names and shapes; float32 values that float16 holds exactly."""
    rng = np.random.default_rng(seed)
    state: dict[str, np.ndarray] = {}

    def add(name, *shape, std=0.02, mean=0.0):
        values = rng.standard_normal(shape, np.float32) * std + mean
        state[name] = np.asarray(values, np.float16).astype(np.float32)

    def add_norm(name, width):
        add(f"{name}.weight", width, std=0.1, mean=1.0)
        add(f"{name}.bias", width, std=0.1)

    def add_blocks(prefix, layers, width):
        for i in range(layers):
            block = f"{prefix}.resblocks.{i}"
            add_norm(f"{block}.ln_1", width)
            add(f"{block}.attn.in_proj_weight", 3 * width, width, std=width**-0.5)
            add(f"{block}.attn.in_proj_bias", 3 * width, std=0.1)
            add(f"{block}.attn.out_proj.weight", width, width, std=0.5 * width**-0.5)
            add(f"{block}.attn.out_proj.bias", width, std=0.1)
            add_norm(f"{block}.ln_2", width)
            add(f"{block}.mlp.c_fc.weight", 4 * width, width, std=width**-0.5)
            add(f"{block}.mlp.c_fc.bias", 4 * width, std=0.1)
            add(f"{block}.mlp.c_proj.weight", width, 4 * width, std=0.5 * width**-0.5)
            add(f"{block}.mlp.c_proj.bias", width, std=0.1)

    v, t, patch = sizes.vision_width, sizes.text_width, sizes.patch_size
    add("positional_embedding", sizes.context_length, t, std=0.1)
    add("text_projection", t, sizes.embed_dim, std=t**-0.5)
    add("logit_scale", mean=2.66)
    add("visual.class_embedding", v, std=0.1)
    add("visual.positional_embedding", sizes.patches + 1, v, std=0.1)
    add("visual.proj", v, sizes.embed_dim, std=v**-0.5)
    add("visual.conv1.weight", v, 3, patch, patch, std=1 / patch)
    add_norm("visual.ln_pre", v)
    add_blocks("visual.transformer", sizes.vision_layers, v)
    add_norm("visual.ln_post", v)
    add_blocks("transformer", sizes.text_layers, t)
    add("token_embedding.weight", sizes.vocab_size, t, std=0.1)
    add_norm("ln_final", t)
    return state


def count_blocks(state: dict[str, np.ndarray], tower: str) -> int:
    """Blocks of `visual.transformer` or `transformer` in OpenAI's names."""
    return sum(f"{tower}.resblocks.{i}.ln_1.weight" in state for i in range(100))


def custom_text_state(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """open_clip's CustomTextCLIP: the text tower under `text.`."""
    outside = ("visual.", "logit_scale")
    return {k if k.startswith(outside) else f"text.{k}": v for k, v in state.items()}


def hugging_face_state(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights with transformers' names: query, key, value apart, linear projections."""
    towers = (("visual.transformer", "vision_model"), ("transformer", "text_model"))
    modules = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": np.arange(len(state["positional_embedding"]))[None],
    }
    for kind in ("weight", "bias"):
        renamed[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        renamed[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        renamed[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for ours, theirs in towers:
            for i in range(count_blocks(state, ours)):
                block, layer = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                for source, target in modules.items():
                    renamed[f"{layer}.{target}.{kind}"] = state[f"{block}.{source}.{kind}"]
                packed = np.split(state[f"{block}.attn.in_proj_{kind}"], 3)
                for letter, part in zip("qkv", packed, strict=True):
                    renamed[f"{layer}.self_attn.{letter}_proj.{kind}"] = part
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

    def prompts(tower, *shape):
        layers = count_blocks(state, tower)
        return std * rng.standard_normal((layers, *shape), np.float32)

    released = {f"module.clip.{k}": v for k, v in state.items()}
    for name, value in state.items():
        if name.startswith("visual."):
            released[f"module.image_encoder.{name.removeprefix('visual.')}"] = value
        elif name != "logit_scale":
            released[f"module.text_encoder.{name}"] = value
    released["module.visual_prompt_learner.visual_prompts"] = prompts(
        "visual.transformer", 1, visual, state["visual.proj"].shape[0]
    )
    released["module.text_prompt_learner.text_prompts"] = prompts(
        "transformer", text, state["text_projection"].shape[0]
    )
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
