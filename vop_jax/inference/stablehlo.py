"""Both encoders as StableHLO programs, which need neither this project nor flax to run.

The weights are an argument of a program and lie beside it: as constants they would be compiled
again for each batch size, and a program of more than 2 GB could not be written.
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
    """Raises UserError without what jax needs to write programs."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise UserError(
            '--format=stablehlo: jax needs flatbuffers for it: pip install -e ".[export]"'
        ) from None


def save_encoders(
    path: str | os.PathLike, model: TextVideoModel, params: Tree, about: Mapping[str, Any]
) -> None:
    """Writes a folder with both programs, their weights, and how to call them.

    Args:
        path: the folder; one that is there is replaced.
        model: its parameters are in one piece on one device when it runs.
        params: all of its parameters, as they are to be held.
        about: what else meta.json says.

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
    """A serialized program (weights, rows) -> unit rows, and the weights that it reads.

    Args:
        method: of the model, that takes `rows`.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    # The other tower's shall not travel; flax still asks for them.
    rest = {name: np.broadcast_to(np.zeros((), x.dtype), x.shape) for name, x in flat.items()}

    def encode(given: Flat, rows: Any) -> jax.Array:
        params = unflatten({**rest, **given})
        return jnp.asarray(model.apply({"params": params}, rows, method=method))

    def program(weights: Flat, rows: Any) -> jax.Array:
        return encode({name: _unpacked(leaf) for name, leaf in weights.items()}, rows)

    weights = {name: _packed(flat[name]) for name in names_read(encode, flat, rows)}
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(_shapes(weights), rows)
    return exported.serialize(), weights


def names_read(encode: Encode, flat: Flat, rows: jax.ShapeDtypeStruct) -> list[str]:
    """The parameters that have a part in the result."""
    # Of one row: where their number is a symbol all parameters are kept.
    one = jax.ShapeDtypeStruct((1, *rows.shape[1:]), rows.dtype)
    kept = export.export(jax.jit(encode))(_shapes(flat), one).module_kept_var_idx
    # Names are sorted, as are the leaves of a dict.
    return [name for i, name in enumerate(flat) if i in kept]


def _shapes(flat: Flat) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}


def _packed(leaf: np.ndarray) -> np.ndarray:
    """numpy alone knows no bfloat16: its bits travel as uint16."""
    return leaf.view(np.uint16) if leaf.dtype == jnp.bfloat16 else leaf


def _unpacked(leaf: Any) -> Any:
    return jax.lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf


README = string.Template("""# Text and video encoders

$method over $clip. They need jax, and flatbuffers, with which jax reads programs:
`pip install jax flatbuffers`. Exported by jax $jax for cpu, cuda and tpu; a program can be read by
the versions of jax that follow within at least six months.

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
  video in their order, as `cropped` makes them; `meta.json` says how they were chosen in training.
- `encode_text` takes int32 [N, $text_slots]: ids of CLIP's tokenizer, start, words, end, zeros; of
  a longer text the first ids, the last of them the end. The package `tokenizers` makes them with
  `tokenizers.Tokenizer.from_file("tokenizer.json")`:
  `ids = np.array([text.ids for text in tokenizer.encode_batch(texts)], np.int32)`. Encodings that
  were mixed up and HTML entities but the commonest, which vop_jax repairs first, stay as they are.

Both give float32 rows of length 1 and $embed_dim values, so that
`encode_text(ids) @ encode_video(frames).T` are the similarities. There may be any number of rows;
each is compiled once.

`video.npz` and `text.npz` hold the weights by name, those in bfloat16 as their bits (uint16);
`meta.json` the sizes and the fingerprints of CLIP and prompts.
""")
