"""Publishes the results of a run on the Hugging Face Hub: prompts, config, summary, model card.

vop push WORKDIR OWNER/NAME
vop push WORKDIR OWNER/NAME --private --base-model=openai/clip-vit-base-patch32

The repository is made if there is none. A second push is a further commit; what you have written
in the card yourself stays. Afterwards hf://OWNER/NAME names the prompts wherever a file does.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from vop_jax import cli
from vop_jax.clip.convert import download
from vop_jax.config.base import CONFIG_FILE, SUMMARY_FILE
from vop_jax.errors import UserError
from vop_jax.report.runs import FinishedRun, read_run
from vop_jax.storage import hub
from vop_jax.tuning.prompt_set import PromptSet, load_prompts

# {file: (name for vop convert, repository)} of OpenAI's CLIPs.
SIZES = ("base-patch32", "base-patch16", "large-patch14", "large-patch14-336")
OPENAI = {
    file: (clip, f"openai/clip-vit-{size}")
    for size, (clip, (_, file)) in zip(SIZES, download.PUBLISHED.items(), strict=True)
}
SIDES = {"t2v": "text-to-video retrieval", "v2t": "video-to-text retrieval"}
# A push replaces what is between these lines of a card.
BEGIN, END = "<!-- vop push writes from here -->", "<!-- to here -->"


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="vop push", description=__doc__)
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="of a finished run")
    add("repository", metavar="OWNER/NAME", help="on the Hub")
    add("--private", action="store_true", help="if it is new, only its owner can read it")
    add("--base-model", metavar="OWNER/NAME", help="the CLIP on the Hub, if the run does not say")
    add("--dataset", metavar="OWNER/NAME", help="the dataset on the Hub, if it is there")
    return parser


def push(args: argparse.Namespace) -> str:
    """Uploads the results of a workdir in one commit; returns hf://OWNER/NAME@COMMIT.

    Raises:
        UserError: the workdir holds no finished run, or the Hub refuses.
    """
    run = read_run(args.workdir)
    root, name = epath.Path(args.workdir), f"{hub.SCHEME}{args.repository}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        raise UserError(f"{args.repository}: write OWNER/NAME")
    prompts = load_prompts(root / hub.PROMPTS_FILE)
    package = hub.import_hub("vop push")
    if package.get_token() is None:
        raise UserError(f"{name}: no token to write with; {hub.LOG_IN}")
    config = json.dumps(_without_folders(run.config), indent=2) + "\n"
    skipped = [{"id": video["id"]} for video in run.summary.get("skipped_videos", [])]
    summary = json.dumps(run.summary | {"skipped_videos": skipped}, indent=2) + "\n"
    files = {CONFIG_FILE: config.encode(), SUMMARY_FILE: summary.encode()}
    for file in (hub.PROMPTS_FILE, *([hub.CLIP_FILE] * _trained_clip(run))):
        files[file] = (root / file).read_bytes()
    api = package.HfApi()
    with hub.errors_of_hub(name):
        url = api.create_repo(args.repository, private=args.private or None, exist_ok=True)
        card = _card(package, args, run, prompts)
        files["README.md"] = _merge(package, card, args.repository).encode()
        operations = [package.CommitOperationAdd(file, data) for file, data in files.items()]
        message = f"Prompts of {run.method}, {run.summary['steps']} steps"
        commit = api.create_commit(args.repository, operations, commit_message=message)
    print(f"{url}: {', '.join(files)}")
    return f"{name}@{commit.oid}"


def _trained_clip(run: FinishedRun) -> bool:
    """Whether the run trained its CLIP, which then nobody else has."""
    return bool(run.config["pretrain"]["steps"]) and not run.config["init"]["clip"]


def _without_folders(value: Any) -> Any:
    """A config in which only the last part of each path is left: folders are private."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    is_path = isinstance(value, str) and (value.startswith(("/", ".", "~")) or "://" in value)
    if is_path and not hub.is_name(value):
        return os.path.basename(value.rstrip("/"))
    return value


# ---- The model card


def _origin(run: FinishedRun, prompts: PromptSet) -> str:
    """The hf:// name of the CLIP, or the name of the file that it was converted from."""
    source = prompts.clip_name.partition(" from ")[2].rpartition(" (")[0]
    clip = str(run.config["init"]["clip"])
    return clip if hub.is_name(clip) and not hub.is_name(source) else source


def _base_model(args: argparse.Namespace, origin: str) -> str | None:
    """The repository of the CLIP, if it is known."""
    if args.base_model or not hub.is_name(origin):
        return args.base_model or OPENAI.get(origin, ("", None))[1]
    return hub.parse(origin)[0]


def _card(package: Any, args: argparse.Namespace, run: FinishedRun, prompts: PromptSet) -> Any:
    """The `huggingface_hub.ModelCard` of a run."""
    summary = run.summary
    protocol, origin = summary.get("protocol"), _origin(run, prompts)
    kind = args.dataset or run.config["data"]["kind"]
    data = package.ModelCardData(
        library_name="vop_jax",
        pipeline_tag="feature-extraction",  # the Hub has no tag for retrieval
        tags=["text-video-retrieval", "prompt-tuning", "clip", run.method],
        base_model=_base_model(args, origin),
        datasets=[kind] if args.dataset or protocol else None,
        metrics=[_metric(name) for name in summary["t2v"]],
        model_name=args.repository.partition("/")[2],
        eval_results=[
            package.EvalResult(
                task_type=task.replace(" ", "-"),
                task_name=task,
                dataset_type=kind,
                dataset_name=protocol or kind,
                dataset_split=summary["eval_split"],
                metric_type=_metric(name),
                metric_name=name,
                metric_value=round(value, 4),
            )
            for side, task in SIDES.items()
            for name, value in summary[side].items()
        ],
    )
    text = _text(f"{hub.SCHEME}{args.repository}", run, prompts, origin)
    return package.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _metric(name: str) -> str:
    """R@1 -> recall_at_1, MdR -> median_rank."""
    ranks = {"MdR": "median_rank", "MnR": "mean_rank"}
    return ranks.get(name) or re.sub(r"^R@", "recall_at_", name)


def _text(name: str, run: FinishedRun, prompts: PromptSet, origin: str) -> str:
    """What people read: how to load the prompts of an hf:// name, and the results."""
    summary, clip = run.summary, run.config["init"]["clip"]
    clip = name if _trained_clip(run) else clip if hub.is_name(clip) else hub.CLIP_FILE
    note = f"The CLIP is {prompts.clip_name}."
    if clip == hub.CLIP_FILE and (hub.is_name(origin) or origin in OPENAI):
        source = OPENAI.get(origin, (origin, ""))[0]
        note += f" `vop convert --source={source} --output={clip}` makes its file."
    data = summary.get("protocol") or run.config["data"]["kind"]
    frames = prompts.video.get("frames", prompts.method.frames)
    return f"""{BEGIN}
# {name.rpartition("/")[2]}

Prompts of the method `{run.method}` of [VoP](https://arxiv.org/abs/2211.12764) for text-video
retrieval over a frozen CLIP: {summary["trainable_params"]:,} trained parameters,
{summary["steps"]:,} steps, {frames} frames a video.

```python
import vop_jax

retriever = vop_jax.load(clip="{clip}", prompts="{name}")
scores = retriever.embed_text(["a squid talks"]) @ retriever.embed_videos(["a.mp4", "b.mp4"]).T
```

{note} The extra `hub` of vop_jax reads `hf://` names.

Results on {data}, split `{summary["eval_split"]}`: {summary["num_texts"]:,} captions,
{summary["num_videos"]:,} videos. R@k is in percent; MdR and MnR are the median and the mean rank.

{_table(summary)}

`config.json` is the config of the run, without the folders of its files. `summary.json` is its
result.
{END}
"""


def _table(summary: dict[str, Any]) -> str:
    columns = list(summary["t2v"])
    rows = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for side, task in SIDES.items():
        before = (summary.get("before") or {}).get(side)
        for label, values in ((f"{task}, before tuning", before), (task, summary[side])):
            if values:
                cells = (f"{values[column]:.1f}" for column in columns)
                rows.append(f"| {' | '.join((label, *cells))} |")
    return "\n".join(rows)


def _merge(package: Any, card: Any, repository: str) -> str:
    """The card with what its owner added on the Hub: metadata, and text around ours."""
    try:
        existing = package.ModelCard.load(repository, ignore_metadata_errors=True)
    except package.errors.RemoteEntryNotFoundError:
        return str(card)
    metadata = {**existing.data.to_dict(), **card.data.to_dict()}
    metadata["tags"] = list(dict.fromkeys([*card.data.tags, *(existing.data.tags or [])]))
    text = existing.text if existing.text.strip() else card.text
    before, begin, rest = existing.text.partition(BEGIN)
    if begin and END in rest:
        text = before + card.text.strip() + rest.partition(END)[2]
    return str(package.ModelCard(f"---\n{package.CardData(**metadata).to_yaml()}\n---\n{text}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(lambda: print(push(_parser().parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
