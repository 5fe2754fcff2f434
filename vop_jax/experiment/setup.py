"""Where a run starts: its workdir claimed, its CLIP loaded, its state fresh or restored."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vop_jax.clip.layers import Kernel
from vop_jax.clip.model import Clip
from vop_jax.clip.remat import Remat
from vop_jax.clip.weights import ClipWeights, cast_frozen, check_shapes, load_clip
from vop_jax.config import base as configs
from vop_jax.config.clip import ClipConfig, preset
from vop_jax.errors import UserError
from vop_jax.evaluation.evaluate import Encode, make_encoders
from vop_jax.model import TextVideoModel
from vop_jax.storage import files, tensors
from vop_jax.training import hosts, sharding
from vop_jax.training.checkpoint import Checkpoints
from vop_jax.training.step import TrainState, make_optimizer
from vop_jax.training.writer import METRICS_FILE
from vop_jax.tuning.methods import MethodConfig, method_of
from vop_jax.tuning.partition import merge, partition
from vop_jax.tuning.prompt_set import (
    check_same_clip,
    has_frame_tables,
    interpolate_frames,
    load_prompts,
)

CLIP_FILE = "clip.safetensors"  # of a workdir that pre-trained its own
STORES = "pip install -e '.[gcs]'"  # brings what opens gs://


@dataclasses.dataclass
class Run:
    """What all modes need: the model, and its parameters in two trees on the mesh.

    Attributes:
        state: the trainable parameters with step and optimizer state.
        frozen: all other parameters.
        initial: the trainable parameters before the first step, on the mesh.
        meta: what was saved beside the state; empty where nothing was.
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
        """Jitted (encode_video, encode_text), compiled once."""
        # Without a backward pass there is nothing to compute again.
        return make_encoders(self.model.clone(remat=Remat()), self.mesh)

    def params(self) -> dict[str, Any]:
        """The whole tree."""
        return merge(self.state.trainable, self.frozen)


@contextmanager
def opened(
    config: ConfigDict,
    workdir: str,
    pretrain: Callable[[ConfigDict, epath.Path], None] | None = None,
    extend: bool = False,
) -> Iterator[Run]:
    """Claims the workdir for this process and brings CLIP and state to the mesh.

    Args:
        pretrain: called when the config asks for a CLIP trained from nothing and the workdir
            has none yet; leaves one there under CLIP_FILE. None: nothing is trained, and the
            workdir keeps the config that it learnt with.
        extend: whether a run of fewer `train.steps` may go on to this config's.

    Raises:
        UserError: the config, the weights or the workdir are not what they should be.
    """
    method = hosts.on_all(lambda: _checked(config))
    root = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        hosts.on_first(lambda: stack.enter_context(_locked(root)))
        hosts.agree(_facts(config))
        checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        try:
            train = pretrain is not None
            hosts.on_first(lambda: _claim(root, config, checkpoints, train=train, extend=extend))
            mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model)
            check_kernel(config, mesh)
            _keep_compiled(config.compute.cache, root, mesh)
            sharding.check_batch(mesh, "train.batch_size", config.train.batch_size)
            sharding.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
            sharding.check_microbatches(mesh, config.train.batch_size, config.train.microbatches)
            if pretrains(config) and hosts.on_first(lambda: not (root / CLIP_FILE).exists()):
                if pretrain is None:
                    raise UserError(f"--workdir={root}: no {CLIP_FILE} yet; train first")
                pretrain(config, root)
            clip = hosts.on_all(lambda: load_backbone(config, root))
            hosts.agree({"init.clip": clip.fingerprint})
            method.check_fits(clip.config)
            heads = {"visual": clip.config.vision_heads, "text": clip.config.text_heads}
            sharding.check_heads(mesh, heads)
            logging.info("CLIP %s; method %s", clip.name, method.name)
            yield _prepare(config, root, mesh, method, clip, checkpoints)
        finally:
            checkpoints.close()


def _checked(config: ConfigDict) -> MethodConfig:
    configs.validate(config)
    _check_stores(config)
    return method_of(config)


def _facts(config: ConfigDict) -> dict[str, str]:
    """What processes must have in common: all that may change what is learnt, and the code."""
    package = pathlib.Path(__file__).parent
    code = "".join(file.read_text() for file in sorted(package.rglob("*.py")))
    packages = " ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "optax"))
    return {
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "version of the code": code,
        "version of jax, flax or optax": packages,
    }


@contextmanager
def _locked(root: epath.Path) -> Iterator[None]:
    """One run per workdir; the lock goes with the process, however it ends."""
    if "://" in str(root):  # object stores have no locks
        _check_bucket(root)
        yield
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(root / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"--workdir={root}: another run is using it") from None
    except OSError as error:
        raise UserError(f"--workdir={root}: not a folder to write in ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


def _check_stores(config: ConfigDict) -> None:
    """Raises UserError for a path in a store whose package is not installed."""
    for key, value in configs.flatten_config(config).items():
        if isinstance(value, str) and "://" in value:
            try:
                epath.Path(value).exists()
            except ImportError as error:
                raise UserError(f"config.{key}={value}: {error}; {STORES}") from None


def _check_bucket(root: epath.Path) -> None:
    """Raises UserError where nothing can be written; making a folder there says nothing."""
    probe = root / ".writable"
    try:
        probe.write_bytes(b"1")  # an empty object may lie there as a folder
        probe.unlink(missing_ok=True)
    except ImportError as error:
        raise UserError(f"--workdir={root}: {error}; {STORES}") from None
    except FileNotFoundError:
        raise UserError(f"--workdir={root}: there is no such bucket") from None
    except Exception as error:  # each store's client has its own
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--workdir={root}: not a place to write in ({why})") from None


def check_kernel(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where these devices lack the `compute.attention` that is asked for."""
    asked, platform = config.compute.attention, _platform(mesh)
    if asked in configs.ON_CUDA and not _on_cuda(mesh):
        raise UserError(f"config.compute.attention={asked!r}: needs an NVIDIA GPU, not {platform}")
    if asked == "splash" and platform != "tpu":
        raise UserError(f"config.compute.attention={asked!r}: needs a TPU, not {platform}")
    if asked in ("fused", "splash") and sharding.shards_parameters(mesh):
        # The compiler cannot share a kernel out.
        cudnn = "cudnn, " if _on_cuda(mesh) else ""
        raise UserError(
            f"config.compute.attention={asked!r}: wants all parameters on every device, set "
            f"mesh.fsdp and mesh.model to 1; allowed on this mesh are auto, {cudnn}xla, blocks"
        )


def kernel_of(config: ConfigDict, mesh: Mesh) -> Kernel:
    """What `compute.attention` comes to on these devices."""
    asked = config.compute.attention
    return best_kernel(config.compute.dtype, mesh) if asked == "auto" else asked


def best_kernel(dtype: str, mesh: Mesh) -> Kernel:
    """What attention in this dtype is fastest by on these devices."""
    if not _on_cuda(mesh) or dtype != "bfloat16":
        return "xla"
    return "cudnn" if sharding.shards_parameters(mesh) else "fused"


def _on_cuda(mesh: Mesh) -> bool:
    version = mesh.devices.flat[0].client.platform_version
    return _platform(mesh) == "gpu" and "rocm" not in version.lower()


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _keep_compiled(cache: str, root: epath.Path, mesh: Mesh) -> None:
    """Programs that took a second or more to compile are found again at the next start."""
    if cache == "off":
        jax.config.update("jax_compilation_cache_dir", None)
    elif cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    # A CPU's programs may use instructions that the next machine does not have.
    elif not jax.config.values["jax_compilation_cache_dir"] and _platform(mesh) != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))


def _claim(
    root: epath.Path, config: ConfigDict, checkpoints: Checkpoints, *, train: bool, extend: bool
) -> None:
    """Writes the workdir's config, unless it holds progress of a run with another one."""
    path = root / configs.CONFIG_FILE
    if checkpoints.latest_step() is None:  # nothing was learnt yet: start over where it is another
        passing = set(configs.RESUMABLE) - set(configs.INPUTS)
        try:
            before = configs.workdir_config(root) or config
        except UserError:
            before = configs.base_config()
        if configs.first_difference(config, before, passing):
            (root / METRICS_FILE).unlink(missing_ok=True)
        files.write_json(path, config.to_dict())
        return
    before = configs.workdir_config(root) or config
    more = config.train.steps > before.train.steps
    passing = set(configs.RESUMABLE if train else configs.EVALUABLE)
    passing |= {"train.steps"} if extend and more else set()
    if difference := configs.first_difference(config, before, passing):
        key, mine, theirs = difference
        further = f", or say --config.train.steps={mine} to train it further"
        hint = further if key == "train.steps" and more else ""
        raise UserError(
            f"--workdir={root}: holds a run with config.{key}={theirs!r}, not {mine!r}; use "
            f"another workdir, or that value to continue it{hint}"
        )
    if train or not path.exists():
        files.write_json(path, config.to_dict())


def pretrains(config: ConfigDict) -> bool:
    """Whether the run starts with training its own CLIP."""
    return bool(config.pretrain.steps) and not config.init.clip


def load_backbone(config: ConfigDict, root: epath.Path) -> ClipWeights:
    """The CLIP to start from: `init.clip`, the workdir's own, or a random one for `full`.

    Raises:
        UserError: none of them is configured, or the weights are not what the config expects.
    """
    if config.init.clip or pretrains(config):
        clip = load_clip(config.init.clip or root / CLIP_FILE)
    elif config.method.name == "full" and config.clip.arch:
        clip = _random_clip(preset(config), config.seed)
    else:
        raise UserError(
            "config.init.clip is not set: give a file written by tools/convert_clip_weights.py"
        )
    if config.clip.arch:
        wanted = dataclasses.replace(preset(config), activation=clip.config.activation)
        if wanted != clip.config:
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


def _prepare(
    config: ConfigDict,
    root: epath.Path,
    mesh: Mesh,
    method: MethodConfig,
    clip: ClipWeights,
    checkpoints: Checkpoints,
) -> Run:
    """The newest state: the workdir's, else `init.prompts`, else fresh prompts."""
    dtype, kernel = jnp.dtype(config.compute.dtype), kernel_of(config, mesh)
    remat = Remat(config.compute.remat, config.compute.frame_chunk)
    model = TextVideoModel(clip.config, method, dtype, kernel, remat)
    params = {"clip": clip.params}
    params |= jax.jit(model.init_added)(jax.random.key(config.seed))
    trainable, frozen = partition(params, method.trainable_patterns(clip.config))
    if config.init.prompts:
        fresh = trainable
        trainable = hosts.on_all(lambda: _given_prompts(config, clip, method, fresh))
    rules = sharding.placement_rules(config.mesh.placement)
    sharding.check_rules(rules, list(tensors.flatten(params)))
    state = TrainState.create(trainable, make_optimizer(config.train))
    state = sharding.place(mesh, state, rules)
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


def _given_prompts(
    config: ConfigDict, clip: ClipWeights, method: MethodConfig, fresh: Any
) -> dict[str, Any]:
    path = config.init.prompts
    given = load_prompts(path)
    check_same_clip(path, given, clip.fingerprint, clip.name, clip.config)
    params, theirs = given.params, dataclasses.asdict(given.method)
    if given.method.frames != method.frames and has_frame_tables(params):
        if not config.init.interpolate_frames:
            raise UserError(
                f"{path}: prompts of {given.method.frames} frame positions, "
                f"config.data.frames={method.frames}; set config.init.interpolate_frames=True "
                "to resample them"
            )
        params = interpolate_frames(params, method.frames)
    for key, mine in dataclasses.asdict(method).items():
        if key not in ("init_std", "frames") and theirs[key] != mine:
            raise UserError(f"{path}: holds method.{key}={theirs[key]!r}, config says {mine!r}")
    shapes = {name: leaf.shape for name, leaf in tensors.flatten(fresh).items()}
    check_shapes(path, params, shapes)
    return params


def check_trained(run: Run) -> None:
    if not run.meta and not run.config.init.prompts and run.state.trainable:
        raise UserError(
            f"--workdir={run.workdir}: no checkpoint; train first, or set config.init.prompts"
        )
