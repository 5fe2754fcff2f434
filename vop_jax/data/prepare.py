"""Decodes the videos of a dataset into records.

    vop prepare --dataset=msrvtt9k --videos=VIDEOS \\
        --annotations=ANNOTATIONS --output=records/msrvtt9k

Stop it at any time: the same command continues. A clip whose decoder crashes or hangs is
skipped and reported. `vop check` describes the result.
"""

import argparse
import dataclasses
import difflib
import functools
import os
import shutil
import sys
from collections.abc import Sequence

from absl import logging
from etils import epath

from vop_jax import cli
from vop_jax.cli import Parser, number, whole
from vop_jax.data.clips import VideoClip
from vop_jax.data.datasets import registry
from vop_jax.data.records import read
from vop_jax.data.records.encode import Encoded, Preprocessing
from vop_jax.data.records.layout import find_records, label_of
from vop_jax.data.records.write import WriteOptions, encode_clips, pack
from vop_jax.errors import UserError
from vop_jax.storage.files import is_remote
from vop_jax.video.sampling import SAMPLINGS

PROBED = 8  # clips encoded to estimate the size


def prepare(
    kind: str,
    videos: str,
    annotations: str,
    output: str,
    preprocessing: Preprocessing,
    options: WriteOptions,
    *,
    splits: Sequence[str] | None = None,
    official_sizes: bool = True,
) -> read.Records:
    """Writes the records of a dataset, or completes them.

    Raises:
        UserError: the files are not those of the dataset.
        OSError: the disk is full; the next call continues.
    """
    source = registry.get(kind)
    dataset, notes = source.read(annotations, videos, splits=splits, official_sizes=official_sizes)
    for note in notes:
        logging.warning("%s", note)
    for split, clips in dataset.items():
        captions = sum(len(clip.captions) for clip in clips)
        logging.info("%s %s: %d videos, %d captions", kind, split, len(clips), captions)
    if is_remote(output):
        raise UserError(f"--output={output}: a folder of this machine is needed; copy it then")
    root = epath.Path(output)
    if find_records(root) is None:
        root.mkdir(parents=True, exist_ok=True)
        every = [clip for clips in dataset.values() for clip in clips]
        _log_size(every, root, preprocessing, options)
    return pack(
        dataset,
        root,
        preprocessing,
        name=source.records_name,
        max_skipped=1.0,
        options=options,
        retry=True,
        wait=False,
    )


def _log_size(
    clips: list[VideoClip], root: epath.Path, preprocessing: Preprocessing, options: WriteOptions
) -> None:
    """Logs how much disk all clips will take, estimated from a few of them."""
    probed = clips[:: max(1, len(clips) // PROBED)][:PROBED]
    workers = min(options.workers or os.cpu_count() or 1, len(probed))
    probing = dataclasses.replace(options, workers=workers)
    results = list(encode_clips(probed, preprocessing, probing))
    sizes = [sum(map(len, result.jpegs)) for result in results if isinstance(result, Encoded)]
    if not sizes:
        logging.warning("none of %d clips tried could be read: %s", len(probed), results[0])
        return
    needed, free = len(clips) * sum(sizes) / len(sizes), shutil.disk_usage(root).free
    logging.info("about %s of records, %s free in %s", _bytes(needed), _bytes(free), root)
    if needed > free:
        logging.warning("the disk will be full before the end; finished shards are kept")


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def report(records: read.Records) -> str:
    """A summary of the records, a line for each split."""
    lines = []
    for split in records.splits.values():
        captions = sum(map(len, split.captions))
        line = f"{split.name}: {len(split)} of {len(split.rows)} videos, {captions} captions"
        lines.append(line)
    if records.skipped:
        first = records.skipped[0]
        lines.append(
            f"left out {len(records.skipped)}, first {label_of(first)} ({first['reason']}); "
            "the same command tries those again whose files have changed"
        )
    return "\n".join(lines)


def _parser(kinds: list[str]) -> argparse.ArgumentParser:
    stored, options, path = Preprocessing(), WriteOptions(), os.path.expanduser
    parser = Parser(prog="vop prepare", description=__doc__)
    add = parser.add_argument
    kind = functools.partial(_kind, kinds)
    add("--dataset", required=True, type=kind, help=", ".join(kinds))
    add("--videos", required=True, type=path, help="folder of videos or of frame folders")
    add(
        "--annotations", required=True, type=path, help="folder of the official files, or your file"
    )
    add("--output", required=True, type=path, help="folder of the records: config.data.records")
    add("--splits", help="only these: test or train,test")
    add("--other_sizes", action="store_true", help="accept splits of other than the official sizes")
    add = parser.add_argument_group("how clips are stored, config.data's keys").add_argument
    add("--frames", type=whole(1), default=stored.frames)
    add("--sampling", choices=SAMPLINGS, default=stored.sampling)
    add("--stored_fps", type=number(0), default=stored.stored_fps)
    add("--short_side", type=whole(1), default=stored.short_side)
    add("--jpeg_quality", type=whole(1, 100), default=stored.jpeg_quality)
    add("--short_clips", choices=("skip", "repeat"), default=stored.short_clips)
    add("--folder_fps", type=number(0), default=stored.folder_fps)
    add = parser.add_argument_group("how the work is done").add_argument
    add("--workers", type=whole(1), default=options.workers, help="default: one for each core")
    add("--seconds", type=number(0), default=options.seconds, help="time limit to decode a clip")
    add("--clips_per_shard", type=whole(1), default=options.clips_per_shard, help="clips in a file")
    add("--beam_options", help="options of Apache Beam, quoted: --runner=DirectRunner …")
    return parser


def _kind(kinds: list[str], text: str) -> str:
    if text in kinds:
        return text
    if (base := text.removesuffix("64")) in kinds:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a config; its records are --dataset={base} --frames=64"
        )
    close = difflib.get_close_matches(text, kinds, n=1)
    hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(kinds)}"
    raise argparse.ArgumentTypeError(f"no dataset {text!r}; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.run(lambda: _run(argv), resumes=True)


def _run(argv: Sequence[str] | None) -> None:
    kinds = [kind for kind in registry.kinds() if not registry.get(kind).rendered]
    args = _parser(kinds).parse_args(argv)
    cli.set_up_logging()
    options = WriteOptions(
        workers=args.workers,
        seconds=args.seconds,
        clips_per_shard=args.clips_per_shard,
        beam=cli.beam_options(args.beam_options),
    )
    records = prepare(
        args.dataset,
        args.videos,
        args.annotations,
        args.output,
        Preprocessing.from_mapping(vars(args)),
        options,
        splits=args.splits.split(",") if args.splits else None,
        official_sizes=not args.other_sizes,
    )
    print(report(records))


if __name__ == "__main__":
    sys.exit(main())
