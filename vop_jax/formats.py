"""What a run has learnt, in each of the formats that a user may ask for."""

from collections.abc import Callable
from typing import Any

from absl import logging

from vop_jax import stablehlo, start
from vop_jax.clip.convert import vop_checkpoint
from vop_jax.clip.weights import held
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.selection import prompt_set, save_result
from vop_jax.storage.tensors import flatten, unflatten
from vop_jax.training import hosts
from vop_jax.tuning.released import check_released

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


def log_limits(run: start.Run) -> None:
    """One line on what cannot be exported, said before a run is trained and not after it."""
    if not run.method.parts.prompts:  # nobody expects these in the layout of VoP's authors
        return
    try:
        check_released("--format=pytorch", run.method, run.clip.config)
    except UserError as error:
        logging.info("what is trained here cannot be exported with %s; see docs/export.md", error)


def save(run: start.Run, trainable: Any, form: str) -> str:
    """Writes trained parameters into the workdir; returns the path.

    Raises:
        UserError: the format cannot say them.
    """
    return FORMATS[form](run, trainable)


def _safetensors(run: start.Run, trainable: Any) -> str:
    return save_result(run, trainable, PROMPTS_FILE)


def _orbax(run: start.Run, trainable: Any) -> str:
    if not trainable:
        raise UserError(f"--format=orbax: method {run.method.name} trains nothing to be written")
    return save_result(run, trainable, PROMPTS_FOLDER)


def _pytorch(run: start.Run, trainable: Any) -> str:
    check_released("--format=pytorch", run.method, run.clip.config)
    prompts, path = prompt_set(run, trainable).params["prompts"], run.workdir / RELEASED_FILE

    def write() -> None:
        vop_checkpoint.save(path, vop_checkpoint.join(run.clip.params, run.clip.config, prompts))

    hosts.on_first(write)
    return str(path)


def _stablehlo(run: start.Run, trainable: Any) -> str:
    found, path = prompt_set(run, trainable), run.workdir / ENCODERS_FOLDER
    # As `vop_jax.load` runs them, not with what training chose for its own sake.
    model = TextVideoModel(run.clip.config, run.method, run.model.dtype)
    clip = held({"clip": run.clip.params}, run.model.dtype)
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


FORMATS: dict[str, Callable[[start.Run, Any], str]] = {
    "safetensors": _safetensors,
    "orbax": _orbax,
    "pytorch": _pytorch,
    "stablehlo": _stablehlo,
}
