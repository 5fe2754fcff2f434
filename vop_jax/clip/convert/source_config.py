"""What the config files beside a checkpoint say, checked key by key against `clip.source_keys`."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from vop_jax.clip.convert import layouts
from vop_jax.clip.convert.source_keys import (
    HUGGING_FACE,
    NO_KEYS,
    NOTHING,
    OPEN_CLIP,
    PREPROCESSOR,
    Keys,
)
from vop_jax.clip.layers import ACTIVATIONS
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError

HEAD_WIDTH = 64  # of every CLIP that OpenAI's own code can compute
# Heads by width of a tower, where all models in open_clip's list agree.
PUBLISHED_HEADS = {
    "vision": {384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16},
    "text": {256: 4, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20},
}

Flat = Mapping[str, Any]  # {"vision_cfg.width": 768, ...}
Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the channels


class Size(NamedTuple):
    """A size that a config file states."""

    file: str
    key: str
    value: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint beside its tensors.

    Attributes:
        by: what says so, a file as a rule.
        sizes: (field of `ClipConfig`, what is stated of it).
        pixels: (mean, std) of RGB in [0, 1].
        notes: what it says of frames that is not followed, one sentence each.
    """

    by: str = ""
    sizes: tuple[tuple[str, Size], ...] = ()
    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    pixels: Pixels | None = None
    notes: tuple[str, ...] = ()

    def check_sizes(self, path: str | os.PathLike, found: Mapping[str, int]) -> None:
        """Raises UserError naming the first size that is not that of the tensors."""
        for field, (file, key, value) in self.sizes:
            if field in found and found[field] != value:
                raise UserError(
                    f"{file}: {key}={value}, but the tensors of {path} have {found[field]}; a "
                    "config of another checkpoint must lie in another folder"
                )


def openai_facts(by: str, vision_width: int, text_width: int) -> Facts:
    """Of what OpenAI's own code computes: one head for every 64 of a width."""
    vision, text = (max(1, width // HEAD_WIDTH) for width in (vision_width, text_width))
    return Facts(by, (), "quick_gelu", vision, text, (PIXEL_MEAN, PIXEL_STD))


def read_config(path: str | os.PathLike, layout: layouts.Layout) -> Facts:
    """What the configs beside a checkpoint say; nothing without one.

    Raises:
        UserError: a config cannot be read, has a key that is not known, or describes a model that
            this CLIP cannot be; the message names file and key.
    """
    folder, hugging_face = epath.Path(path).parent, layout is layouts.HUGGING_FACE
    file = folder / ("config.json" if hugging_face else "open_clip_config.json")
    facts = Facts()
    if (config := _read(file)) is not None:
        facts = _checked(file, config, _hugging_face if hugging_face else _open_clip)
    if facts.pixels is not None:
        return facts
    # transformers 5 may write both its processors into one file, and reads that one first.
    file = folder / "processor_config.json"
    config = (_read(file) or {}).get("image_processor")
    if config is None:
        file = folder / "preprocessor_config.json"
        config = _read(file)
    if config is None:
        return facts
    frames = _checked(file, config, _preprocessor)
    return dataclasses.replace(
        facts,
        sizes=facts.sizes + frames.sizes,
        pixels=frames.pixels,
        notes=facts.notes + frames.notes,
    )


def _read(file: epath.Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds a {type(config).__name__}, not a config of a CLIP")
    return config


def _checked(file: epath.Path, config: Flat, read: Callable[[str, Flat], Facts]) -> Facts:
    try:
        return read(str(file), config)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: not a readable config of a CLIP ({error!r})") from None


def check_keys(file: str, config: Flat, keys: Keys) -> None:
    """Raises UserError naming the first key that is unknown or has a value of another model."""
    for key, allowed in keys.required.items():
        if key in config and config[key] not in allowed:
            named = ["none"] * (None in allowed) + [repr(v) for v in allowed if v not in NOTHING]
            raise UserError(
                f"{file}: {key}={config[key]!r:.80}: not supported; allowed is {' or '.join(named)}"
            )
    for key, value in config.items():
        if key in keys.required or key in keys.sizes or key in keys.read:
            continue
        if key.rpartition(".")[2] not in keys.ignored:
            raise UserError(
                f"{file}: unknown key {key}={value!r:.80}: it may make this another model than "
                "those that convert; if it has no part in the features, take it out of the file"
            )


def flat(config: Flat, *sections: str) -> dict[str, Any]:
    """A config with what lies in its `sections` by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key not in sections:
            found[key] = value
        elif not isinstance(value, Mapping):
            raise TypeError(f"{key} is {value!r:.80}")
        else:
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
    return found


def read_sizes(file: str, config: Flat, keys: Keys) -> dict[str, Size]:
    """What is stated, by field of `ClipConfig`; what is left out has its library's default."""
    sizes = {}
    for key, (field, default) in keys.sizes.items():
        value = config.get(key, default)
        if isinstance(value, list) and field in ("image_size", "patch_size"):
            value = value[0] if len({*value}) == 1 else value
        if type(value) is not int or value < 1:
            raise UserError(f"{file}: {key}={value!r:.80}: not a whole number of 1 or more")
        sizes[field] = Size(file, key, value)
    return sizes


def _open_clip(file: str, config: Flat) -> Facts:
    if whole := "model_cfg" in config:  # else it is the model's part alone
        rest = {k: v for k, v in config.items() if k not in ("model_cfg", "preprocess_cfg")}
        check_keys(file, rest, NO_KEYS)
        config = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg")}
    config = {k: v for k, v in config.items() if k != "preprocess_cfg" or v is not None}
    known = flat(config, "vision_cfg", "text_cfg", "preprocess_cfg")
    if not {"vision_cfg", "text_cfg"} <= config.keys():
        raise UserError(f"{file}: not a config of a CLIP, which has vision_cfg and text_cfg")
    check_keys(file, known, OPEN_CLIP)
    sizes = read_sizes(file, known, OPEN_CLIP)
    for tower in ("vision", "text"):
        key = f"{tower}_cfg.mlp_ratio"
        width = int(sizes[f"{tower}_width"].value * known.get(key, 4.0))
        sizes[f"{tower}_mlp"] = Size(file, f"{key} * width", width)
    image = sizes["image_size"].value
    size = known.get("preprocess_cfg.size", image)
    if size not in (None, image, [image, image]):
        raise UserError(f"{file}: preprocess_cfg.size={size}, but vision_cfg.image_size={image}")
    ours = {"preprocess_cfg.interpolation": "bicubic", "preprocess_cfg.resize_mode": "shortest"}
    # What the whole file leaves out has the value that open_clip gives it.
    stated = whole or "preprocess_cfg.mean" in known or "preprocess_cfg.std" in known
    mean, std = known.get("preprocess_cfg.mean"), known.get("preprocess_cfg.std")
    return Facts(
        file,
        tuple(sizes.items()),
        "quick_gelu" if known.get("quick_gelu", False) else "gelu",
        sizes["vision_width"].value // known.get("vision_cfg.head_width", HEAD_WIDTH),
        sizes["text_heads"].value,
        check_pixels(file, mean, std) if stated else None,
        _differences(file, known, ours),
    )


def _hugging_face(file: str, config: Flat) -> Facts:
    config = dict(config)
    for section in ("vision_config", "text_config"):
        # As transformers reads them: what it calls the dict takes the place of the other.
        instead = config.pop(f"{section}_dict", None)
        config[section] = (config.get(section) or {}) if instead is None else instead
    known = flat(config, "vision_config", "text_config")
    check_keys(file, known, HUGGING_FACE)
    sizes = read_sizes(file, known, HUGGING_FACE)
    acts = [known.get(f"{t}_config.hidden_act", "quick_gelu") for t in ("vision", "text")]
    for tower, act in zip(("vision", "text"), acts, strict=True):
        if act not in ACTIVATIONS or act != acts[0]:
            raise UserError(
                f"{file}: {tower}_config.hidden_act={act!r}: allowed is one of "
                f"{', '.join(ACTIVATIONS)}, the same in both towers"
            )
    last = ClipConfig.vocab_size - 1  # another vocabulary is refused by `convert`
    eos = known.get("text_config.eos_token_id", last)
    if eos not in (2, last):  # by 2 transformers means the largest id of a caption
        raise UserError(
            f"{file}: text_config.eos_token_id={eos}: captions are read at CLIP's own "
            f"end-of-text token; allowed are {last} and 2"
        )
    vision, text = (sizes[f"{tower}_heads"].value for tower in ("vision", "text"))
    return Facts(file, tuple(sizes.items()), acts[0], vision, text)


def _preprocessor(file: str, config: Flat) -> Facts:
    check_keys(file, config, PREPROCESSOR)
    factor = config.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{file}: rescale_factor={factor}: allowed is 1/255")
    crop, sizes = _side(config.get("crop_size")), []
    if crop is not None:
        sizes.append(("image_size", Size(file, "crop_size", crop)))
    ours = {"do_resize": True, "do_center_crop": True, "resample": 3}
    if crop is not None and _side(config.get("size")) not in (None, crop):
        ours["size"] = crop
    if config.get("do_normalize", True):
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP"
        if not kind.startswith("CLIP") and None in map(config.get, ("image_mean", "image_std")):
            raise UserError(
                f"{file}: a {kind} without image_mean and image_std: its own are not known here; "
                "state both in the file"
            )
        pixels = check_pixels(file, config.get("image_mean"), config.get("image_std"))
    else:
        pixels = (0.0,) * 3, (1.0,) * 3
    notes = _differences(file, config, ours)
    return Facts(file, tuple(sizes), pixels=pixels, notes=notes)


def _differences(file: str, config: Flat, ours: Mapping[str, Any]) -> tuple[str, ...]:
    """A note for each key that makes frames otherwise than we do."""
    return tuple(
        f"{file} says {key}={config[key]!r:.80}; here a frame is resized to its short side "
        "(bicubic) and its centre taken"
        for key, value in ours.items()
        if config.get(key, value) != value
    )


def _side(size: Any) -> Any:
    """224 of 224, {"shortest_edge": 224} and {"height": 224, "width": 224}; else the value."""
    sides = {*size.values()} if isinstance(size, Mapping) else {size}
    return sides.pop() if len(sides) == 1 else str(size)


def check_pixels(file: str, mean: Any, std: Any) -> Pixels:
    """Mean and std of the channels; one number is that of all three, None is OpenAI's.

    Raises:
        UserError: they are not three finite numbers each, those of `std` above 0.
    """
    both = []
    for name, given, default in (("mean", mean, PIXEL_MEAN), ("std", std, PIXEL_STD)):
        values = default if given is None else given
        values = [values] * 3 if isinstance(values, int | float) else values
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(f"{file}: pixel {name}={given!r:.80}: three numbers are needed")
        values = tuple(map(float, values))
        if not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
            raise UserError(f"{file}: pixel {name}={given!r:.80}: not possible")
        both.append(values)
    return both[0], both[1]


def settle(flag: str, asked: Any, stated: Any, by: str) -> Any:
    """What the caller gives or the config states; UserError where they contradict."""
    if asked and stated and asked != stated:
        raise UserError(f"--{flag}={asked} contradicts {by}, which says {stated}")
    return asked or stated


def choose_heads(
    path: str | os.PathLike, tower: str, width: int, asked: int | None, facts: Facts
) -> tuple[int, str]:
    """The heads of a tower ("vision" or "text"), and a note where they are assumed, else "".

    Raises:
        UserError: `asked` contradicts the config, nothing states them and no published model of
            this width does, or they do not divide the width.
    """
    stated = getattr(facts, f"{tower}_heads")
    heads, note = settle(f"{tower}-heads", asked, stated, facts.by), ""
    if heads is None:
        heads = PUBLISHED_HEADS[tower].get(width)
        if heads is None:
            raise UserError(
                f"{path}: nothing states the heads of the {tower} tower, and no published CLIP has "
                f"its width, {width}; pass --{tower}-heads"
            )
        note = (
            f"nothing states the heads of the {tower} tower of {path}: {heads}, as in every "
            f"published CLIP of width {width}; else pass --{tower}-heads"
        )
    if type(heads) is not int or heads < 1 or width % heads:
        remedy = (
            f"pass a divisor of it as --{tower}-heads" if stated is None else "correct the file"
        )
        raise UserError(
            f"{path if stated is None else facts.by}: {tower} width {width} cannot be divided into "
            f"{heads} heads; {remedy}"
        )
    return heads, note
