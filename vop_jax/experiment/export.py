"""What a run has learnt, in each of the formats that a user may ask for."""

import dataclasses
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
from vop_jax.storage import files
from vop_jax.storage.tensors import flatten, unflatten
from vop_jax.training import hosts, sharding
from vop_jax.tuning.prompt_set import PromptSet, check_released, load_prompts, save_prompts

VALIDATION = "val_"  # begins the names of what is measured on the validation split
BEST_FILE, BEST_NOTE = "best.safetensors", "best.json"

HOW_VIDEOS_ARE_READ = ("frames", "sampling", "short_side", "stored_fps", "folder_fps")

Results = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The best parameters so far, kept in the workdir; without effect unless configured."""

    run: setup.Run

    @property
    def active(self) -> bool:
        return self.run.config.train.select == "best"

    @property
    def prefix(self) -> str:
        """Begins the names of what is measured during training: the selection's, if it has any."""
        return VALIDATION if self.active else ""

    def reset(self) -> None:
        """Forgets what an attempt that was started over has left."""

        def forget() -> None:
            for name in (BEST_NOTE, BEST_FILE):
                (self.run.workdir / name).unlink(missing_ok=True)

        hosts.on_first(forget)

    def consider(self, trainable: Any, step: int, results: Results) -> None:
        """Keeps these parameters if they are better than all before; of equals, the first."""
        score = (results["t2v"]["R@1"] + results["v2t"]["R@1"]) / 2
        best = self._kept()
        # The same step again: the run was cut off between this and its next checkpoint.
        if best is not None and score <= best["score"] and step != best["step"]:
            return
        save_result(self.run, trainable, BEST_FILE)
        note = {"split": self.run.config.data.val_split, "step": step, "score": score}
        hosts.on_first(lambda: files.write_json(self.run.workdir / BEST_NOTE, note))
        logging.info("best on %s so far: step %d, mean R@1 %.1f", note["split"], step, score)

    def chosen(self) -> dict[str, Any] | None:
        """{"split", "step", "score"} of the best, if this run has one."""
        # What lies beside a run without progress is an abandoned attempt's.
        return self._kept() if int(self.run.state.step) else None

    def _kept(self) -> dict[str, Any] | None:
        path = self.run.workdir / BEST_NOTE
        if not self.active:
            return None

        def read() -> dict[str, Any] | None:
            if not path.exists():
                return None
            try:
                note = json.loads(path.read_bytes())
                return {key: note[key] for key in ("split", "step", "score")}
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path}: damaged; delete {BEST_NOTE} and {BEST_FILE} to go on without the "
                    "best step so far"
                ) from None

        return hosts.on_first(read)

    def trainable(self) -> Any:
        """The chosen parameters, or those of the newest step."""
        if self.chosen() is None:
            return self.run.state.trainable
        return load_prompts(self.run.workdir / BEST_FILE).params


def prompt_set(run: setup.Run, trainable: Any) -> PromptSet:
    """Trained parameters, on this machine, with all that is needed to use them.

    Every process of the run has to ask for it.
    """
    data = run.config.data
    return PromptSet(
        params=sharding.to_host(trainable),
        method=run.method,
        clip_fingerprint=run.clip.fingerprint,
        clip_name=run.clip.name,
        clip_config=run.clip.config,
        video={key: data[key] for key in HOW_VIDEOS_ARE_READ},
    )


def save_result(run: setup.Run, trainable: Any, name: str) -> str:
    """Writes trained parameters with all that is needed to use them; returns the path."""
    path = run.workdir / name
    found = prompt_set(run, trainable)
    hosts.on_first(lambda: save_prompts(path, **vars(found)))
    logging.info("wrote %s", path)
    return str(path)


PROMPTS_FILE, PROMPTS_FOLDER = "prompts.safetensors", "prompts.orbax"
RELEASED_FILE, ENCODERS_FOLDER = "vop.pt", "encoders"


def check(form: str) -> None:
    """Raises UserError for a format that there is not, or that lacks a library."""
    if form not in FORMATS:
        raise UserError(f"--format={form}: allowed are {', '.join(FORMATS)}")
    if form == "pytorch":
        vop_checkpoint.import_torch("--format=pytorch")
    elif form == "stablehlo":
        stablehlo.check_installed()


def log_limits(run: setup.Run) -> None:
    """One line on what cannot be exported, said before a run is trained and not after it."""
    if not run.method.parts.prompts:  # nobody expects these in the layout of VoP's authors
        return
    try:
        check_released("--format=pytorch", run.method, run.clip.config)
    except UserError as error:
        logging.info("what is trained here cannot be exported with %s; see docs/export.md", error)


def save(run: setup.Run, trainable: Any, form: str) -> str:
    """Writes trained parameters into the workdir; returns the path.

    Raises:
        UserError: the format cannot say them.
    """
    return FORMATS[form](run, trainable)


def _safetensors(run: setup.Run, trainable: Any) -> str:
    return save_result(run, trainable, PROMPTS_FILE)


def _orbax(run: setup.Run, trainable: Any) -> str:
    if not trainable:
        raise UserError(f"--format=orbax: method {run.method.name} trains nothing to be written")
    return save_result(run, trainable, PROMPTS_FOLDER)


def _pytorch(run: setup.Run, trainable: Any) -> str:
    check_released("--format=pytorch", run.method, run.clip.config)
    prompts, path = prompt_set(run, trainable).params["prompts"], run.workdir / RELEASED_FILE

    def write() -> None:
        vop_checkpoint.save(path, vop_checkpoint.join(run.clip.params, run.clip.config, prompts))

    hosts.on_first(write)
    return str(path)


def _stablehlo(run: setup.Run, trainable: Any) -> str:
    found, path = prompt_set(run, trainable), run.workdir / ENCODERS_FOLDER
    # As `vop_jax.load` runs them, not with what training chose for its own sake.
    model = TextVideoModel(run.clip.config, run.method, run.model.dtype)
    clip = cast_frozen({"clip": run.clip.params}, run.model.dtype)
    params = unflatten({**flatten(clip), **flatten(found.params)})
    about = {
        "method": run.method.name,
        "clip": run.clip.name,
        "clip_fingerprint": run.clip.fingerprint,
        "prompts_fingerprint": found.fingerprint,
        "video": found.video,
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
    """Writes the workdir's newest prompts, or what is made of them; returns the path.

    Args:
        form: one of `FORMATS`.

    Raises:
        UserError: as `train`; also when there is nothing trained to export, or the format
            cannot say it.
    """
    check(form)
    with setup.opened(config, workdir) as run:
        setup.check_trained(run)
        return save(run, Selection(run).trainable(), form)
