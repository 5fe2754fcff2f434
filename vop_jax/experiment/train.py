"""Trains and evaluates: the stages of a run, read from top to bottom."""

from functools import partial
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vop_jax.clip.weights import save_clip
from vop_jax.config.base import profiled_steps
from vop_jax.errors import UserError
from vop_jax.evaluation.evaluate import EvalSet, Evaluation, evaluate_split
from vop_jax.experiment import inputs, results, setup
from vop_jax.experiment.export import Selection, log_limits, save_result
from vop_jax.storage import hub
from vop_jax.training import hosts, loop
from vop_jax.training.compile import CompiledStep
from vop_jax.training.profile import trace_steps
from vop_jax.training.step import make_optimizer, make_train_step
from vop_jax.training.trackers import open_trackers
from vop_jax.training.writer import MetricWriter, NoWriter, Writer
from vop_jax.tuning.partition import merge
from vop_jax.tuning.prompt_set import load_prompts

VALIDATION = "val_"  # prefix of metrics on the validation split


def train(
    config: ConfigDict, workdir: str, writer: Writer | None = None, extend: bool = False
) -> dict[str, Any]:
    """Trains a new run or continues the workdir's, evaluates, exports; returns the summary.

    Args:
        writer: receives the scalars in place of TensorBoard.
        extend: whether a run of fewer steps may continue to `config.train.steps`. Parameters and
            optimizer state are kept; the schedule is that of the new number of steps.

    Raises:
        UserError: the config or the input is wrong, or the workdir is another run's.
        NonFiniteLoss: training diverged.
        Interrupted: by a signal; the same call continues.
    """
    with setup.open_run(config, workdir, _pretrain, extend) as run:
        # ---- Data
        steps, first = config.train.steps if run.state.trainable else 0, int(run.state.step)
        if steps:
            log_limits(run)
        data = inputs.load_data(run, training=bool(steps))
        selection = Selection(run)
        if not first:
            selection.reset()

        with (
            open_trackers(run.config, run.workdir, first, writer) as writers,
            _open_metrics(run, data, writers) as metrics,
        ):
            # ---- Before training
            evaluations = Evaluations(run, data, selection, metrics)
            initial = run.initial() if first else run.state.trainable
            before = evaluations.logged(0) or evaluations.at(0, initial).results

            # ---- Training
            evaluations.run_due(first, run.state.trainable)  # a stop may have prevented it
            if first < steps:
                _fit(run, data.train, metrics, evaluations)
            evaluations.run_due(steps, run.state.trainable)

            # ---- After training
            after = evaluations.at(steps, selection.trainable())
            save_result(run, selection.trainable(), hub.PROMPTS_FILE)
            return hosts.on_first(
                lambda: results.write_summary(run, data, before, after, selection.best)
            )


def evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Evaluates the workdir's newest checkpoint, or `init.prompts`; returns the summary.

    Raises:
        UserError: as `train`; also when there is nothing trained to evaluate.
    """
    with setup.open_run(config, workdir) as run:
        data = inputs.load_data(run, training=False)
        selection = Selection(run)
        evaluations = Evaluations(run, data, selection, NoWriter())
        before = evaluations.logged(0)
        after = evaluations.at(int(run.state.step), selection.trainable())
        return hosts.on_first(
            lambda: results.write_summary(run, data, before, after, selection.best)
        )


class Evaluations:
    """The evaluation schedule of a run.

    Step 0 and the result are evaluated on the test split. In between, every `train.eval_every`
    steps, so are the current parameters; with `train.select=best` on the validation split instead,
    the last step included, and these evaluations choose the result.
    """

    def __init__(self, run: setup.Run, data: inputs.Data, selection: Selection, metrics: NoWriter):
        self._run, self._data, self._selection, self._metrics = run, data, selection, metrics
        self._prefix = VALIDATION if selection.active else ""
        self._finished: dict[tuple[int, str], Evaluation] = {}
        self._lines = hosts.on_first(lambda: results.read_evaluations(run.workdir))

    def run_due(self, step: int, trainable: Any) -> None:
        """Evaluates the parameters of a step between the first and the result, if it is due."""
        every, steps = self._run.config.train.eval_every, self._run.config.train.steps
        is_last = step == steps and self._selection.active
        is_between = bool(every) and step % every == 0 and step < steps
        if step and (is_last or is_between) and self.logged(step, self._prefix) is None:
            self.at(step, trainable, self._prefix)

    def logged(self, step: int, prefix: str = "") -> results.Results | None:
        """The results of a step that this run or an earlier start of it evaluated."""
        if (step, prefix) in self._finished:
            return self._finished[step, prefix].results
        fingerprint = self._split(prefix).fingerprint
        return results.logged_results(self._lines, step, fingerprint, prefix)

    def at(self, step: int, trainable: Any, prefix: str = "") -> Evaluation:
        """Evaluates the parameters of a step, once."""
        if (step, prefix) in self._finished:
            return self._finished[step, prefix]
        split, where = self._split(prefix), prefix and f" on the {prefix[:-1]} split"
        logging.info("evaluating step %d%s", step, where)
        run, params = self._run, merge(trainable, self._run.frozen)
        batch_size = run.config.eval.batch_size
        evaluation = evaluate_split(run.encoders, params, run.mesh, split, batch_size)
        if prefix:
            self._selection.consider(trainable, step, evaluation.results)
        if self.logged(step, prefix) is None:
            scalars = results.to_scalars(evaluation.results, prefix)
            self._metrics.write_scalars(step, scalars, split.fingerprint)
        self._finished[step, prefix] = evaluation
        logging.info("step %d%s\n%s", step, where, results.format_results(evaluation.results))
        return evaluation

    def _split(self, prefix: str) -> EvalSet:
        split = self._data.val_set if prefix else self._data.eval_set
        assert split is not None  # the prefix is set only where there is one
        return split


def _open_metrics(run: setup.Run, data: inputs.Data, writers: list[Writer]) -> NoWriter:
    if not hosts.is_first():
        return NoWriter()
    fingerprints = [split.fingerprint for split in (data.eval_set, data.val_set) if split]
    return MetricWriter(run.workdir, int(run.state.step), writers, fingerprints)


def _fit(
    run: setup.Run, train: inputs.TrainSet | None, metrics: NoWriter, evaluations: Evaluations
) -> None:
    """Runs the steps from the run's state to the last; changes the state."""
    assert train is not None  # there are steps
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
        "learnt_from": train.fingerprint,
        "steps": steps,
        "extended_at": extended_at,
        "microbatch": run.meta.get("microbatch"),
    }
    make_step = partial(make_train_step, run.model, make_optimizer(config.train), run.mesh)
    step_fn: loop.Step = CompiledStep(
        make_step,
        run.mesh,
        config.train.microbatches,
        run.meta,
        train.text_widths,
        steps - first,
        config.compute.dtype,
    )
    if train.cache:
        step_fn = inputs.fill_cache(run, train.split, train.cache.layout).wrap_step(step_fn)
    traced = profiled_steps(config) if hosts.is_first() else None
    with trace_steps(step_fn, first + 1, traced, run.workdir) as run_step:
        run.state = loop.fit(
            run_step,
            run.state,
            run.frozen,
            train.batches(first),
            mesh=run.mesh,
            config=config.train,
            checkpoints=run.checkpoints,
            meta=run.meta,
            writer=metrics,
            evaluate=lambda state, step: evaluations.run_due(step, state.trainable),
        )


# ---- The demo's own CLIP


def _pretrain(config: ConfigDict, root: epath.Path) -> None:
    """Trains a CLIP on rendered stills, in a run of its own, and writes it into the workdir."""
    if "://" in str(root):  # the stills can only be rendered to a disk
        raise UserError(
            f"--workdir={root}: a CLIP is pre-trained on a disk only; use a --workdir there, or "
            "set config.init.clip"
        )
    workdir = root / "pretrain"
    logging.info("1 of 2: pre-training a CLIP (%s) on stills", config.clip.arch)
    train(pretrain_config(config), str(workdir))
    trained = load_prompts(workdir / hub.PROMPTS_FILE)  # all of CLIP: the method is `full`
    save = partial(
        save_clip,
        root / hub.CLIP_FILE,
        trained.params["clip"],
        trained.clip_config,
        source=f"{config.pretrain.steps} steps on rendered stills",
        source_sha256="",
    )
    hosts.on_first(save)


def pretrain_config(config: ConfigDict) -> ConfigDict:
    """The config of the pre-training: method `full`, one frame a clip, the section `pretrain`."""
    inner = config.copy_and_resolve_references()
    with inner.unlocked():
        inner.train.update(config.pretrain)
        inner.train.update(eval_every=0, select="last", microbatches=0)
        inner.eval.extra = ()
        inner.log.update(to=("tensorboard",), profile=())
        inner.method.name = "full"
        inner.data.update(kind="stills", frames=1, stored_fps=0.0, sampling="uniform")
        inner.data.update(videos="", records="", train_split="train", eval_split="test")
        inner.data.val_share = 0.0
        inner.pretrain.steps = 0
    return inner
