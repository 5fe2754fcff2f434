"""Every key of a run's config: its default, the values it may have, and what it means.

A section of the config is a dataclass. `KEYS` lists all keys as "section.name". Defaults, checks
and the reference table of the docs come from here; the string below a key is its meaning.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

from vop_jax.config.clip import PRESETS
from vop_jax.errors import UserError

T = TypeVar("T")
EXTRAS = ("dual_softmax", "query_bank")  # values of eval.extra
TRACKERS = ("tensorboard", "wandb", "mlflow")  # values of log.to


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
        choices: all allowed values; empty allows any value in the range.
        low, high: the range of a number, both ends included.
        above: the number must be larger than this.
        values: the allowed values in words, of a key that has a check of its own.
        change: whether an existing workdir may continue with another value: "resume" for training
            and evaluation (the key does not affect what is learned), "eval" for evaluation and
            export only.
    """

    default: Any
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float = math.inf
    above: float | None = None
    values: str = ""
    change: Literal["never", "eval", "resume"] = "never"

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        if self.choices:
            return ", ".join(choice or '""' for choice in self.choices)
        if self.low is not None:
            return f"{self.low} or more" if self.high == math.inf else f"{self.low} to {self.high}"
        if self.above is not None:
            return f"more than {self.above:g}"
        return self.values or {bool: "True, False", str: "any text"}.get(type(self.default), "")

    def check(self, name: str, value: Any) -> None:
        """Raises UserError for a value that is not allowed; `name` is the key in the message."""
        if self.choices and value not in self.choices:
            raise UserError(f"{name}={value!r}: allowed are {self.allowed}")
        # Written so that NaN fails too.
        if self.low is not None and not (self.low <= value <= self.high and value < math.inf):
            raise UserError(f"{name}={value}: must be {self.allowed}")
        if self.above is not None and not self.above < value < math.inf:
            raise UserError(f"{name}={value}: must be {self.allowed}")


def key(default: T, **options: Any) -> T:
    """A dataclass field that is a key of the config; see `Key` for the options."""
    field: T = dataclasses.field(default=default, metadata={"key": Key(default, **options)})
    return field


@dataclasses.dataclass(frozen=True)
class InitSection:
    """The parameters that a run starts from.

    A run takes the first of these that exists: the newest checkpoint of its workdir;
    `init.prompts` over `init.clip`; `init.clip` with new prompts; a CLIP that the run trains
    itself (section `pretrain`).
    """

    clip: str = key("", change="resume")
    """A CLIP file that `vop convert` wrote, or its name on the Hub, hf://OWNER/NAME."""
    prompts: str = key("")
    """A prompts.safetensors of another run over the same CLIP, or its name on the Hub."""
    interpolate_frames: bool = key(False)
    """Resample the frame tables of `init.prompts` to another `data.frames`."""


@dataclasses.dataclass(frozen=True)
class ClipSection:
    """The kind of CLIP that the run expects; another kind is an error. "" accepts any CLIP."""

    arch: str = key("", choices=("", *PRESETS))
    """The architecture. With method full and without a CLIP file, a random CLIP of it is
    trained."""
    activation: str = key("", choices=("", "quick_gelu", "gelu"))
    """The activation function: OpenAI's models use quick_gelu, most of open_clip's use gelu."""


@dataclasses.dataclass(frozen=True)
class MethodSection:
    """What is added to CLIP and trained."""

    name: str = key("vop", values="a name in vop_jax.tuning.methods.METHODS")
    """The method: VoP's variants vop, vop_p, vop_c, vop_f, vop_f+p, vop_f+c, or a baseline."""
    branches: str = key("both", choices=("both", "visual", "text"))
    """The towers that get prompts or adapters."""
    visual_prompts: int = key(8, low=0)
    """Prompt tokens in each layer of the vision tower, after CLS."""
    text_prefix: int = key(4, low=0)
    """Prompt tokens in each layer of the text tower, after SOS."""
    text_suffix: int = key(4, low=0)
    """Prompt tokens in each layer of the text tower, before EOT."""
    suffix: str = key("eot", choices=("eot", "released"))
    """The place of suffix prompts. eot: before each caption's EOT token. released: before the last
    position, as in the authors' released code."""
    first_layer: int = key(1, values="1 or more")
    """The first layer with prompts or adapters, counted from 1."""
    last_layer: int = key(0, low=0)
    """The last layer with prompts or adapters; 0 is the deepest."""
    specific_prompts: int = key(4, low=0)
    """For vop_p and vop_c: how many of the `method.visual_prompts` are specific to a frame."""
    split_layer: int = key(-1, low=-1)
    """For vop_f: layers after this one attend across frames; -1 is two thirds of the layers, 8 of
    12."""
    frame_position: bool = key(True)
    """For vop_f: add a position embedding to each frame after the split layer."""
    cmm: str = key("bilstm", choices=("bilstm", "lstm", "transformer"))
    """For vop_c: the module that models context over frames."""
    cmm_role: str = key("prompts", choices=("prompts", "cls"))
    """For vop_c: what the module does. prompts: it generates prompts. cls: it updates the CLS
    tokens (an ablation)."""
    adapter_width: int = key(64, low=1)
    """Width of an adapter's bottleneck."""
    init_std: float = key(0.02, low=0)
    """Standard deviation of the normal distribution of new prompts."""


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The dataset, how its clips are stored, and how they are read."""

    kind: str = key("folder", values="a file of vop_jax/data/datasets, without .py")
    """The dataset: your own videos (folder), a benchmark such as msrvtt9k, or rendered shapes
    (clips, stills)."""
    annotations: str = key("", change="resume")
    """The annotations: for kind=folder a CSV or JSON Lines file with the columns video, caption and
    optionally start, end, split; for a benchmark the folder of its official files. Finished records
    need no annotations."""
    videos: str = key("", change="resume")
    """The folder of the videos that the annotations name; rendered clips are written there.
    Finished records need no videos."""
    rendered: int = key(768, low=1)
    """For kind=clips: number of training clips to render; 768 clips show each caption once."""
    records: str = key("", change="resume")
    """The folder of the records, which hold the decoded frames; "" is WORKDIR/records."""
    official_sizes: bool = key(True)
    """Refuse a benchmark whose splits do not have their published sizes."""
    train_split: str = key("train")
    """The split to train on."""
    eval_split: str = key("test", change="eval")
    """The split to evaluate."""
    val_split: str = key("val")
    """The split that selects a checkpoint with `train.select=best`."""
    val_share: float = key(0.0, low=0, high=1)
    """With train.select=best: share of the training videos that becomes the validation split,
    chosen by a hash of their names."""
    frames: int = key(12, low=1)
    """Frames of a clip (F)."""
    sampling: str = key("uniform", choices=("uniform", "rand", "linspace", "segments"))
    """Which F frames of a clip the model sees. uniform: the middle frame of each of F equal
    segments. rand: in training, a random frame of each segment. linspace: equal steps from the
    first frame to the last, as in CLIP4Clip with stored_fps=1. segments: as in TSN."""
    stored_fps: float = key(0.0, low=0)
    """Frames per second in the records; 0 stores only the F sampled frames."""
    folder_fps: float = key(0.0, low=0)
    """Frame rate of videos that are folders of extracted frames; 0 is unknown."""
    short_side: int = key(256, low=1)
    """Short side of stored frames in pixels; larger frames are resized to it."""
    jpeg_quality: int = key(95, low=1, high=100)
    """JPEG quality of stored frames."""
    augment: bool = key(True)
    """Random resized crops, and flips if `data.flip` is True, in training."""
    crop_scale: tuple[float, float] = key(
        (0.5, 1.0), values="(low, high) with 0 < low <= high <= 1"
    )
    """Smallest and largest area of the random crop, as a share of the frame. All frames of a clip
    are cropped alike."""
    flip: bool = key(True)
    """Mirror half of the training clips; set False if captions say left or right."""
    short_clips: str = key("skip", choices=("skip", "repeat"))
    """What happens to a clip with fewer than F frames. skip: it is left out. repeat: its last frame
    is repeated."""
    max_skipped: float = key(0.05, low=0, high=1, change="resume")
    """Largest share of unusable videos in a split; with more, the run does not start."""
    threads: int = key(16, low=1, change="resume")
    """Threads that read and decode records."""
    workers: int = key(0, low=0, change="resume")
    """Processes that read and decode records; 0: threads of the main process do it."""
    device_cache_gb: float = key(0.0, low=0, change="resume")
    """GB of each device for the decoded frames of the training split, which are then cropped on the
    device. A split that needs more is an error. 0: the host decodes and crops."""
    text_buckets: tuple[int, ...] = key(
        (32,), values="a tuple of whole numbers, 2 or more", change="resume"
    )
    """Widths in tokens to which the captions of a batch are padded: the smallest width that holds
    all of them, else all token slots. () always pads to all slots, as method.suffix=released
    does."""
    cache_gb: float = key(1.0, low=0, change="resume")
    """GB of the host's memory for decoded frames; a split that needs more is not cached."""


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """Optimization, logging and checkpoints."""

    steps: int = key(1000, low=0)
    """Optimizer steps; 0 only evaluates."""
    batch_size: int = key(32, low=1)
    """Clips in a batch, summed over all devices of all hosts (B)."""
    microbatches: int = key(0, low=0, change="resume")
    """To save memory, a device embeds its clips in this many parts, one after the other. Loss and
    gradient are the same. 0: the fewest with which a step fits in memory."""
    learning_rate: float = key(5e-3, low=0)
    """Peak learning rate; the paper searches it for each method between 1e-6 and 1e-2."""
    warmup: float = key(0.1, low=0, high=1)
    """Share of the steps with linear warm-up; then the learning rate falls to 0 along a cosine."""
    weight_decay: float = key(0.2, low=0)
    """Weight decay of AdamW; norms and biases have none."""
    clip_norm: float = key(1.0, above=0)
    """Largest norm of the gradient over all trained parameters."""
    log_every: int = key(20, low=1, change="resume")
    """Steps between two lines of the log."""
    eval_every: int = key(0, low=0, change="resume")
    """Steps between two evaluations; 0 evaluates only before the first step and after the last."""
    checkpoint_every: int = key(100, low=1, change="resume")
    """Steps between two checkpoints; the last step always gets one."""
    keep_checkpoints: int = key(2, low=1, change="resume")
    """Number of newest checkpoints to keep."""
    select: str = key("last", choices=("last", "best"))
    """Which parameters are the result. last: those after the last step. best: those with the best
    mean R@1 on `data.val_split`, evaluated every `train.eval_every` steps."""


@dataclasses.dataclass(frozen=True)
class LogSection:
    """Where the metrics of a run go beside its `metrics.jsonl`, and traces of its steps."""

    to: tuple[str, ...] = key(
        ("tensorboard",), values=f"names of {', '.join(TRACKERS)}", change="resume"
    )
    """The trackers: one name, or several with commas between them; () is none."""
    profile: tuple[int, ...] = key(
        (), values="(first, last), steps from 1 on; () or (0, 0)", change="resume"
    )
    """The steps of which a profiler trace is written into the workdir; () or (0, 0) is none."""


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Evaluation."""

    batch_size: int = key(32, low=1, change="resume")
    """Clips in a batch, over all devices."""
    missing: str = key("miss", choices=("miss", "drop"), change="eval")
    """What happens to an unusable video. miss: it ranks last. drop: the metrics leave it out."""
    extra: tuple[str, ...] = key((), values=f"names of {', '.join(EXTRAS)}", change="resume")
    """Additional metrics, computed from rescored similarities; on the command line one name, or
    several with commas between them."""
    bank: int = key(1000, low=1, change="resume")
    """Number of training clips in the bank of query_bank."""


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """The device mesh. A batch is sharded over data x fsdp."""

    data: int = key(-1, values="-1, or 1 or more", change="resume")
    """Devices on the data axis; -1: all devices, divided by fsdp x model."""
    fsdp: int = key(1, low=1, change="resume")
    """Devices that share the frozen weights, trained parameters and optimizer state."""
    model: int = key(1, low=1, change="resume")
    """Devices that share the attention heads and the MLPs' inner width."""
    placement: tuple[Any, ...] = key((), values="a tuple of pairs", change="resume")
    """Sharding rules that go before the built-in ones. A rule is a pair: a pattern over parameter
    names, and the mesh axis of each dimension. Example: ((r".*/c_fc/kernel", (None, "model")),)."""


@dataclasses.dataclass(frozen=True)
class ComputeSection:
    """Precision, kernels and memory."""

    dtype: str = key("auto", choices=("auto", "float32", "bfloat16"))
    """Type of matrix products' operands; they add up in float32. auto: that of the workdir's run,
    or for a new run bfloat16 where the device is faster with it, which is measured."""
    cache: str = key("", change="resume")
    """The folder of compiled programs. "": $JAX_COMPILATION_CACHE_DIR if it is set, else
    WORKDIR/compiled on GPUs and TPUs, and vop_jax/compiled in the user's cache folder on CPUs. off:
    programs are not kept."""
    attention: str = key(
        "auto", choices=("auto", "xla", "fused", "cudnn", "splash", "blocks"), change="resume"
    )
    """The attention kernel. xla: plain JAX. fused (this project's) and cudnn: for NVIDIA GPUs in
    bfloat16. blocks and splash: for layers across frames only; blocks saves memory on any device,
    splash is a TPU kernel. auto: on NVIDIA GPUs in bfloat16 fused, or cudnn if the mesh shards
    parameters; otherwise xla."""
    remat: str = key("none", choices=("none", "dots", "full"), change="resume")
    """What the backward pass computes again to save memory. none: nothing. dots: everything but
    products with weights. full: whole blocks."""
    frame_chunk: int = key(0, low=0, change="resume")
    """To save memory, a vision block processes at most so many frames of a device at a time; 0:
    all."""


@dataclasses.dataclass(frozen=True)
class PretrainSection:
    """Training of the demo's own CLIP on still pictures; needs `steps` > 0 and no `init.clip`."""

    steps: int = key(0, low=0)
    """Optimizer steps."""
    batch_size: int = key(128, low=1)
    """Pairs of picture and caption in a batch."""
    learning_rate: float = key(1e-3, low=0)
    """Peak learning rate."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The whole config. Its defaults are the paper's recipe (section 4.1) on a folder of videos."""

    seed: int = key(0, low=0, high=2**32 - 1)
    """Seed of new parameters, data order and augmentation."""
    init: InitSection = InitSection()
    clip: ClipSection = ClipSection()
    method: MethodSection = MethodSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    log: LogSection = LogSection()
    eval: EvalSection = EvalSection()
    mesh: MeshSection = MeshSection()
    compute: ComputeSection = ComputeSection()
    pretrain: PretrainSection = PretrainSection()


def _keys(section: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    for field in dataclasses.fields(section):
        if "key" in field.metadata:
            yield prefix + field.name, field.metadata["key"]
        else:
            yield from _keys(type(field.default), f"{prefix}{field.name}.")


KEYS: dict[str, Key] = dict(_keys(RunConfig))


class Row(NamedTuple):
    """A row of the reference table."""

    key: str
    default: str
    allowed: str
    meaning: str


def table() -> list[Row]:
    """The reference table of the docs: a row for each key, section by section."""
    sections = [type(f.default) for f in dataclasses.fields(RunConfig) if "key" not in f.metadata]
    pattern = re.compile(r' = key\(.*?\)\n    """(.*?)"""', re.DOTALL)
    texts = [t for s in (RunConfig, *sections) for t in pattern.findall(inspect.getsource(s))]
    return [
        Row(name, repr(key.default), key.allowed, " ".join(text.split()))
        for (name, key), text in zip(KEYS.items(), texts, strict=True)
    ]
