"""Videos and official annotation files become packed records.

    python -m vop_jax.data.prepare --dataset=msrvtt9k --videos=VIDEOS \\
        --annotations=ANNOTATIONS --output=records/msrvtt9k

Kill it whenever you like: the same command goes on. A clip whose decoder crashes or hangs is
left out and named. `python -m vop_jax.data.check` tells what came of it.
"""

import argparse
import contextlib
import difflib
import functools
import io
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from vop_jax import cli
from vop_jax.cli import Parser, number, whole
from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets import registry
from vop_jax.data.records import read, shards
from vop_jax.data.records.encode import Encoded, Preprocessing, encode_clip
from vop_jax.data.records.tfds_builder import CLIPS_PER_SHARD, Making
from vop_jax.data.records.write import pack
from vop_jax.errors import UserError
from vop_jax.video.sampling import SAMPLINGS
from vop_jax.video.workers import in_processes

PROBED = 8  # clips encoded to estimate the size


def prepare(
    name: str,
    videos: str,
    annotations: str,
    output: str,
    preprocessing: Preprocessing,
    making: Making,
    *,
    splits: Sequence[str] | None = None,
    official_sizes: bool = True,
    beam: Any = None,
) -> read.Packed:
    """The records of a dataset, made or completed.

    Args:
        beam: a `tfds.download.DownloadConfig` with a runner or options; None: this machine.

    Raises:
        UserError: the files are not what the dataset's are.
        OSError: the disk is full; the next call continues.
    """
    source = registry.get(name)
    dataset, notes = source.read(annotations, videos, splits=splits, official_sizes=official_sizes)
    for note in notes:
        logging.warning("%s", note)
    for split, clips in dataset.items():
        captions = sum(len(clip.captions) for clip in clips)
        logging.info("%s %s: %d videos, %d captions", name, split, len(clips), captions)
    root = epath.Path(output)
    if "://" in output:
        raise UserError(f"--output={output}: a folder of this machine is needed; copy it then")
    if read.find_records(root) is None:
        root.mkdir(parents=True, exist_ok=True)
        every = [clip for clips in dataset.values() for clip in clips]
        _tell_size(every, root, preprocessing, making)
    return pack(
        dataset,
        root,
        preprocessing,
        name=source.records_name,
        max_skipped=1.0,
        making=making,
        retry=True,
        wait=False,
        download_config=beam,
    )


def _tell_size(
    clips: list[VideoClip], root: epath.Path, preprocessing: Preprocessing, making: Making
) -> None:
    """How much disk all clips will take, judged by a few of them."""
    some = clips[:: max(1, len(clips) // PROBED)][:PROBED]
    encode = functools.partial(encode_clip, preprocessing=preprocessing)
    workers = min(making.workers or os.cpu_count() or 1, len(some))
    found = list(in_processes(encode, some, workers, seconds=making.seconds))
    sizes = [sum(map(len, clip.jpegs)) for clip in found if isinstance(clip, Encoded)]
    if not sizes:
        logging.warning("none of %d clips tried could be read: %s", len(some), found[0])
        return
    needed = len(clips) * sum(sizes) / len(sizes)
    free = shutil.disk_usage(root).free
    logging.info("about %s of records, %s free in %s", _bytes(needed), _bytes(free), root)
    if needed > free:
        logging.warning("the disk will be full before the end; what is finished then stays")


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def report(made: read.Packed) -> str:
    """What came of it, a line a split."""
    lines = []
    for split in made.splits.values():
        captions = sum(map(len, split.captions))
        line = f"{split.name}: {len(split)} of {len(split.rows)} videos, {captions} captions"
        lines.append(line)
    if made.skipped:
        first = made.skipped[0]
        lines.append(
            f"left out {len(made.skipped)}, first {shards.label_of(first)} ({first['reason']}); "
            "the same command tries those again whose files have changed"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    default, making = Preprocessing(), Making()
    parser = Parser(
        "python -m vop_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, type=_dataset, help=", ".join(_names()))
    parser.add_argument(
        "--videos", required=True, type=_path, help="folder of videos or of frame folders"
    )
    parser.add_argument(
        "--annotations", required=True, type=_path, help="folder of official files; a file"
    )
    parser.add_argument("--output", required=True, type=_path, help="a folder; config.data.records")
    parser.add_argument("--splits", help="only these: test or train,test")
    parser.add_argument("--other_sizes", action="store_true", help="not the official sizes")
    as_stored = parser.add_argument_group("how clips are stored, config.data's keys")
    as_stored.add_argument("--frames", type=whole(1), default=default.frames)
    as_stored.add_argument("--sampling", choices=SAMPLINGS, default=default.sampling)
    as_stored.add_argument("--stored_fps", type=number(0), default=default.stored_fps)
    as_stored.add_argument("--short_side", type=whole(1), default=default.short_side)
    as_stored.add_argument("--jpeg_quality", type=whole(1, 100), default=default.jpeg_quality)
    as_stored.add_argument("--short_clips", choices=("skip", "repeat"), default="skip")
    as_stored.add_argument("--folder_fps", type=number(0), default=default.folder_fps)
    work = parser.add_argument_group("how that is done")
    work.add_argument("--workers", type=whole(1), default=0, help="default: one a core")
    work.add_argument("--seconds", type=number(0), default=making.seconds, help="a clip's")
    work.add_argument("--clips_per_shard", type=whole(1), default=CLIPS_PER_SHARD)
    work.add_argument("--beam_options", help="--runner=DirectRunner … of Apache Beam, quoted")
    return parser


def _names() -> list[str]:
    return [kind for kind in registry.kinds() if not registry.get(kind).rendered]


def _dataset(text: str) -> str:
    names = _names()
    if text in names:
        return text
    if text.removesuffix("64") in names:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a config; its records are --dataset={text.removesuffix('64')} --frames=64"
        )
    close = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(names)}"
    raise argparse.ArgumentTypeError(f"no dataset {text!r}; {hint}")


_path = os.path.expanduser  # shells leave the ~ of --output=~/records


def _beam(options: str | None) -> Any:
    if options is None:
        return None
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("Apache Beam is not installed: pip install -e '.[beam]'") from None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):  # argparse prints its whole usage
            parsed = PipelineOptions(shlex.split(options))
            parsed.get_all_options()
            apache_beam.Pipeline(options=parsed)
    except (Exception, SystemExit) as error:
        why = (printed.getvalue().strip() or str(error)).splitlines()[-1]
        raise UserError(f"--beam_options={options}: {why}") from None
    return tfds.download.DownloadConfig(beam_options=parsed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.run(lambda: _run(argv), resumes=True)


def _run(argv: Sequence[str] | None) -> None:
    args = vars(_parser().parse_args(argv))
    cli.set_up_logging()
    made = prepare(
        args["dataset"],
        args["videos"],
        args["annotations"],
        args["output"],
        Preprocessing.from_mapping(args),
        Making(args["workers"], True, args["seconds"], True, args["clips_per_shard"]),
        splits=args["splits"].split(",") if args["splits"] else None,
        official_sizes=not args["other_sizes"],
        beam=_beam(args["beam_options"]),
    )
    print(report(made))


if __name__ == "__main__":
    sys.exit(main())
