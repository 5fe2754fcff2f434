"""Converts CLIP weights from PyTorch's formats to the file that vop_jax reads.

vop convert --source=FILE_OR_NAME --output=clip.safetensors
vop convert --verify=clip.safetensors

Sources: OpenAI's TorchScript archives, by file or name (ViT-B/32, ViT-B/16, ViT-L/14,
ViT-L/14@336px: downloaded and checked); PyTorch state dicts and safetensors in the layout of
OpenAI, open_clip or Hugging Face, in one file or by the index of its shards; the released
VoP_msrvtt9k.pth, which also holds prompts. hf://OWNER/NAME[@REV][/FILE] is a file of the Hub.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Conversion needs no accelerator, and must not occupy one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from safetensors import SafetensorError

from vop_jax import cli
from vop_jax.clip.convert import download
from vop_jax.clip.convert.pytorch import ConvertedClip, convert
from vop_jax.clip.layers import ACTIVATIONS
from vop_jax.clip.weights import ClipWeights, load_clip, save_clip
from vop_jax.errors import UserError
from vop_jax.storage import hub, tensors
from vop_jax.tuning.prompt_set import PromptSet, released_method, save_prompts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: a flag is unknown or missing, or its value is not allowed.
    """
    parser = cli.Parser(prog="vop convert", description=__doc__)
    add = parser.add_argument
    unstated = "of the source, if no file beside it states this"
    add("--source", metavar="FILE_OR_NAME", help="what to convert")
    add("--output", metavar="FILE", help="the converted CLIP, safetensors")
    add("--prompts-output", metavar="FILE", help="the prompts of a released VoP checkpoint")
    add("--activation", choices=ACTIVATIONS, help=unstated)
    add("--vision-heads", type=cli.whole(1), metavar="N", help=unstated)
    add("--text-heads", type=cli.whole(1), metavar="N", help=unstated)
    add("--ema", action="store_true", help="convert the running average in the file")
    add("--verify", metavar="FILE", help="check a converted CLIP against its fingerprint")
    add("--cache", default=download.CACHE, metavar="DIR", help="for downloads; %(default)s")
    add("--base-url", default=download.BASE_URL, metavar="URL", help="a mirror of OpenAI's server")
    args = parser.parse_args(argv)
    others = ("source", "output", "prompts_output", "activation", "vision_heads", "text_heads")
    if args.verify and (args.ema or any(getattr(args, name) is not None for name in others)):
        raise UserError("--verify takes no other option")
    if not args.verify and not (args.source and args.output):
        raise UserError("--source and --output are required, or --verify")
    for flag, path in (("output", args.output), ("prompts-output", args.prompts_output)):
        if path is not None and (not path or os.path.isdir(path)):
            raise UserError(f"--{flag}={path}: is a directory, not a file to write")
    paths = [os.path.abspath(p) for p in (args.source, args.output, args.prompts_output) if p]
    if len(set(paths)) < len(paths):
        raise UserError("--source, --output and --prompts-output must be different files")
    return args


def run(args: argparse.Namespace) -> None:
    """Converts a checkpoint, writes its CLIP and prompts, and prints what it wrote."""
    if args.verify:
        print(f"{args.verify}: {load_clip(args.verify, verify=True).name}, as it was converted")
        return
    source: str | Path = args.source
    if args.source in download.PUBLISHED:
        source = download.fetch(args.source, args.cache, args.base_url)
    elif hub.is_name(args.source):
        source = hub.local_checkpoint(args.source)
    elif not os.path.exists(args.source) and "://" not in args.source:
        names = ", ".join(download.PUBLISHED)
        raise UserError(f"{args.source}: no such file; names that can be downloaded are {names}")
    heads = {"vision_heads": args.vision_heads, "text_heads": args.text_heads}
    converted = convert(source, activation=args.activation, **heads, ema=args.ema)
    if args.prompts_output and converted.prompts is None:
        raise UserError(f"--prompts-output={args.prompts_output}: {source} holds no prompts")
    for note in converted.notes:
        print(f"note: {note}")
    params, config = converted.params, converted.config
    name = args.source if hub.is_name(args.source) else Path(source).name
    digest = converted.sha256
    fingerprint = save_clip(args.output, params, config, source=name, source_sha256=digest)
    clip = ClipWeights(params, config, fingerprint, name)
    count = sum(leaf.size for leaf in tensors.flatten(params).values())
    print(f"{args.output}: {clip.name}, {config.activation}, {count:,} parameters")
    if converted.prompts is not None:
        _write_prompts(args.prompts_output, converted, clip)


def _write_prompts(path: str | None, converted: ConvertedClip, clip: ClipWeights) -> None:
    """Writes the prompts of a released checkpoint with their method, or notes that they exist."""
    assert converted.prompts is not None
    visual, text = converted.prompts["visual"].shape[1], converted.prompts["text"].shape[1]
    released = converted.released
    method = released_method(visual, text, released.text_prefix if released else None)
    if released is None:
        print(
            f"note: no configuration.json beside {clip.source} states the lengths of its text "
            "prompts; half of them are taken as prefix"
        )
    method.check_fits(clip.config)
    lengths = f"{visual} visual, {method.text_prefix} + {method.text_suffix} text prompts per layer"
    if not path:
        print(f"note: {clip.source} also holds {lengths}; --prompts-output=FILE writes them")
        return
    video = {"frames": released.frames} if released and released.frames else {}
    about = clip.fingerprint, clip.name, clip.config
    save_prompts(path, PromptSet({"prompts": converted.prompts}, method, *about, video))
    print(f"{path}: {lengths}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""

    def program() -> None:
        try:
            run(parse(argv))
        except SafetensorError as error:  # no such folder, or a full disk
            raise UserError(str(error)) from error

    return cli.run(program)


if __name__ == "__main__":
    sys.exit(main())
