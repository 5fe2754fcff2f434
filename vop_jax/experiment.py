"""A config becomes a run: train, evaluate, export and params, each read top to bottom."""

from functools import partial
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vop_jax import formats, results, run_cache, run_data, start
from vop_jax.clip.weights import save_clip
from vop_jax.errors import UserError
from vop_jax.formats import PROMPTS_FILE
from vop_jax.selection import Selection, save_result
from vop_jax.training import evaluate as evaluation
from vop_jax.training import hosts, loop
from vop_jax.training.compiled import CompiledStep
from vop_jax.training.optimizer import learning_rate, make_optimizer
from vop_jax.training.step import make_train_step
from vop_jax.training.writer import MetricWriter, NoWriter, Writer
from vop_jax.tuning import partition
from vop_jax.tuning.prompts_file import load_prompts


def train(config: ConfigDict, workdir: str, writer: Writer | None = None) -> dict[str, Any]:
    """Trains, or continues what `workdir` holds; evaluates, exports; returns the summary.

    Args:
        writer: given the scalars in place of TensorBoard.

    Raises:
        UserError: the config or the input is wrong, or the workdir is another run's.
        NonFiniteLoss: training diverged.
        Interrupted: a signal; the same call continues.
    """
    with start.opened(config, workdir, _pretrain) as run:
        steps = config.train.steps if run.state.trainable else 0
        if steps:
            formats.log_limits(run)
        data = run_data.load_data(run, training=bool(steps))
        selection = Selection(run)
        first = int(run.state.step)
        if not first:
            selection.reset()

        with MetricWriter(workdir, first, writer) if hosts.is_first() else NoWriter() as metrics:

            def logged(step: int, prefix: str = "") -> results.Results | None:
                return hosts.on_first(lambda: results.logged_results(workdir, step, prefix))

            def evaluate_at(trainable: Any, step: int, prefix: str = "") -> evaluation.Evaluation:
                split = data.val_set if prefix else data.eval_set
                assert split is not None  # `prefix` is set where there is one
                found = _evaluate(run, split, partition.merge(trainable, run.frozen))
                if prefix:
                    selection.consider(trainable, step, found.results)
                if logged(step, prefix) is None:
                    metrics.write_scalars(step, results.to_scalars(found.results, prefix))
                shown = results.format_results(found.results)
                logging.info("step %d%s\n%s", step, prefix and f", {prefix[:-1]} split", shown)
                return found

            during = results.VALIDATION if selection.active else ""
            found, before = None, logged(0)
            if before is None:
                found = evaluate_at(run.state.trainable, 0)
                before = found.results
            if first < steps:
                due = config.train.eval_every and first and first % config.train.eval_every == 0
                if due and logged(first, during) is None:
                    evaluate_at(run.state.trainable, first, during)  # before the run was stopped
                logging.info("training %s, steps %d to %d", run.method.name, first + 1, steps)
                optimizer, parts = make_optimizer(config.train), config.train.microbatches
                train_step = make_train_step(run.model, optimizer, run.mesh, parts)
                step_fn: loop.Step = CompiledStep(train_step, run.mesh, data.text_widths)
                if data.cache:
                    step_fn = run_cache.filled(run, data.cache).before(step_fn)
                run.state = loop.fit(
                    step_fn,
                    run.state,
                    run.frozen,
                    data.train_batches(first),
                    mesh=run.mesh,
                    config=config.train,
                    checkpoints=run.checkpoints,
                    meta={
                        "clip_fingerprint": run.clip.fingerprint,
                        "clip_name": run.clip.name,
                        "learnt_from": data.learnt_from,
                    },
                    writer=metrics,
                    schedule=learning_rate(config.train),
                    evaluate=lambda state, step: evaluate_at(state.trainable, step, during),
                )
            if steps and during and logged(steps, during) is None:
                evaluate_at(run.state.trainable, steps, during)
            if steps or found is None:
                found = evaluate_at(selection.trainable(), steps)
        save_result(run, selection.trainable(), PROMPTS_FILE)
        chosen = selection.chosen()
        return hosts.on_first(lambda: results.write_summary(run, data, before, found, chosen))


def evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates the workdir's newest checkpoint, or `init.prompts`; returns the summary.

    Raises:
        UserError: as `train`; also when there is nothing trained to evaluate.
    """
    with start.opened(config, workdir) as run:
        _check_trained(run)
        data = run_data.load_data(run, training=False)
        selection = Selection(run)
        params = partition.merge(selection.trainable(), run.frozen)
        found = _evaluate(run, data.eval_set, params)
        logging.info("step %d\n%s", int(run.state.step), results.format_results(found.results))
        before, chosen = results.logged_results(workdir, 0), selection.chosen()
        return hosts.on_first(lambda: results.write_summary(run, data, before, found, chosen))


def export(config: ConfigDict, workdir: str, form: str = "safetensors") -> str:
    """Writes the workdir's newest prompts, or what is made of them; returns the path.

    Args:
        form: one of `formats.FORMATS`.

    Raises:
        UserError: as `train`; also when there is nothing trained to export, or the format
            cannot say it.
    """
    formats.check(form)
    with start.opened(config, workdir) as run:
        _check_trained(run)
        return formats.save(run, Selection(run).trainable(), form)


def _pretrain(config: ConfigDict, root: epath.Path) -> None:
    """Trains the demo's CLIP on rendered stills, in a run of its own, into the workdir."""
    if "://" in str(root):  # where the records of the stills cannot be made
        raise UserError(
            f"--workdir={root}: a CLIP is pre-trained on a disk only; use a --workdir there, or "
            "set config.init.clip"
        )
    inner, workdir = pretrain_config(config), root / "pretrain"
    logging.info("pre-training a CLIP (%s) on still frames", config.clip.arch)
    train(inner, str(workdir))
    trained = load_prompts(workdir / PROMPTS_FILE)  # all of CLIP: the method is `full`
    save = partial(
        save_clip,
        root / start.CLIP_FILE,
        trained.params["clip"],
        trained.clip_config,
        source=f"{config.pretrain.steps} steps on rendered stills",
        source_sha256="",
    )
    hosts.on_first(save)


def pretrain_config(config: ConfigDict) -> ConfigDict:
    """The run that makes the demo's CLIP: method `full`, one frame a clip, `pretrain`'s recipe."""
    inner = config.copy_and_resolve_references()
    with inner.unlocked():
        inner.train.update(config.pretrain)
        inner.train.update(eval_every=0, select="last", microbatches=1)
        inner.eval.extra = ()
        inner.method.name = "full"
        inner.data.update(kind="stills", frames=1, stored_fps=0.0, sampling="uniform")
        # Its own, in its workdir.
        inner.data.update(videos="", records="", train_split="train", eval_split="test")
        inner.data.val_share = 0.0
        inner.pretrain.steps = 0
    return inner


def _evaluate(run: start.Run, split: evaluation.EvalSet, params: Any) -> evaluation.Evaluation:
    batch_size = run.config.eval.batch_size
    return evaluation.evaluate(run.encoders, params, run.mesh, split, batch_size)


def _check_trained(run: start.Run) -> None:
    trained = run.checkpoints.latest_step() is not None or run.config.init.prompts
    if not trained and run.state.trainable:
        raise UserError(
            f"--workdir={run.workdir}: no checkpoint; train first, or set config.init.prompts"
        )
