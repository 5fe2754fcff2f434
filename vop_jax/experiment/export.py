"""The result of a run: which parameters it is, and the formats they are written in."""

import json
from collections.abc import Callable
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from vop_jax.clip.convert import vop_checkpoint
from vop_jax.clip.weights import cast_frozen
from vop_jax.errors import UserError
from vop_jax.experiment import setup
from vop_jax.inference import stablehlo
from vop_jax.model import TextVideoModel
from vop_jax.storage import files, hub
from vop_jax.storage.tensors import flatten, unflatten
from vop_jax.training import hosts, sharding
from vop_jax.tuning.prompt_set import (
    VIDEO_KEYS,
    PromptSet,
    check_released,
    load_prompts,
    save_prompts,
)

BEST_FILE, BEST_NOTE = "best.safetensors", "best.json"


class Selection:
    """With `train.select=best`, the best parameters so far, kept in the workdir.

    Attributes:
        active: whether anything is selected; otherwise the newest step is the result.
        best: {"split", "step", "score"} of the best so far, if any.
    """

    def __init__(self, run: setup.Run):
        self._run, self._note = run, run.workdir / BEST_NOTE
        self.active = run.config.train.select == "best"
        self.best: dict[str, Any] | None = None
        # In a run without progress the note is an abandoned attempt's.
        if self.active and int(run.state.step):
            self.best = hosts.on_first(self._read_note)

    def _read_note(self) -> dict[str, Any] | None:
        if not self._note.exists():
            return None
        try:
            note = json.loads(self._note.read_bytes())
            return {key: note[key] for key in ("split", "step", "score")}
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{self._note}: damaged; delete {BEST_NOTE} and {BEST_FILE} to go on without the "
                "best step so far"
            ) from None

    def reset(self) -> None:
        """Removes what an abandoned attempt selected."""

        def remove() -> None:
            for name in (BEST_NOTE, BEST_FILE):
                (self._run.workdir / name).unlink(missing_ok=True)

        hosts.on_first(remove)

    def consider(self, trainable: Any, step: int, results: dict[str, dict[str, float]]) -> None:
        """Keeps these parameters if they are better than all earlier ones; of equals, the first."""
        score = (results["t2v"]["R@1"] + results["v2t"]["R@1"]) / 2
        best = self.best
        # The same step comes again if the run stopped between this and its next checkpoint.
        if best is not None and score <= best["score"] and step != best["step"]:
            return
        save_result(self._run, trainable, BEST_FILE)
        note = {"split": self._run.config.data.val_split, "step": step, "score": score}
        hosts.on_first(lambda: files.write_json(self._note, note))
        self.best = note
        logging.info("best on %s so far: step %d, mean R@1 %.1f", note["split"], step, score)

    def trainable(self) -> Any:
        """The selected parameters, or those of the newest step."""
        if self.best is None:
            return self._run.state.trainable
        return load_prompts(self._run.workdir / BEST_FILE).params


def prompt_set(run: setup.Run, trainable: Any) -> PromptSet:
    """Trained parameters on this host, with what is needed to use them; a call of all processes."""
    data = run.config.data
    return PromptSet(
        params=sharding.to_host(trainable),
        method=run.method,
        clip_fingerprint=run.clip.fingerprint,
        clip_name=run.clip.name,
        clip_config=run.clip.config,
        video={key: data[key] for key in VIDEO_KEYS},
    )


def save_result(run: setup.Run, trainable: Any, name: str) -> str:
    """Writes trained parameters with what is needed to use them; returns the path."""
    path, prompts = run.workdir / name, prompt_set(run, trainable)
    hosts.on_first(lambda: save_prompts(path, prompts))
    logging.info("wrote %s", path)
    return str(path)


# ---- Formats

PROMPTS_FOLDER = "prompts.orbax"
RELEASED_FILE, ENCODERS_FOLDER = "vop.pt", "encoders"


def check(form: str) -> None:
    """Raises UserError for an unknown format, or one whose library is not installed."""
    if form not in FORMATS:
        raise UserError(f"--format={form}: allowed are {', '.join(FORMATS)}")
    if form == "pytorch":
        vop_checkpoint.import_torch("--format=pytorch")
    elif form == "stablehlo":
        stablehlo.check_installed()


def log_limits(run: setup.Run) -> None:
    """Logs, before training, that the result cannot be exported to PyTorch, if so."""
    if not run.method.parts.prompts:  # nobody expects baselines in the layout of VoP's authors
        return
    try:
        check_released(run.method, run.clip.config)
    except UserError as error:
        logging.info("this run cannot be exported with %s; see docs/guides/export.md", error)


def _safetensors(run: setup.Run, trainable: Any) -> str:
    return save_result(run, trainable, hub.PROMPTS_FILE)


def _orbax(run: setup.Run, trainable: Any) -> str:
    if not trainable:
        raise UserError(f"--format=orbax: method {run.method.name} trains nothing to be written")
    return save_result(run, trainable, PROMPTS_FOLDER)


def _pytorch(run: setup.Run, trainable: Any) -> str:
    check_released(run.method, run.clip.config)
    prompts, path = prompt_set(run, trainable).params["prompts"], run.workdir / RELEASED_FILE

    def write() -> None:
        vop_checkpoint.save(path, vop_checkpoint.join(run.clip.params, run.clip.config, prompts))

    hosts.on_first(write)
    return str(path)


def _stablehlo(run: setup.Run, trainable: Any) -> str:
    prompts, path = prompt_set(run, trainable), run.workdir / ENCODERS_FOLDER
    # As `vop_jax.load` runs them: without the kernel and the remat of training.
    model = TextVideoModel(run.clip.config, run.method, run.model.dtype)
    clip = cast_frozen({"clip": run.clip.params}, run.model.dtype)
    params = unflatten({**flatten(clip), **flatten(prompts.params)})
    about = {
        "method": run.method.name,
        "clip": run.clip.name,
        "clip_fingerprint": run.clip.fingerprint,
        "prompts_fingerprint": prompts.fingerprint,
        "video": prompts.video,
    }
    hosts.on_first(lambda: stablehlo.save_encoders(path, model, params, about))
    return str(path)


FORMATS: dict[str, Callable[[setup.Run, Any], str]] = {
    "safetensors": _safetensors,
    "orbax": _orbax,
    "pytorch": _pytorch,
    "stablehlo": _stablehlo,
}


def export(config: ConfigDict, workdir: str, form: str = "safetensors") -> str:
    """Writes the workdir's result in a format; returns the path.

    Args:
        form: one of `FORMATS`.

    Raises:
        UserError: as `train`; also when there is nothing trained to export, or the format cannot
            hold it.
    """
    check(form)
    with setup.open_run(config, workdir) as run:
        return FORMATS[form](run, Selection(run).trainable())
