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
    """The roots take 3 GB until the test ends."""
    port = free_port()
    text = DOCKERFILE.read_text().replace("8000", str(port))
    try:
        image = Image(text, runs.ROOT, tmp_path / "roots", {"EXTRAS": "gcs,serve"})
        run, serve = image.stages["run"], image.stages["serve"]
        assert not list(serve.root.glob("opt/vop/lib/*/site-packages/pytest"))

        done = run.run([*run.entrypoint, *run.command])
        assert done.returncode == 0 and "vop serve" in done.stdout, done.stderr
        done = run.run(["id", "-u"])
        assert done.stdout == f"{USER}\n"
        done = run.run([*run.entrypoint, "params", "--config=demo:vop_c"])
        assert done.returncode == 0 and "vop_f+c" in done.stdout, done.stderr

        folder = serve.root / "srv"
        folder.mkdir()
        videos.write(folder / "a.mp4", 6, width=32, height=32)
        runs.write_clip(folder / "clip.safetensors")
        (serve.root / "index").mkdir()
        os.chown(serve.root / "index", USER, USER)
        arguments = ["search", "index", "/srv", "--index=/index", "--clip=/srv/clip.safetensors"]
        done = serve.run([*serve.entrypoint, *arguments, "--workers=1"])
        assert done.returncode == 0, done.stderr
        server = serve.start([*serve.entrypoint, *serve.command, f"--port={port}"])
        processes.until(lambda: serve.run(serve.health).returncode == 0, server)
        server.terminate()
        server.communicate()
        assert server.returncode == 143
    finally:
        shutil.rmtree(tmp_path / "roots", ignore_errors=True)
