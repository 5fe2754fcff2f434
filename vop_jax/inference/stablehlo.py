"""Exports both encoders as StableHLO programs, which run without this project and without flax.

The weights are an argument of a program, in a file of their own: as constants they would be
compiled again for each batch size, and a program of more than 2 GB cannot be written.
"""

import json
import os
import string
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.storage import files
from vop_jax.storage.tensors import Tree, flatten, unflatten

PLATFORMS = ("cpu", "cuda", "tpu")

Flat = Mapping[str, Any]
Encode = Callable[[Flat, Any], jax.Array]  # (flat parameters, rows) -> unit rows [N, E]


def check_installed() -> None:
    """Raises UserError if the package is missing with which jax writes programs."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise UserError(
            '--format=stablehlo: jax needs flatbuffers for it: pip install -e ".[export]"'
        ) from None


def save_encoders(
    path: str | os.PathLike, model: TextVideoModel, params: Tree, about: Mapping[str, Any]
) -> None:
    """Writes a folder with both programs, their weights, and a README that calls them.

    Args:
        path: the folder; an existing one is replaced.
        model: for one device.
        params: all its parameters, in the dtypes to write.
        about: further entries of meta.json.

    Raises:
        UserError: flatbuffers is not installed.
    """
    check_installed()
    (batch,) = export.symbolic_shape("b")
    frames, ids = (
        jax.ShapeDtypeStruct((batch, *rows.shape[1:]), rows.dtype)
        for rows in jax.eval_shape(model.example)
    )
    with files.replacing(path) as folder:
        folder.mkdir()
        for name, rows in (("video", frames), ("text", ids)):
            program, weights = make_program(model, f"encode_{name}", params, rows)
            (folder / f"{name}.stablehlo").write_bytes(program)
            np.savez(folder / f"{name}.npz", **weights)  # type: ignore[arg-type]
        meta = {
            "frames": frames.shape[1],
            "image_size": frames.shape[2],
            "text_slots": ids.shape[1],
            "vocab_size": model.clip_config.vocab_size,
            "embed_dim": model.clip_config.embed_dim,
            "dtype": jnp.dtype(model.dtype).name,
            "platforms": PLATFORMS,
            "jax": jax.__version__,
            **about,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        (folder / "tokenizer.json").write_text(CaptionTokenizer(ids.shape[1]).portable())
        (folder / "README.md").write_text(README.substitute(meta))


def make_program(
    model: TextVideoModel, method: str, params: Tree, rows: jax.ShapeDtypeStruct
) -> tuple[bytearray, dict[str, np.ndarray]]:
    """A serialized program (weights, rows) -> unit rows, and the weights that it uses.

    Args:
        method: name of the model's function of `rows`.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    # flax wants all parameters of the model; the file leaves out those of the other tower.
    zeros = {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in flat.items()}

    def encode(used: Flat, rows: Any) -> jax.Array:
        params = unflatten({**zeros, **used})
        return jnp.asarray(model.apply({"params": params}, rows, method=method))

    def program(weights: Flat, rows: Any) -> jax.Array:
        return encode({name: _from_bits(leaf) for name, leaf in weights.items()}, rows)

    weights = {name: _to_bits(flat[name]) for name in used_names(encode, flat, rows)}
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(_shapes(weights), rows)
    return exported.serialize(), weights


def used_names(encode: Encode, flat: Flat, rows: jax.ShapeDtypeStruct) -> list[str]:
    """The parameters that the result depends on."""
    # With a symbolic number of rows jax keeps all arguments: one row it is.
    one = jax.ShapeDtypeStruct((1, *rows.shape[1:]), rows.dtype)
    used = export.export(jax.jit(encode))(_shapes(flat), one).module_kept_var_idx
    # The names are sorted, as jax sorts the leaves of a dict.
    return [name for i, name in enumerate(flat) if i in used]


def _shapes(flat: Flat) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}


def _to_bits(leaf: np.ndarray) -> np.ndarray:
    """bfloat16, which .npz files cannot hold, as uint16."""
    return leaf.view(np.uint16) if leaf.dtype == jnp.bfloat16 else leaf


def _from_bits(leaf: Any) -> Any:
    return jax.lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf


README = string.Template("""# Text and video encoders

$method over $clip. They need jax, and flatbuffers, with which jax reads programs:
`pip install jax flatbuffers`. Exported by jax $jax for cpu, cuda and tpu; later versions of jax
read the programs for at least six months.

```python
import jax
import numpy as np


def load(name):
    with open(f"{name}.stablehlo", "rb") as file:
        program = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
    weights = jax.device_put(dict(np.load(f"{name}.npz")))
    return lambda rows: np.asarray(program(weights, rows))


def cropped(frame):  # a PIL.Image, RGB -> uint8 [$image_size, $image_size, 3]
    size, short = $image_size, min(frame.size)
    width, height = (size if side == short else int(size * side / short) for side in frame.size)
    frame = frame.resize((width, frame.height), 3).resize((width, height), 3)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(frame)[top : top + size, left : left + size]


encode_video, encode_text = load("video"), load("text")
```

- `encode_video` takes uint8 [B, $frames, $image_size, $image_size, 3]: $frames frames of each
  video in order of time, each from `cropped`; `meta.json` says how training sampled them.
- `encode_text` takes int32 [N, $text_slots]: ids of CLIP's tokenizer (start, words, end, zeros); a
  longer text is truncated before its end. The package `tokenizers` makes them with
  `tokenizers.Tokenizer.from_file("tokenizer.json")`:
  `ids = np.array([text.ids for text in tokenizer.encode_batch(texts)], np.int32)`. Unlike vop_jax
  it does not repair wrong encodings and rare HTML entities in texts.

Both return float32 unit vectors of $embed_dim values, so that
`encode_text(ids) @ encode_video(frames).T` are the similarities. Any number of rows is allowed;
each number is compiled once.

`video.npz` and `text.npz` hold the weights by name, bfloat16 ones as their bits (uint16);
`meta.json` holds the sizes and the fingerprints of CLIP and prompts.
""")
