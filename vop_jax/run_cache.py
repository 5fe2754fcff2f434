"""The training split's frames on the devices, where the config asks for it."""

import dataclasses
import json

from absl import logging

from vop_jax import start
from vop_jax.data.device_crops import BITS, Drawn
from vop_jax.data.records.decoded import clips_of, draws_frames, frame_shapes
from vop_jax.data.records.read import Split
from vop_jax.errors import UserError
from vop_jax.training import device_cache, hosts

KEY = "config.data.device_cache_gb"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What goes to the devices, and how crops of it are told."""

    split: Split
    layout: device_cache.Layout
    drawn: Drawn


def plan(run: start.Run, split: Split) -> Plan | None:
    """None where the config asks for no cache.

    Raises:
        UserError: it does not fit, or not this run.
    """
    data = run.config.data
    if not data.device_cache_gb:
        return None
    if draws_frames(split, data.frames, data.sampling):
        raise UserError(
            f"{KEY}: data.sampling={data.sampling!r} takes other frames of the stored ones each "
            f"epoch, the devices keep {data.frames} of a clip; set it to 0, or data.stored_fps to 0"
        )
    shapes = hosts.in_all(lambda: frame_shapes(split, data.frames, data.sampling, data.threads))
    hosts.agree({"size of stored frames": json.dumps(shapes)})
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    layout = device_cache.Layout(run.mesh, len(split), (data.frames, height, width, 3))
    hosts.in_all(lambda: layout.check(data.device_cache_gb))
    return Plan(split, layout, Drawn.of(shapes, run.clip.config.image_size, data.augment))


def filled(run: start.Run, plan: Plan) -> device_cache.DeviceCache:
    """Decodes the split to the devices, each process what its own hold."""
    data, sides = run.config.data, plan.drawn.sides
    clips = clips_of(plan.split, plan.layout.here, data.frames, data.sampling, data.threads)
    frames = device_cache.fill(plan.layout, clips)
    gigabytes = plan.layout.bytes_per_device / 1e9
    logging.info("%d clips on the devices, %.3g GB on each", len(plan.split), gigabytes)
    return device_cache.DeviceCache(run.mesh, frames, sides.first, sides.weights, BITS)
