"""The one complete config: every key, its default and what it means.

Config files under `configs/` call `base_config()` and change values; the config is locked, so
a key that is not declared here cannot be set anywhere.
"""

import difflib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vop_jax.errors import UserError

CONFIG_FILE = "config.json"  # of a workdir


def base_config() -> ConfigDict:
    """The paper's recipe (CVPR 2023, section 4.1) on a folder of videos; locked."""
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order and augmentation

    # Where a run starts. The first that exists wins: the workdir's last checkpoint,
    # init.prompts over init.clip, init.clip with fresh prompts, a pre-trained CLIP (pretrain).
    c.init = ConfigDict()
    c.init.clip = ""  # file written by tools/convert_clip_weights.py
    c.init.prompts = ""  # prompts.safetensors trained over that CLIP
    c.init.interpolate_frames = False  # resample its frame tables to another data.frames

    # What the CLIP must be; "" takes whatever init.clip says. A mismatch is an error.
    c.clip = ConfigDict()
    c.clip.arch = ""  # ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, small, tiny
    c.clip.activation = ""  # quick_gelu (OpenAI), gelu (open_clip's LAION models)

    c.method = ConfigDict()
    # vop, vop_p, vop_c, vop_f, vop_f+p, vop_f+c, or a baseline: zero_shot, full, bias, proj,
    # partial, adapter_attn, adapter_ffn
    c.method.name = "vop"
    c.method.branches = "both"  # prompts (or adapters) in: both, visual, text
    c.method.visual_prompts = 8  # tokens per layer, after CLS
    c.method.text_prefix = 4  # tokens per layer, after SOS
    c.method.text_suffix = 4  # tokens per layer, before EOT
    c.method.suffix = "eot"  # before each caption's EOT; released: before the last position
    c.method.first_layer = 1  # prompted (or adapted) layers, from 1
    c.method.last_layer = 0  # 0: the deepest
    c.method.specific_prompts = 4  # P, C: of visual_prompts, those that are a frame's own
    c.method.split_layer = -1  # F: frames meet after this layer; -1: two thirds, floored, 8 of 12
    c.method.frame_position = True  # F: position embedding of frames where they meet
    c.method.cmm = "bilstm"  # C: context over frames by bilstm, lstm, transformer
    c.method.cmm_role = "prompts"  # C: it makes prompts; cls: it updates CLS (an ablation)
    c.method.adapter_width = 64  # of the bottleneck
    c.method.init_std = 0.02  # prompts start from N(0, init_std^2)

    c.data = ConfigDict()
    # folder (your videos); msrvtt9k, msrvtt7k, didemo, activitynet, lsmdc, msvd, vatex;
    # clips and stills (the demo's, rendered)
    c.data.kind = "folder"
    c.data.annotations = ""  # CSV or JSON Lines: video, caption, [start], [end], [split];
    # of a benchmark the folder of its official files, not needed where records are
    c.data.videos = ""  # folder that `video` is relative to; clips, stills: where they go
    c.data.rendered = 768  # clips of the training split, of kind=clips; 768 have all captions once
    c.data.records = ""  # packed frames, also by vop_jax.data.prepare; "": inside the workdir
    c.data.official_sizes = True  # of a benchmark's splits; other sizes are an error
    c.data.train_split = "train"
    c.data.eval_split = "test"
    c.data.val_split = "val"  # for train.select=best
    c.data.val_share = 0.0  # of train that is held out as val, by a hash of the ids; 0: none
    c.data.frames = 12  # F, frames of a clip
    # uniform: the middle of each segment; rand: in training anywhere in it; linspace
    # (CLIP4Clip, with stored_fps=1): ends included; segments (TSN)
    c.data.sampling = "uniform"
    c.data.stored_fps = 0.0  # frames per second in the records; 0: only the F sampled ones
    c.data.folder_fps = 0.0  # of videos that are folders of extracted frames; 0: not known
    c.data.short_side = 256  # of stored frames, pixels; never enlarged
    c.data.jpeg_quality = 95  # of stored frames
    c.data.augment = True  # random-resized crop and flip in training
    c.data.crop_scale = (0.5, 1.0)  # area of the crop, one crop for all frames of a clip
    c.data.flip = True  # horizontal; turn off where captions say left or right
    c.data.short_clips = "skip"  # fewer frames than F: skip, repeat (the last frame)
    c.data.max_skipped = 0.05  # share of unreadable videos per split above which a run stops
    c.data.threads = 16  # reading and decoding records
    c.data.workers = 0  # reader processes; 0: threads of this one
    # Above 0: the training split's decoded frames live on the devices, if they take no more than
    # this of each, in GB, and pictures are cut out there: the same pixels.
    c.data.device_cache_gb = 0.0
    # Captions are padded to the smallest of these widths that holds a batch, else to all slots;
    # those that batches will have are compiled before the first step. (): always all slots, as
    # with method.suffix=released.
    c.data.text_buckets = (32,)
    c.data.cache_gb = 1.0  # decoded frames stay in memory if the whole split's take no more

    c.train = ConfigDict()
    c.train.steps = 1000  # optimizer steps; 0: only evaluate
    c.train.batch_size = 32  # global: all devices of all hosts together
    c.train.microbatches = 1  # parts of it that a device embeds one by one; same loss and gradient
    c.train.learning_rate = 5e-3  # peak; the paper searches [1e-6, 1e-2] per method
    c.train.warmup = 0.1  # share of the steps with linear warm-up, then cosine to 0
    c.train.weight_decay = 0.2  # not on norms and biases
    c.train.clip_norm = 1.0  # of the gradient, over all trained parameters
    c.train.log_every = 20  # steps
    c.train.eval_every = 0  # steps; 0: before the first and after the last step only
    c.train.checkpoint_every = 100  # steps, and after the last
    c.train.keep_checkpoints = 2  # newest ones
    # last: the result is that of the last step; best: of the evaluation on data.val_split, every
    # eval_every steps, with the highest mean R@1. Never chosen on the eval split.
    c.train.select = "last"

    c.eval = ConfigDict()
    c.eval.batch_size = 32  # global
    c.eval.missing = "miss"  # unreadable videos: miss (ranked last), drop (left out, said so)
    # Labelled rows besides, of dual_softmax, query_bank; see docs/evaluation.md. On the command
    # line a name, the flag repeated, or names with commas between them.
    c.eval.extra = ()
    c.eval.bank = 1000  # training clips in the query bank

    c.mesh = ConfigDict()
    # Devices on each axis, see docs/tpu.md and vop_jax/training/sharding.py. A batch is spread over
    # data x fsdp; frozen weights and optimizer state are cut over fsdp, heads and MLP over model.
    c.mesh.data = -1  # -1: all devices that fsdp and model leave
    c.mesh.fsdp = 1
    c.mesh.model = 1
    # Where parameters live, before the built-in rules: (pattern over names, an axis or None of each
    # dimension) pairs, such as ((r".*/c_fc/kernel", (None, "model")),)
    c.mesh.placement = ()

    c.compute = ConfigDict()
    c.compute.dtype = "float32"  # of matmuls; bfloat16 on TPUs and GPUs
    # Where compiled programs are kept for the next start. "": on GPUs and TPUs in the workdir,
    # unless JAX_COMPILATION_CACHE_DIR says elsewhere; off: nowhere.
    c.compute.cache = ""
    # xla: plain JAX. On NVIDIA in bfloat16 fused: kernels of this project, layer norms' too, and
    # cudnn: that of cuDNN, in the vision tower. Of layers across frames (vop_f…) alone blocks:
    # anywhere, as little memory, and splash: a kernel for TPUs. auto: on NVIDIA in bfloat16
    # fused, or cudnn where the mesh cuts parameters; else xla
    c.compute.attention = "auto"
    # What follows and train.microbatches save memory for time, see docs/memory.md; same results.
    # Computed again in the backward pass: none; dots: all but products with weights; full: blocks
    c.compute.remat = "none"
    c.compute.frame_chunk = 0  # so many frames of a device in a vision block at a time; 0: all

    # The demo's own CLIP, trained from nothing on still frames when steps > 0.
    c.pretrain = ConfigDict()
    c.pretrain.steps = 0
    c.pretrain.batch_size = 128
    c.pretrain.learning_rate = 1e-3

    return c.lock()


def get_config() -> ConfigDict:
    """This file as a config file: what a command line without --config starts from."""
    return base_config()


ALLOWED = {
    "clip.activation": ("", "quick_gelu", "gelu"),
    "data.kind": (
        *("folder", "msrvtt9k", "msrvtt7k", "didemo", "activitynet", "lsmdc", "msvd", "vatex"),
        *("clips", "stills"),
    ),
    "data.sampling": ("uniform", "rand", "linspace", "segments"),
    "train.select": ("last", "best"),
    "data.short_clips": ("skip", "repeat"),
    "eval.missing": ("miss", "drop"),
    "compute.dtype": ("float32", "bfloat16"),
    "compute.attention": ("auto", "xla", "fused", "cudnn", "splash", "blocks"),
    "compute.remat": ("none", "dots", "full"),
}
ON_CUDA = ("fused", "cudnn")  # of compute.attention
AT_LEAST_ONE = (
    "data.rendered",
    "data.frames",
    "data.short_side",
    "data.threads",
    "train.batch_size",
    "train.microbatches",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "eval.batch_size",
    "eval.bank",
    "mesh.fsdp",
    "mesh.model",
    "pretrain.batch_size",
)
AT_LEAST_ZERO = (
    "method.init_std",
    "data.stored_fps",
    "data.folder_fps",
    "data.workers",
    "data.cache_gb",
    "data.device_cache_gb",
    "train.steps",
    "train.learning_rate",
    "train.weight_decay",
    "train.eval_every",
    "compute.frame_chunk",
    "pretrain.steps",
    "pretrain.learning_rate",
)
EXTRAS = ("dual_softmax", "query_bank")  # in eval.extra
ABOVE_ZERO = ("train.clip_norm",)
SHARES = ("data.max_skipped", "data.val_share", "train.warmup")

# May differ when a run is taken up again: none of them changes what is learnt.
INPUTS = ("init.clip", "data.annotations", "data.videos", "data.records")
RESUMABLE = (
    *INPUTS,  # compared by content: CLIP's, and ids and captions of the training split
    "data.threads",
    "data.workers",
    "data.cache_gb",
    "data.device_cache_gb",  # the pixels are the same to the bit
    "data.text_buckets",  # the same numbers in other shapes
    "data.max_skipped",
    "train.microbatches",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "eval.batch_size",
    "eval.extra",
    "eval.bank",
    "compute.cache",
    "mesh.data",
    "mesh.fsdp",
    "mesh.model",
    "mesh.placement",
    "compute.attention",
    "compute.remat",
    "compute.frame_chunk",
)
EVALUABLE = (*RESUMABLE, "data.eval_split", "eval.missing")  # may differ with --mode=eval, export


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 1000, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that was written down, with the defaults of keys that are newer than it."""

    def fill(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        filled = {**default, **given}
        for key, section in default.items():
            if isinstance(section, Mapping):
                filled[key] = fill(section, given.get(key, {}))
        return filled

    return fill(base_config().to_dict(), config)


def from_json(text: bytes, where: Any) -> ConfigDict:
    """The config of a config.json, with the defaults of keys that are newer than it.

    Raises:
        UserError: it is damaged, or has keys or values that no config has; names `where`.
    """
    try:
        config, given = base_config(), flatten_config(completed(json.loads(text)))
        check_keys(given)
        for key, value in given.items():
            section, _, name = key.rpartition(".")
            place = config[section] if section else config
            is_tuple = isinstance(place[name], tuple)
            place[name] = _as_tuple(value) if is_tuple else value
        return config
    except (ValueError, TypeError, AttributeError, KeyError, UserError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"{where}: damaged, or of another version ({line}); delete it, and the command that "
            "made the run, with its --config, writes it anew"
        ) from None


def workdir_config(workdir: str | os.PathLike) -> ConfigDict | None:
    """The config that a workdir's run has; None where there is none.

    Raises:
        UserError: its config.json is damaged.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    return from_json(path.read_bytes(), path) if path.exists() else None


def _as_tuple(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples again."""
    if isinstance(value, list | tuple):
        return tuple(tuple(v) if isinstance(v, list) else v for v in value)
    return (value,)


def extra_rows(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `eval.extra`, each once; it may be a list, or a string with commas.

    Raises:
        UserError: a name that is not in EXTRAS, or a query bank made of the evaluated split.
    """
    given = config["eval"]["extra"]
    try:
        names = ",".join([given] if isinstance(given, str) else given).split(",")
    except TypeError:
        names = [repr(given)]
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if name not in EXTRAS:
            raise UserError(f"config.eval.extra={name!r}: allowed are {', '.join(EXTRAS)}")
    split = config["data"]["eval_split"]
    if "query_bank" in names and config["data"]["train_split"] == split:
        raise UserError(
            f"config.eval.extra='query_bank': the bank comes from data.train_split, and {split!r} "
            "is also data.eval_split"
        )
    return tuple(dict.fromkeys(names))


def check_keys(keys: Iterable[str]) -> None:
    """Raises UserError for the first key, such as "train.steps", that is not declared."""
    declared = flatten_config(base_config())
    for key in keys:
        if key not in declared:
            near = difflib.get_close_matches(key, declared, n=1, cutoff=0.8)
            if near:
                raise UserError(f"config.{key}: no such key; did you mean config.{near[0]}?")
            section = key.rpartition(".")[0]
            beside = [k for k in declared if section and k.startswith(f"{section}.")]
            allowed = beside or dict.fromkeys(k.split(".")[0] for k in declared)
            raise UserError(f"config.{key}: no such key; there are {', '.join(allowed)}")


def validate(config: ConfigDict) -> None:
    """Checks every value that can be checked without reading a file.

    Raises:
        UserError: the first key that is unknown, missing or out of range, and what is allowed.
    """
    values, declared = flatten_config(config), flatten_config(base_config())
    check_keys(values)
    for key in declared:
        if key not in values:
            raise UserError(f"config.{key}: missing; start from vop_jax.config.base.base_config()")
    for key, allowed in ALLOWED.items():
        if values[key] not in allowed:
            names = ", ".join(repr(name) for name in allowed)
            raise UserError(f"config.{key}={values[key]!r}: allowed are {names}")
    for keys, low, high in (
        (AT_LEAST_ONE, 1, math.inf),
        (AT_LEAST_ZERO, 0, math.inf),
        (SHARES, 0, 1),
        (("data.jpeg_quality",), 1, 100),
        (("seed",), 0, 2**32 - 1),  # jax takes no more bits of it
    ):
        for key in keys:
            # Written so that NaN fails too.
            if not low <= values[key] <= high or values[key] == math.inf:
                span = f"{low} to {high}" if high != math.inf else f"{low} or more"
                raise UserError(f"config.{key}={values[key]}: must be {span}")
    for key in ABOVE_ZERO:
        if not 0 < values[key] < math.inf:
            raise UserError(f"config.{key}={values[key]}: must be more than 0")
    attention = values["compute.attention"]
    if attention in ON_CUDA and values["compute.dtype"] != "bfloat16":
        raise UserError(
            f"config.compute.attention={attention!r} needs config.compute.dtype='bfloat16'"
        )
    scale = values["data.crop_scale"]
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(
            f"config.data.crop_scale={scale}: must be (low, high), 0 < low <= high <= 1"
        )
    _check_buckets(values["data.text_buckets"])
    if values["data.sampling"] == "rand" and not values["data.stored_fps"]:
        raise UserError(
            "config.data.sampling='rand' needs frames to choose from: set data.stored_fps > 0"
        )
    if values["train.select"] == "best":
        if not values["train.eval_every"]:
            raise UserError("config.train.select='best' needs config.train.eval_every > 0")
        for key, why in (("eval", "spoil the evaluation"), ("train", "choose what fits it best")):
            if values["data.val_split"] == values[f"data.{key}_split"]:
                raise UserError(
                    f"config.data.val_split={values['data.val_split']!r} is the {key} split: "
                    f"choosing a checkpoint on it would {why}"
                )
        if values["data.val_share"] and values["data.train_split"] == values["data.eval_split"]:
            raise UserError(
                f"config.data.val_share: data.train_split={values['data.train_split']!r} is the "
                "eval split, none of it can be held out"
            )
    extra_rows(config)
    if values["mesh.data"] == 0 or values["mesh.data"] < -1:
        raise UserError(f"config.mesh.data={values['mesh.data']}: a number of devices, or -1")


def _check_buckets(buckets: Any) -> None:
    listed = isinstance(buckets, tuple | list)
    if not listed or not all(type(width) is int and width >= 2 for width in buckets):
        raise UserError(
            f"config.data.text_buckets={buckets!r}: must be a tuple of whole numbers, 2 or more, "
            "such as (32,), or ()"
        )


def first_difference(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], but: Collection[str] = RESUMABLE
) -> tuple[str, Any, Any] | None:
    """The first key in which two configs would learn something else: (key, mine, theirs).

    Args:
        but: keys that are not compared.
    """
    a, b = (flatten_config(completed(config)) for config in (mine, theirs))
    for key in [*a, *(k for k in b if k not in a)]:
        left, right = a.get(key), b.get(key)
        if isinstance(left, tuple | list) and isinstance(right, tuple | list):
            left, right = list(left), list(right)
        if key not in but and left != right:
            return key, left, right
    return None
