"""A config becomes a run: train and evaluate, each read top to bottom."""

import dataclasses
from functools import partial
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vop_jax.clip.weights import save_clip
from vop_jax.errors import UserError
from vop_jax.evaluation import evaluate as evaluation
from vop_jax.experiment import inputs, results, setup
from vop_jax.experiment.export import PROMPTS_FILE, Selection, log_limits, save_result
from vop_jax.training import hosts, loop
from vop_jax.training.compile import CompiledStep
from vop_jax.training.step import make_optimizer, make_train_step
from vop_jax.training.writer import MetricWriter, NoWriter, Writer
from vop_jax.tuning.partition import merge
from vop_jax.tuning.prompt_set import load_prompts


def train(
    config: ConfigDict, workdir: str, writer: Writer | None = None, extend: bool = False
) -> dict[str, Any]:
    """Trains, or continues what `workdir` holds; evaluates, exports; returns the summary.

    Args:
        writer: given the scalars in place of TensorBoard.
        extend: whether a run of fewer steps may go on to `config.train.steps`. Its parameters and
            optimizer state are continued, by the schedule of the new number.

    Raises:
        UserError: the config or the input is wrong, or the workdir is another run's.
        NonFiniteLoss: training diverged.
        Interrupted: a signal; the same call continues.
    """
    with setup.opened(config, workdir, _pretrain, extend) as run:
        # ---- What is trained, and on what.
        steps, first = config.train.steps if run.state.trainable else 0, int(run.state.step)
        if steps:
            log_limits(run)
        data = inputs.load_data(run, training=bool(steps))
        selection = Selection(run)
        if not first:
            selection.reset()

        with _metrics_of(run, data, writer) as metrics:
            evaluations = _Evaluations(run, data, selection, metrics)
            during, found = selection.prefix, None

            # ---- Before. A run that is continued starts from there again if it has to.
            before = evaluations.logged(0)
            if before is None:
                initial = run.initial() if first else run.state.trainable
                found = evaluations.at(0, initial)
                before = found.results

            # ---- Training. A run that was stopped before an evaluation makes up for it.
            if first < steps:
                due = config.train.eval_every and first and first % config.train.eval_every == 0
                if due and evaluations.logged(first, during) is None:
                    evaluations.at(first, run.state.trainable, during)
                _fit(run, data, metrics, evaluations, during)
            if steps and during and evaluations.logged(steps, during) is None:
                evaluations.at(steps, run.state.trainable, during)

            # ---- After.
            if steps or found is None:
                found = evaluations.at(steps, selection.trainable())
        save_result(run, selection.trainable(), PROMPTS_FILE)
        chosen = selection.chosen()
        return hosts.on_first(lambda: results.write_summary(run, data, before, found, chosen))


@dataclasses.dataclass(frozen=True)
class _Evaluations:
    """A run's evaluations, each logged once a step; those of a selection's split choose."""

    run: setup.Run
    data: inputs.Data
    selection: Selection
    metrics: NoWriter

    def logged(self, step: int, prefix: str = "") -> results.Results | None:
        """What an earlier start of this run has logged."""
        workdir, of = self.run.workdir, self._split(prefix).fingerprint
        return hosts.on_first(lambda: results.logged_results(workdir, step, of, prefix))

    def at(self, step: int, trainable: Any, prefix: str = "") -> evaluation.Evaluation:
        """Evaluates these parameters, those of `step`."""
        split, of = self._split(prefix), prefix and f" on the {prefix[:-1]} split"
        logging.info("evaluating step %d%s", step, of)
        found = _evaluate(self.run, split, merge(trainable, self.run.frozen))
        if prefix:
            self.selection.consider(trainable, step, found.results)
        if self.logged(step, prefix) is None:
            scalars = results.to_scalars(found.results, prefix)
            self.metrics.write_scalars(step, scalars, split.fingerprint)
        logging.info("step %d%s\n%s", step, of, results.format_results(found.results))
        return found

    def _split(self, prefix: str) -> evaluation.EvalSet:
        split = self.data.val_set if prefix else self.data.eval_set
        assert split is not None  # `prefix` is set where there is one
        return split


def _metrics_of(run: setup.Run, data: inputs.Data, writer: Writer | None) -> NoWriter:
    if not hosts.is_first():
        return NoWriter()
    splits = [split.fingerprint for split in (data.eval_set, data.val_set) if split]
    return MetricWriter(run.workdir, int(run.state.step), writer, splits)


def _fit(
    run: setup.Run, data: inputs.Data, metrics: NoWriter, evaluations: _Evaluations, prefix: str
) -> None:
    """The steps from the run's state to the last; changes the state."""
    config, first, steps = run.config, int(run.state.step), run.config.train.steps
    phase = "2 of 2: " if setup.pretrains(config) else ""
    logging.info("%straining %s, steps %d to %d", phase, run.method.name, first + 1, steps)
    extended_at = run.meta.get("extended_at", [])
    if run.meta.get("steps", steps) != steps:
        logging.info("a run of %d steps, extended: the schedule of %d", run.meta["steps"], steps)
        extended_at = [*extended_at, first]
    run.meta = {
        "clip_fingerprint": run.clip.fingerprint,
        "clip_name": run.clip.name,
        "learnt_from": data.learnt_from,
        "steps": steps,
        "extended_at": extended_at,
    }
    optimizer, parts = make_optimizer(config.train), config.train.microbatches
    train_step = make_train_step(run.model, optimizer, run.mesh, parts)
    dtype, left = config.compute.dtype, steps - first
    step_fn: loop.Step = CompiledStep(train_step, run.mesh, data.text_widths, left, dtype)
    if data.cache:
        step_fn = inputs.filled(run, data.cache).wrap_step(step_fn)
    run.state = loop.fit(
        step_fn,
        run.state,
        run.frozen,
        data.train_batches(first),
        mesh=run.mesh,
        config=config.train,
        checkpoints=run.checkpoints,
        meta=run.meta,
        writer=metrics,
        evaluate=lambda state, step: evaluations.at(step, state.trainable, prefix),
    )


def evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates the workdir's newest checkpoint, or `init.prompts`; returns the summary.

    Raises:
        UserError: as `train`; also when there is nothing trained to evaluate.
    """
    with setup.opened(config, workdir) as run:
        setup.check_trained(run)
        data = inputs.load_data(run, training=False)
        selection = Selection(run)
        params = merge(selection.trainable(), run.frozen)
        found = _evaluate(run, data.eval_set, params)
        logging.info("step %d\n%s", int(run.state.step), results.format_results(found.results))
        before = results.logged_results(workdir, 0, data.eval_set.fingerprint)
        chosen = selection.chosen()
        return hosts.on_first(lambda: results.write_summary(run, data, before, found, chosen))


def _pretrain(config: ConfigDict, root: epath.Path) -> None:
    """Trains the demo's CLIP on rendered stills, in a run of its own, into the workdir."""
    if "://" in str(root):  # where the records of the stills cannot be made
        raise UserError(
            f"--workdir={root}: a CLIP is pre-trained on a disk only; use a --workdir there, or "
            "set config.init.clip"
        )
    inner, workdir = pretrain_config(config), root / "pretrain"
    logging.info("1 of 2: pre-training a CLIP (%s) on stills", config.clip.arch)
    train(inner, str(workdir))
    trained = load_prompts(workdir / PROMPTS_FILE)  # all of CLIP: the method is `full`
    save = partial(
        save_clip,
        root / setup.CLIP_FILE,
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


def _evaluate(run: setup.Run, split: evaluation.EvalSet, params: Any) -> evaluation.Evaluation:
    batch_size = run.config.eval.batch_size
    return evaluation.evaluate(run.encoders, params, run.mesh, split, batch_size)
