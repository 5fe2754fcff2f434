"""The steps of launch/Dockerfile, done without Docker, and what the image then does."""

import os
import shutil
import socket
import sys

import pytest

from tests import processes, runs
from tests.launch.image import Image, instructions
from tests.video import videos

DOCKERFILE = runs.ROOT / "launch" / "Dockerfile"
USER = 10001


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def is_possible() -> bool:
    if sys.platform != "linux" or os.getuid() != 0 or not shutil.which("unshare"):
        return False
    return processes.run(["unshare", "--mount", "true"]).returncode == 0


def test_the_image_has_a_pinned_base_and_a_user_without_rights():
    steps = instructions(DOCKERFILE.read_text())
    base = next(rest for name, rest in steps if name == "ARG").partition("=")[2]
    tag = base.rpartition(":")[2]
    assert tag not in ("", "latest") and tag[0].isdecimal()
    assert [rest for name, rest in steps if name == "USER"] == [str(USER)]
    for name, rest in steps:
        if name == "COPY" and "--from" not in rest:
            assert all((runs.ROOT / source).exists() for source in rest.split()[:-1])


@pytest.mark.slow
@pytest.mark.skipif(not is_possible(), reason="needs root's right to mount, on Linux")
def test_the_image_runs_and_serves(tmp_path):
    """pip installs some 2 GB; all of it is removed again."""
    port = free_port()
    text = DOCKERFILE.read_text().replace("8000", str(port))
    try:
        image = Image(text, runs.ROOT, tmp_path / "roots", {"EXTRAS": "gcs,serve"})
        run, serve = image.stages["run"], image.stages["serve"]
        assert not (serve.root / "opt/vop/lib/python3.11/site-packages/pytest").exists()

        done = run.run([*run.entrypoint, *run.command])
        assert done.returncode == 0 and "vop serve" in done.stdout, done.stderr
        done = run.run(["id", "-u"])
        assert done.stdout == f"{USER}\n"
        done = run.run([*run.entrypoint, "params", "--config=demo:vop_c"])
        assert done.returncode == 0 and "vop_f+c" in done.stdout, done.stderr

        # The index names its videos and its CLIP by their paths: they have the same ones inside.
        data = tmp_path / "data"
        (data / "videos").mkdir(parents=True)
        videos.write(data / "videos" / "a.mp4", 6, width=32, height=32)
        clip = runs.write_clip(data / "clip.safetensors")
        data.chmod(0o777)
        arguments = ["search", "index", data / "videos", f"--clip={clip}"]
        arguments += [f"--index={data}/index", "--workers=1"]
        done = run.run([*run.entrypoint, *map(str, arguments)], data)
        # The folder is read-only inside.
        assert done.returncode == 2 and "index" in done.stderr
        done = processes.run(
            [sys.executable, "-m", "vop_jax", *arguments], env=runs.environment(), cwd=runs.ROOT
        )
        assert done.returncode == 0, done.stderr
        command = [word.replace("/index", f"{data}/index") for word in serve.command]
        server = serve.start([*serve.entrypoint, *command, f"--port={port}"], data)
        processes.until(lambda: serve.run(serve.health).returncode == 0, server)
        server.terminate()
        server.communicate()
        assert server.returncode == 143
    finally:
        shutil.rmtree(tmp_path / "roots", ignore_errors=True)
