"""A config becomes a run: train, evaluate, export and params, each read top to bottom."""

from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vop_jax import results, run_data, start
from vop_jax.clip.weights import save_clip
from vop_jax.errors import UserError
from vop_jax.training import evaluate as evaluation
from vop_jax.training import loop
from vop_jax.training.optimizer import learning_rate, make_optimizer
from vop_jax.training.step import TrainState, make_train_step
from vop_jax.training.writer import MetricWriter
from vop_jax.tuning import partition
from vop_jax.tuning.prompts_file import load_prompts, save_prompts

PROMPTS_FILE = "prompts.safetensors"


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, or continues what `workdir` holds; evaluates, exports; returns the summary.

    Raises:
        UserError: the config or the input is wrong, or the workdir is another run's.
        NonFiniteLoss: training diverged.
        Interrupted: a signal; the same call continues.
    """
    with start.opened(config, workdir, _pretrain) as run:
        data = run_data.load_data(run)
        evaluate_params = _evaluator(run, data)
        steps = config.train.steps if run.state.trainable else 0
        first = int(run.state.step)

        with MetricWriter(workdir, first) as writer:

            def evaluate_at(state: TrainState, step: int) -> evaluation.Evaluation:
                found = evaluate_params(partition.merge(state.trainable, run.frozen))
                if results.logged_results(workdir, step) is None:
                    writer.write_scalars(step, results.to_scalars(found.results))
                logging.info("step %d\n%s", step, results.format_results(found.results))
                return found

            found, before = None, results.logged_results(workdir, 0)
            if before is None:
                found = evaluate_at(run.state, 0)
                before = found.results
            if first < steps:
                every = config.train.eval_every
                if every and first % every == 0 and results.logged_results(workdir, first) is None:
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
            if steps or found is None:
                found = evaluate_at(run.state, steps)
        _save_prompts(run)
        return results.write_summary(run, data, before, found)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates the workdir's newest checkpoint, or `init.prompts`; returns the summary.

    Raises:
        UserError: as `train`; also when there is nothing trained to evaluate.
    """
    with start.opened(config, workdir, _pretrain) as run:
        _check_trained(run)
        data = run_data.load_data(run)
        found = _evaluator(run, data)(run.params())
        logging.info("step %d\n%s", int(run.state.step), results.format_results(found.results))
        return results.write_summary(run, data, results.logged_results(workdir, 0), found)


def export(config: ConfigDict, workdir: str) -> str:
    """Writes the workdir's newest prompts to `prompts.safetensors`; returns the path.

    Raises:
        UserError: as `train`; also when there is nothing trained to export.
    """
    with start.opened(config, workdir, _pretrain) as run:
        _check_trained(run)
        return _save_prompts(run)


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
        # Its own, in its workdir.
        inner.data.update(videos="", records="", train_split="train", eval_split="test")
        inner.pretrain.steps = 0
    return inner


def _evaluator(run: start.Run, data: run_data.Data) -> Callable[[Any], evaluation.Evaluation]:
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
        video={key: data[key] for key in ("frames", "sampling", "short_side", "stored_fps")},
    )
    logging.info("wrote %s", path)
    return str(path)
