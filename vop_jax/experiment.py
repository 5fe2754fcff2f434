"""A config becomes a run: train, evaluate, export and params, each read top to bottom."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vop_jax import config as configs
from vop_jax import start, tensorfile
from vop_jax.clip.config import ClipConfig
from vop_jax.clip.weights import load_clip, save_clip
from vop_jax.data import sources
from vop_jax.data.packed import Packed
from vop_jax.data.pipeline import eval_videos, train_batches
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.training import evaluate as evaluation
from vop_jax.training import loop
from vop_jax.training.optimizer import learning_rate, make_optimizer
from vop_jax.training.step import TrainState, make_train_step
from vop_jax.training.writer import MetricWriter, read_metrics
from vop_jax.tuning import partition
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.prompts_file import load_prompts, save_prompts

SUMMARY_FILE = "summary.json"
PROMPTS_FILE = "prompts.safetensors"

# {"t2v": {"R@1": …, "MdR": …}, "v2t": …} and, of the demo's clips, {"accuracy": {…}}
Results = dict[str, dict[str, float]]


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or continues what `workdir` holds; evaluates, exports; returns the summary.

    Raises:
        UserError: the config or the input is wrong, or the workdir is another run's.
        NonFiniteLoss: training diverged.
        Interrupted: a signal; the same call continues.
    """
    with start.opened(config, workdir, _pretrain) as run:
        data = load_data(run)
        evaluate_params = _evaluator(run, data)
        steps = config.train.steps if run.state.trainable else 0
        first = int(run.state.step)

        with MetricWriter(workdir, first) as writer:

            def evaluate_at(state: TrainState, step: int) -> Results:
                results = evaluate_params(partition.merge(state.trainable, run.frozen))
                if _from_scalars(workdir, step) is None:
                    writer.write_scalars(step, _to_scalars(results))
                logging.info("step %d\n%s", step, format_results(results))
                return results

            before = _from_scalars(workdir, 0) or evaluate_at(run.state, 0)
            if first < steps:
                every = config.train.eval_every
                if every and first % every == 0 and _from_scalars(workdir, first) is None:
                    evaluate_at(run.state, first)  # it was due when the run was stopped
                logging.info("training %s, steps %d to %d", run.method.name, first + 1, steps)
                optimizer = make_optimizer(config.train)
                run.state = loop.fit(
                    jax.jit(make_train_step(run.model, optimizer), donate_argnums=0),
                    run.state,
                    run.frozen,
                    data.train_batches(first),
                    mesh=run.mesh,
                    config=config.train,
                    checkpoints=run.checkpoints,
                    meta={"clip_fingerprint": run.clip.fingerprint, "clip_name": run.clip.name},
                    writer=writer,
                    schedule=learning_rate(config.train),
                    evaluate=evaluate_at,
                )
            after = evaluate_at(run.state, steps) if steps else before
        _save_prompts(run)
        return _write_summary(run, data, before, after)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates the workdir's newest checkpoint, or `init.prompts`; returns the summary.

    Raises:
        UserError: as `train`; also when there is nothing trained to evaluate.
    """
    with start.opened(config, workdir, _pretrain) as run:
        _check_trained(run)
        data = load_data(run)
        results = _evaluator(run, data)(run.params())
        logging.info("step %d\n%s", int(run.state.step), format_results(results))
        return _write_summary(run, data, _from_scalars(workdir, 0), results)


def export(config: ConfigDict, workdir: str) -> str:
    """Writes the workdir's newest prompts to `prompts.safetensors`; returns the path.

    Raises:
        UserError: as `train`; also when there is nothing trained to export.
    """
    with start.opened(config, workdir, _pretrain) as run:
        _check_trained(run)
        return _save_prompts(run)


def count_parameters(config: ConfigDict) -> dict[str, dict[str, float]]:
    """{method: {"trainable", "paper", "percent"}} at the config's CLIP size.

    `paper` and `percent` follow the paper's way of counting, see `tuning.methods`.
    """
    configs.validate(config)
    if config.init.clip:
        clip = load_clip(config.init.clip).config
    else:
        clip = start.preset(config, default="ViT-B/32")
    counts = {}
    for name in METHODS:
        method = dataclasses.replace(start.method_of(config), name=name)
        method.validate()
        method.check_fits(clip)
        true, paper = _count(clip, method)
        counts[name] = {"trainable": true, "paper": paper}
    whole = counts["full"]["paper"]
    return {name: {**c, "percent": 100 * c["paper"] / whole} for name, c in counts.items()}


def _count(clip: ClipConfig, method: MethodConfig) -> tuple[int, int]:
    """(trained parameters, those the paper's convention counts), from shapes alone."""
    params = tensorfile.unflatten(TextVideoModel(clip, method).shapes())
    trainable, _ = partition.split(params, method.trainable_patterns(clip))
    return partition.count(trainable), partition.count(trainable, method.parts.paper_factors)


def _pretrain(config: ConfigDict, root: epath.Path) -> None:
    """Trains the demo's CLIP on rendered stills, in a run of its own, into the workdir."""
    inner, workdir = pretrain_config(config), root / "pretrain"
    logging.info("pre-training a CLIP (%s) on still frames", config.clip.arch)
    train(inner, str(workdir))
    trained = load_prompts(workdir / PROMPTS_FILE)  # all of CLIP: the method is `full`
    save_clip(
        root / start.CLIP_FILE,
        trained.params["clip"],
        trained.clip_config,
        source=f"{config.pretrain.steps} steps on rendered stills",
        source_sha256="",
    )


def pretrain_config(config: ConfigDict) -> ConfigDict:
    """The run that makes the demo's CLIP: method `full`, one frame a clip, `pretrain`'s recipe."""
    inner = config.copy_and_resolve_references()
    with inner.unlocked():
        inner.train.update(config.pretrain)
        inner.train.eval_every = 0
        inner.method.name = "full"
        inner.data.update(kind="stills", frames=1, stored_fps=0.0, sampling="uniform")
        inner.data.update(videos="", records="")  # its own, in its workdir
        inner.pretrain.steps = 0
    return inner


@dataclasses.dataclass(frozen=True)
class Data:
    """The two splits of a run, ready to be read.

    Attributes:
        train_batches: start step -> this process's rows of that batch and all after it.
        num_texts, num_videos: both sides of the evaluation, misses included.
        cut_captions: captions of both splits that were longer than the slots.
    """

    packed: Packed
    eval_set: evaluation.EvalSet
    train_batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    num_texts: int
    num_videos: int
    cut_captions: int


def load_data(run: start.Run) -> Data:
    """Packs the videos once and tokenizes their captions."""
    config, clip = run.config, run.clip.config
    packed = sources.load(config.data, str(run.workdir))
    train_split = packed.splits[config.data.train_split]
    test = packed.splits[config.data.eval_split]
    tokenize = sources.CaptionTokenizer(run.method.text_slots(clip))
    texts = [c for captions in test.captions for c in captions]
    ids, cut = tokenize.with_cuts(texts)
    _, cut_in_train = tokenize.with_cuts([c for captions in train_split.captions for c in captions])
    missed = test.skipped if config.eval.missing == "miss" else []
    missed_texts = sum(len(clip.captions) for clip in missed)
    shared = {
        "image_size": clip.image_size,
        "frames": config.data.frames,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "threads": config.data.threads,
    }
    data = Data(
        packed=packed,
        eval_set=evaluation.EvalSet(
            videos=partial(eval_videos, test, batch_size=config.eval.batch_size, **shared),
            ids=ids,
            video_of_text=np.repeat(np.arange(len(test)), [len(c) for c in test.captions]),
            contrasts={
                name: tokenize(turned)
                for name, turned in sources.contrasts(config.data.kind, texts).items()
            },
            missed_texts=missed_texts,
            missed_videos=len(missed),
        ),
        train_batches=lambda first: train_batches(
            train_split,
            tokenize,
            batch_size=config.train.batch_size,
            sampling=config.data.sampling,
            augment=config.data.augment,
            scale=tuple(config.data.crop_scale),
            flip=config.data.flip,
            seed=config.seed,
            start_step=first,
            workers=config.data.workers,
            **shared,
        ),
        num_texts=len(ids) + missed_texts,
        num_videos=len(test) + len(missed),
        cut_captions=int(cut.sum() + cut_in_train.sum()),
    )
    _report_data(run, data)
    return data


def _report_data(run: start.Run, data: Data) -> None:
    for name, split in data.packed.splits.items():
        captions = sum(len(c) for c in split.captions)
        logging.info("%s: %d videos, %d captions", name, len(split), captions)
    for skipped in data.packed.skipped:
        logging.warning("skipped %s (%s): %s", skipped["path"], skipped["split"], skipped["reason"])
    if data.cut_captions:
        slots = run.method.text_slots(run.clip.config)
        logging.warning("%d captions cut to %d token slots, EOT kept", data.cut_captions, slots)


def _evaluator(run: start.Run, data: Data) -> Callable[[Any], Results]:
    encoders = evaluation.make_encoders(run.model, run.mesh)
    batch_size = run.config.eval.batch_size
    return lambda params: evaluation.evaluate(encoders, params, run.mesh, data.eval_set, batch_size)


def _check_trained(run: start.Run) -> None:
    trained = run.checkpoints.latest_step() is not None or run.config.init.prompts
    if not trained and run.state.trainable:
        raise UserError(
            f"--workdir={run.workdir}: no checkpoint; train first, or set config.init.prompts"
        )


def _save_prompts(run: start.Run) -> str:
    path = run.workdir / PROMPTS_FILE
    data = run.config.data
    save_prompts(
        path,
        run.state.trainable,
        method=run.method,
        clip_fingerprint=run.clip.fingerprint,
        clip_name=run.clip.name,
        clip_config=run.clip.config,
        video={key: data[key] for key in ("frames", "short_side", "stored_fps")},
    )
    logging.info("wrote %s", path)
    return str(path)


def _write_summary(
    run: start.Run, data: Data, before: Results | None, after: Results
) -> dict[str, Any]:
    true, paper = _count(run.clip.config, run.method)
    speeds = [
        line["videos_per_second"]
        for line in read_metrics(run.workdir)
        if "videos_per_second" in line
    ]
    summary = {
        "method": run.method.name,
        "steps": int(run.state.step),
        "trainable_params": true,
        "paper_params": paper,
        **after,
        "before": before,
        "num_texts": data.num_texts,
        "num_videos": data.num_videos,
        "eval_split": run.config.data.eval_split,
        "missing_videos_count_as": run.config.eval.missing,
        "videos_per_second": float(np.median(speeds)) if speeds else None,
        "skipped_videos": data.packed.skipped,
        "cut_captions": data.cut_captions,
        "clip": run.clip.name,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    tensorfile.write_json(run.workdir / SUMMARY_FILE, summary)
    return summary


def _to_scalars(results: Results) -> dict[str, float]:
    return {f"{side}/{name}": v for side, values in results.items() for name, v in values.items()}


def _from_scalars(workdir: str, step: int) -> Results | None:
    """The evaluation that an earlier start of this run logged at `step`, if any."""
    for line in read_metrics(workdir):
        if line["step"] == step and any("/" in key for key in line):
            results: Results = {}
            for key, value in line.items():
                if "/" in key:
                    side, name = key.split("/", 1)
                    results.setdefault(side, {})[name] = value
            return results
    return None


def format_results(results: Results) -> str:
    """A table for people: one row a direction, one of accuracies."""
    names = list(results["t2v"])
    rows = ["     " + "".join(f"{name:>8}" for name in names)]
    rows += [
        f"{side:<5}" + "".join(f"{results[side][name]:8.1f}" for name in names)
        for side in ("t2v", "v2t")
    ]
    if "accuracy" in results:
        rows.append("     " + format_accuracy(results["accuracy"]))
    return "\n".join(rows)


def format_accuracy(accuracy: dict[str, float]) -> str:
    """direction 51.0 %, speed 60.4 % told from its opposite."""
    parts = ", ".join(f"{name} {percent:.1f} %" for name, percent in accuracy.items())
    return f"{parts} told from its opposite"
