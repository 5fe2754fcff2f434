"""The config files beside a checkpoint, checked key by key against `source_keys`."""

import dataclasses
import json
import math
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
    ConfigKeys,
)
from vop_jax.clip.layers import ACTIVATIONS
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD
from vop_jax.config.clip import ClipConfig
from vop_jax.errors import UserError
from vop_jax.storage.files import StrPath

HEAD_WIDTH = 64  # of every CLIP that OpenAI's own code can compute

JsonConfig = Mapping[str, Any]
PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the channels


class StatedSize(NamedTuple):
    """A size that a config file states, and the field of `ClipConfig` it belongs to."""

    field: str
    file: str
    key: str
    value: int


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """What is known about a checkpoint besides its tensors; None: nothing states it.

    Attributes:
        origin: what states it, usually a file.
        pixels: (mean, std) of RGB in [0, 1].
        notes: preprocessing that the file states and that is done differently here.
    """

    origin: str = ""
    sizes: tuple[StatedSize, ...] = ()
    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    pixels: PixelStatistics | None = None
    notes: tuple[str, ...] = ()

    def check_sizes(self, path: StrPath, sizes: Mapping[str, int]) -> None:
        """Raises UserError naming the first size that contradicts the tensors."""
        for field, file, key, value in self.sizes:
            if field in sizes and sizes[field] != value:
                raise UserError(
                    f"{file}: {key}={value}, but the tensors of {path} have {sizes[field]}; move a "
                    "config of another checkpoint to another folder"
                )


def openai_config(origin: str, vision_width: int, text_width: int) -> SourceConfig:
    """What OpenAI's own code computes: one head for every 64 of a width."""
    vision, text = (max(1, width // HEAD_WIDTH) for width in (vision_width, text_width))
    return SourceConfig(origin, (), "quick_gelu", vision, text, (PIXEL_MEAN, PIXEL_STD))


def read_config(path: StrPath, layout: layouts.CheckpointLayout) -> SourceConfig:
    """Reads the configs beside a checkpoint; without any, everything is None.

    Raises:
        UserError: a config cannot be read, has an unknown key, or describes a model that is not a
            CLIP of this package; the message names file and key.
    """
    folder, hugging_face = epath.Path(path).parent, layout is layouts.HUGGING_FACE
    file = folder / ("config.json" if hugging_face else "open_clip_config.json")
    source = SourceConfig()
    if (config := _read_json(file)) is not None:
        source = _parse(file, config, _parse_hugging_face if hugging_face else _parse_open_clip)
    if source.pixels is not None:
        return source
    # transformers 5 may write both its processors into one file, and prefers that file.
    file = folder / "processor_config.json"
    config = (_read_json(file) or {}).get("image_processor")
    if config is None:
        file = folder / "preprocessor_config.json"
        config = _read_json(file)
    if config is None:
        return source
    images = _parse(file, config, _parse_preprocessor)
    return dataclasses.replace(
        source,
        sizes=source.sizes + images.sizes,
        pixels=images.pixels,
        notes=source.notes + images.notes,
    )


def _read_json(file: epath.Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not readable JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: holds a {type(config).__name__}, not a config of a CLIP")
    return config


def _parse(
    file: epath.Path, config: JsonConfig, parse: Callable[[str, JsonConfig], SourceConfig]
) -> SourceConfig:
    try:
        return parse(str(file), config)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: not a readable config of a CLIP ({error!r})") from None


def _check_keys(file: str, config: JsonConfig, keys: ConfigKeys) -> None:
    """Raises UserError naming the first key that is unknown or has a value of another model."""
    for key, allowed in keys.required.items():
        if key in config and config[key] not in allowed:
            names = ["none"] * (None in allowed) + [repr(v) for v in allowed if v not in NOTHING]
            raise UserError(
                f"{file}: {key}={config[key]!r:.80}: not supported; allowed is {' or '.join(names)}"
            )
    known = keys.required.keys() | keys.sizes.keys() | keys.used
    for key, value in config.items():
        if key not in known and key.rpartition(".")[2] not in keys.ignored:
            raise UserError(
                f"{file}: unknown key {key}={value!r:.80}: it may change the model; if it has no "
                "effect on the features, remove it from the file"
            )


def _flatten(config: JsonConfig, *sections: str) -> dict[str, Any]:
    """A config with the content of `sections` under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key not in sections:
            flat[key] = value
        elif not isinstance(value, Mapping):
            raise TypeError(f"{key} is {value!r:.80}")
        else:
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
    return flat


def _read_sizes(file: str, config: JsonConfig, keys: ConfigKeys) -> dict[str, StatedSize]:
    """The sizes by field of `ClipConfig`; a missing key has its library's default."""
    sizes = {}
    for key, (field, default) in keys.sizes.items():
        value = config.get(key, default)
        if isinstance(value, list) and field in ("image_size", "patch_size"):
            value = value[0] if len({*value}) == 1 else value
        if type(value) is not int or value < 1:
            raise UserError(f"{file}: {key}={value!r:.80}: not a whole number of 1 or more")
        sizes[field] = StatedSize(field, file, key, value)
    return sizes


def _parse_open_clip(file: str, config: JsonConfig) -> SourceConfig:
    if complete := "model_cfg" in config:  # else the file is the model's part only
        rest = {k: v for k, v in config.items() if k not in ("model_cfg", "preprocess_cfg")}
        _check_keys(file, rest, NO_KEYS)
        config = {**config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg")}
    config = {k: v for k, v in config.items() if k != "preprocess_cfg" or v is not None}
    flat = _flatten(config, "vision_cfg", "text_cfg", "preprocess_cfg")
    if not {"vision_cfg", "text_cfg"} <= config.keys():
        raise UserError(f"{file}: not a config of a CLIP, which has vision_cfg and text_cfg")
    _check_keys(file, flat, OPEN_CLIP)
    sizes = _read_sizes(file, flat, OPEN_CLIP)
    for tower in ("vision", "text"):
        key, field = f"{tower}_cfg.mlp_ratio", f"{tower}_mlp"
        width = int(sizes[f"{tower}_width"].value * flat.get(key, 4.0))
        sizes[field] = StatedSize(field, file, f"{key} * width", width)
    image, size = sizes["image_size"].value, flat.get("preprocess_cfg.size")
    if size not in (None, image, [image, image]):
        raise UserError(f"{file}: preprocess_cfg.size={size}, but vision_cfg.image_size={image}")
    # A complete file that leaves the statistics out has open_clip's defaults, which are OpenAI's.
    states_pixels = complete or {"preprocess_cfg.mean", "preprocess_cfg.std"} & flat.keys()
    mean, std = flat.get("preprocess_cfg.mean"), flat.get("preprocess_cfg.std")
    ours = {"preprocess_cfg.interpolation": "bicubic", "preprocess_cfg.resize_mode": "shortest"}
    return SourceConfig(
        file,
        tuple(sizes.values()),
        "quick_gelu" if flat.get("quick_gelu", False) else "gelu",
        sizes["vision_width"].value // flat.get("vision_cfg.head_width", HEAD_WIDTH),
        sizes["text_heads"].value,
        _pixel_statistics(file, mean, std) if states_pixels else None,
        _differences(file, flat, ours),
    )


def _parse_hugging_face(file: str, config: JsonConfig) -> SourceConfig:
    config = dict(config)
    for section in ("vision_config", "text_config"):
        # As in transformers, a `…_config_dict` replaces the section.
        replacement = config.pop(f"{section}_dict", None)
        config[section] = (config.get(section) or {}) if replacement is None else replacement
    flat = _flatten(config, "vision_config", "text_config")
    _check_keys(file, flat, HUGGING_FACE)
    sizes = _read_sizes(file, flat, HUGGING_FACE)
    acts = [flat.get(f"{t}_config.hidden_act", "quick_gelu") for t in ("vision", "text")]
    for tower, act in zip(("vision", "text"), acts, strict=True):
        if act not in ACTIVATIONS or act != acts[0]:
            raise UserError(
                f"{file}: {tower}_config.hidden_act={act!r}: allowed is one of "
                f"{', '.join(ACTIVATIONS)}, the same in both towers"
            )
    last = ClipConfig.vocab_size - 1  # `convert` refuses other vocabularies
    eos = flat.get("text_config.eos_token_id", last)
    if eos not in (2, last):  # transformers reads 2 as the largest id of a caption
        raise UserError(
            f"{file}: text_config.eos_token_id={eos}: captions end with CLIP's own end-of-text "
            f"token; allowed are {last} and 2"
        )
    vision, text = (sizes[f"{tower}_heads"].value for tower in ("vision", "text"))
    return SourceConfig(file, tuple(sizes.values()), acts[0], vision, text)


def _parse_preprocessor(file: str, config: JsonConfig) -> SourceConfig:
    _check_keys(file, config, PREPROCESSOR)
    factor = config.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{file}: rescale_factor={factor}: allowed is 1/255")
    sizes: tuple[StatedSize, ...] = ()
    ours = {"do_resize": True, "do_center_crop": True, "resample": 3}
    if (crop := _side(config.get("crop_size"))) is not None:
        sizes = (StatedSize("image_size", file, "crop_size", crop),)
        if _side(config.get("size")) not in (None, crop):
            ours["size"] = crop
    if config.get("do_normalize", True):
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP"
        if not kind.startswith("CLIP") and None in map(config.get, ("image_mean", "image_std")):
            raise UserError(
                f"{file}: a {kind} without image_mean and image_std, whose defaults are not known "
                "here; state both in the file"
            )
        pixels = _pixel_statistics(file, config.get("image_mean"), config.get("image_std"))
    else:
        pixels = (0.0,) * 3, (1.0,) * 3
    return SourceConfig(file, sizes, pixels=pixels, notes=_differences(file, config, ours))


def _differences(file: str, config: JsonConfig, ours: Mapping[str, Any]) -> tuple[str, ...]:
    """A note on each key whose preprocessing differs from ours."""
    return tuple(
        f"{file} states {key}={config[key]!r:.80}; frames are resized here so that the short side "
        "fits (bicubic) and cropped at the centre"
        for key, value in ours.items()
        if config.get(key, value) != value
    )


def _side(size: Any) -> Any:
    """224 for 224, {"shortest_edge": 224} and {"height": 224, "width": 224}; else text."""
    sides = {*size.values()} if isinstance(size, Mapping) else {size}
    return sides.pop() if len(sides) == 1 else str(size)


def _pixel_statistics(file: str, mean: Any, std: Any) -> PixelStatistics:
    """Mean and std per channel; one number stands for all three, None for OpenAI's.

    Raises:
        UserError: they are not three finite numbers each, or a std is not above 0.
    """
    statistics = []
    for name, stated, default in (("mean", mean, PIXEL_MEAN), ("std", std, PIXEL_STD)):
        values = default if stated is None else stated
        values = [values] * 3 if isinstance(values, int | float) else values
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(f"{file}: pixel {name}={stated!r:.80}: three numbers are needed")
        values = tuple(map(float, values))
        if not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
            raise UserError(f"{file}: pixel {name}={stated!r:.80}: not finite, or a std of 0")
        statistics.append(values)
    return statistics[0], statistics[1]
