"""Opens a run in three phases: check its config, claim its workdir, load its state to the mesh."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vop_jax.clip.kernels import products
from vop_jax.clip.model import Clip
from vop_jax.clip.remat import Remat
from vop_jax.clip.weights import ClipWeights, cast_frozen, check_shapes, load_clip
from vop_jax.config import base as configs
from vop_jax.config.clip import ClipConfig, preset
from vop_jax.data.datasets import registry
from vop_jax.errors import UserError
from vop_jax.evaluation.evaluate import Encode, make_encoders
from vop_jax.experiment import kernels
from vop_jax.model import TextVideoModel
from vop_jax.storage import files, hub, tensors
from vop_jax.training import hosts, program_cache, sharding, trackers
from vop_jax.training.checkpoint import Checkpoints
from vop_jax.training.step import TrainState, make_optimizer
from vop_jax.training.writer import METRICS_FILE
from vop_jax.tuning.methods import MethodConfig, method_of
from vop_jax.tuning.partition import partition
from vop_jax.tuning.prompt_set import (
    PromptSet,
    check_same_clip,
    has_frame_tables,
    interpolate_frames,
    load_prompts,
)

STORES = "pip install -e '.[gcs]'"  # installs access to gs://


@dataclasses.dataclass
class Run:
    """What all modes need: the model, and its parameters as two trees on the mesh.

    Attributes:
        state: the trainable parameters with step and optimizer state.
        frozen: all other parameters.
        initial: makes the trainable parameters of step 0, on the mesh.
        meta: the metadata of the restored checkpoint; {} without one.
    """

    config: ConfigDict
    workdir: epath.Path
    mesh: Mesh
    method: MethodConfig
    clip: ClipWeights
    model: TextVideoModel
    state: TrainState
    frozen: Any
    initial: Callable[[], Any]
    checkpoints: Checkpoints
    meta: dict[str, Any]

    @functools.cached_property
    def encoders(self) -> tuple[Encode, Encode]:
        """Jitted (encode_video, encode_text), compiled once; without a backward pass, no remat."""
        return make_encoders(self.model.clone(remat=Remat()), self.mesh)


@contextmanager
def open_run(
    config: ConfigDict,
    workdir: str,
    pretrain: Callable[[ConfigDict, epath.Path], None] | None = None,
    extend: bool = False,
) -> Iterator[Run]:
    """Opens the run of a workdir, for this process alone.

    Args:
        pretrain: writes a CLIP into the workdir; called if the config pre-trains one and there is
            none yet. None: nothing is trained, and the workdir keeps its config.
        extend: whether a run of fewer `train.steps` may continue to this config's.

    Raises:
        UserError: the config, the weights or the workdir are wrong.
    """
    root, training = epath.Path(workdir), pretrain is not None

    # ---- Check: in all processes; nothing is written.
    method, mesh = hosts.on_all(lambda: check(config, root, training=training))
    config = _with_dtype(config, hosts.on_first(lambda: resolved_dtype(config, root, mesh)))
    hosts.agree(_shared_facts(config))

    with contextlib.ExitStack() as stack:
        # ---- Claim: in the first process.
        hosts.on_first(lambda: stack.enter_context(_claim(root, config, training, extend)))
        program_cache.set_up(config.compute.cache, root, mesh.devices.flat[0].platform)

        # ---- Load: in all processes.
        if pretrains(config) and hosts.on_first(lambda: not (root / hub.CLIP_FILE).exists()):
            assert pretrain is not None  # `check` refuses this
            pretrain(config, root)
        clip, prompts = hosts.on_all(lambda: _load_files(config, root, method, mesh))
        hosts.agree(
            {"init.clip": clip.fingerprint, "init.prompts": prompts.fingerprint if prompts else ""}
        )
        logging.info("CLIP %s; method %s", clip.name, method.name)
        checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        stack.callback(checkpoints.close)
        yield _load_state(config, root, mesh, method, clip, prompts, checkpoints)


# ---- Check


def check(config: ConfigDict, root: epath.Path, *, training: bool) -> tuple[MethodConfig, Mesh]:
    """Checks what can be known before the workdir is touched; returns the method and the mesh.

    Raises:
        UserError: a key, a path, the mesh, or a workdir without anything to evaluate.
    """
    configs.validate(config)
    registry.get(config.data.kind)
    _check_paths(config)
    method = method_of(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    kernels.check_kernel(config, mesh)
    sharding.check_batch(mesh, "train.batch_size", config.train.batch_size)
    sharding.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
    sharding.check_microbatches(mesh, config.train.batch_size, config.train.microbatches)
    if training:
        trackers.check(config)
        if config.train.batch_size == 1 and config.train.steps and method.parts.trainable:
            raise UserError(
                "config.train.batch_size=1: the loss compares the clips of a batch with each "
                "other, of one it is always 0; use 2 or more"
            )
        return method, mesh
    if pretrains(config) and not (root / hub.CLIP_FILE).exists():
        raise UserError(f"--workdir={root}: no {hub.CLIP_FILE} yet; train first")
    if method.parts.trainable and not config.init.prompts and not _has_checkpoint(root):
        raise UserError(f"--workdir={root}: no checkpoint; train first, or set config.init.prompts")
    return method, mesh


def _check_paths(config: ConfigDict) -> None:
    """Raises UserError for an `init` file that is missing, or a store without its package."""
    weights = ("init.clip", "init.prompts")
    for key, value in configs.flatten_config(config).items():
        if isinstance(value, str) and hub.is_name(value) and key not in weights:
            raise UserError(f"config.{key}={value}: only config.init.clip and prompts may be there")
        if isinstance(value, str) and files.is_remote(value) and not hub.is_name(value):
            try:
                epath.Path(value).exists()
            except ImportError as error:
                raise UserError(f"config.{key}={value}: {error}; {STORES}") from None
    for path in (config.init.clip, config.init.prompts):
        if path and not hub.is_name(path) and not epath.Path(path).exists():
            raise UserError(f"{path}: no such file")
    random = config.method.name == "full" and config.clip.arch
    if not (config.init.clip or pretrains(config) or random):
        raise UserError(
            "config.init.clip is not set: give a file written by tools/convert_clip_weights.py"
        )


def _has_checkpoint(root: epath.Path) -> bool:
    folder = root / "checkpoints"
    return folder.exists() and any(step.name.isdigit() for step in folder.iterdir())


def _shared_facts(config: ConfigDict) -> dict[str, str]:
    """Facts that must be equal in all processes, since they may change what is learned."""
    package = pathlib.Path(__file__).parents[1]  # vop_jax
    code = "".join(file.read_text() for file in sorted(package.rglob("*.py")))
    packages = " ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "optax"))
    return {
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "version of the code": code,
        "version of jax, flax or optax": packages,
    }


def pretrains(config: ConfigDict) -> bool:
    """Whether the run starts with training its own CLIP."""
    return bool(config.pretrain.steps) and not config.init.clip


def resolved_dtype(config: ConfigDict, root: epath.Path, mesh: Mesh) -> str:
    """The configured `compute.dtype`, with auto resolved for this workdir or device."""
    if config.compute.dtype != "auto":
        return config.compute.dtype
    previous = configs.workdir_config(root) if _has_checkpoint(root) else None
    known = previous.compute.dtype if previous else "auto"
    return products.fastest_dtype(mesh.local_devices[0]) if known == "auto" else known


def _with_dtype(config: ConfigDict, dtype: str) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.compute.dtype = dtype
    return config


# ---- Claim


@contextmanager
def _claim(root: epath.Path, config: ConfigDict, training: bool, extend: bool) -> Iterator[None]:
    """Locks the workdir, and writes its config unless it belongs to a run with another one.

    A new workdir is removed again if the run is refused before it writes anything else.
    """
    new = not (files.is_remote(root) or root.exists())
    with contextlib.ExitStack() as stack:
        if files.is_remote(root):  # object stores have no locks
            _check_bucket(root)
        else:
            busy, label = "another run is using it", f"--workdir={root}"
            stack.enter_context(files.folder_lock(root, busy, label=label))
        if not _has_checkpoint(root):
            _start_over(root, config)
        else:
            _check_same_run(root, config, training, extend)
        if training or not _has_checkpoint(root) or not (root / configs.CONFIG_FILE).exists():
            files.write_json(root / configs.CONFIG_FILE, config.to_dict())
        try:
            yield
        except UserError:
            unused = {".lock", configs.CONFIG_FILE, "checkpoints"}
            if new and not _has_checkpoint(root) and {p.name for p in root.iterdir()} <= unused:
                root.rmtree()
            raise


def _start_over(root: epath.Path, config: ConfigDict) -> None:
    """Removes the metrics and trackers of another run, which saved no progress."""
    ignored = set(configs.RESUMABLE) - set(configs.INPUTS)
    try:
        previous = configs.workdir_config(root) or config
    except UserError:
        previous = configs.base_config()
    if configs.first_difference(config, previous, ignored):
        for name in (METRICS_FILE, trackers.TRACKERS_FILE):
            (root / name).unlink(missing_ok=True)


def _check_same_run(root: epath.Path, config: ConfigDict, training: bool, extend: bool) -> None:
    """Raises UserError if the workdir holds the progress of a run with another config."""
    previous = configs.workdir_config(root) or config
    more = config.train.steps > previous.train.steps
    ignored = set(configs.RESUMABLE if training else configs.EVALUABLE)
    ignored |= {"train.steps"} if extend and more else set()
    if difference := configs.first_difference(config, previous, ignored):
        key, ours, theirs = difference
        further = f", or say --config.train.steps={ours} to train it further"
        hint = further if key == "train.steps" and more else ""
        raise UserError(
            f"--workdir={root}: holds a run with config.{key}={theirs!r}, not {ours!r}; use "
            f"another workdir, or that value to continue it{hint}"
        )


def _check_bucket(root: epath.Path) -> None:
    """Raises UserError if nothing can be written; creating a folder in a bucket proves nothing."""
    probe = root / ".writable"
    try:
        probe.write_bytes(b"1")  # an empty object may exist there as a folder
        probe.unlink(missing_ok=True)
    except ImportError as error:
        raise UserError(f"--workdir={root}: {error}; {STORES}") from None
    except FileNotFoundError:
        raise UserError(f"--workdir={root}: there is no such bucket") from None
    except Exception as error:  # each store's client has its own
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--workdir={root}: not a place to write in ({why})") from None


# ---- Load


def _load_files(
    config: ConfigDict, root: epath.Path, method: MethodConfig, mesh: Mesh
) -> tuple[ClipWeights, PromptSet | None]:
    """The CLIP, and `init.prompts` for its number of frames; both fit the config."""
    clip = load_backbone(config, root)
    method.check_fits(clip.config)
    heads = {"visual": clip.config.vision_heads, "text": clip.config.text_heads}
    sharding.check_heads(mesh, heads)
    return clip, _load_prompts(config, clip, method) if config.init.prompts else None


def load_backbone(config: ConfigDict, root: epath.Path) -> ClipWeights:
    """The CLIP to start from: `init.clip`, the workdir's own, or a random one for `full`.

    Raises:
        UserError: the file is wrong, or the weights are not those that the config expects.
    """
    if config.init.clip or pretrains(config):
        clip = load_clip(config.init.clip or root / hub.CLIP_FILE)
    else:
        clip = _random_clip(preset(config), config.seed)
    if config.clip.arch:
        expected = dataclasses.replace(preset(config), activation=clip.config.activation)
        if expected != clip.config:
            raise UserError(f"config.clip.arch={config.clip.arch}: the weights are {clip.name}")
    if config.clip.activation not in ("", clip.config.activation):
        raise UserError(
            f"config.clip.activation={config.clip.activation}: the weights, {clip.name}, were "
            f"made with {clip.config.activation}"
        )
    return clip


def _random_clip(clip: ClipConfig, seed: int) -> ClipWeights:
    frames = np.zeros((1, clip.image_size, clip.image_size, 3), np.uint8)
    ids = np.zeros((1, clip.context_length), np.int32)
    params = jax.jit(Clip(clip).init)(jax.random.key(seed), frames, ids)["params"]
    params = jax.tree.map(np.asarray, params)
    return ClipWeights(params, clip, tensors.fingerprint(params), f"seed {seed}")


def _load_prompts(config: ConfigDict, clip: ClipWeights, method: MethodConfig) -> PromptSet:
    """`init.prompts` of this method and CLIP, resampled to `data.frames` if configured."""
    path = config.init.prompts
    prompts = load_prompts(path)
    check_same_clip(path, prompts, clip.fingerprint, clip.name, clip.config)
    theirs = dataclasses.asdict(prompts.method)
    if prompts.method.frames != method.frames and has_frame_tables(prompts.params):
        if not config.init.interpolate_frames:
            raise UserError(
                f"{path}: prompts of {prompts.method.frames} frame positions, "
                f"config.data.frames={method.frames}; set config.init.interpolate_frames=True "
                "to resample them"
            )
        params = interpolate_frames(prompts.params, method.frames)
        prompts = dataclasses.replace(prompts, params=params)
    for key, ours in dataclasses.asdict(method).items():
        if key not in ("init_std", "frames") and theirs[key] != ours:
            raise UserError(f"{path}: holds method.{key}={theirs[key]!r}, config says {ours!r}")
    return prompts


def _load_state(
    config: ConfigDict,
    root: epath.Path,
    mesh: Mesh,
    method: MethodConfig,
    clip: ClipWeights,
    prompts: PromptSet | None,
    checkpoints: Checkpoints,
) -> Run:
    """Restores the newest state: the workdir's, else `init.prompts`, else new prompts."""
    kernel, dtype = kernels.attention_kernel(config, mesh), jnp.dtype(config.compute.dtype)
    remat = Remat(config.compute.remat, config.compute.frame_chunk)
    model = TextVideoModel(clip.config, method, dtype, kernel, remat)
    params = {"clip": clip.params} | jax.jit(model.init_added)(jax.random.key(config.seed))
    trainable, frozen = partition(params, method.trainable_patterns(clip.config))
    if prompts is not None:
        shapes = {name: leaf.shape for name, leaf in tensors.flatten(trainable).items()}
        check_shapes(config.init.prompts, prompts.params, shapes)
        trainable = prompts.params
    rules = sharding.placement_rules(config.mesh.placement)
    sharding.check_rules(rules, list(tensors.flatten(params)))
    state = sharding.place(mesh, TrainState.create(trainable, make_optimizer(config.train)), rules)
    meta: dict[str, Any] = {}

    def check_clip(meta: dict[str, Any]) -> None:
        if meta["clip_fingerprint"] != clip.fingerprint:
            raise UserError(
                f"--workdir={root}: holds a run over {meta['clip_name']}, not over the "
                f"given {clip.name}"
            )

    if (restored := checkpoints.restore(state, check_clip)) is not None:
        state, meta = restored
        logging.info("continuing %s from step %d", root, int(state.step))
    frozen = sharding.place(mesh, cast_frozen(frozen, dtype), rules)
    initial = functools.partial(sharding.place, mesh, trainable, rules)
    return Run(config, root, mesh, method, clip, model, state, frozen, initial, checkpoints, meta)
