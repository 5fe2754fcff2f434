"""Runs the steps of a Dockerfile without Docker: each stage in a fresh root folder.

The machine's own Python and libraries, read-only, stand for the base image. Only what our
Dockerfile uses is known here; anything else fails.
"""

import json
import os
import pathlib
import re
import shutil
import sys
from dataclasses import dataclass, field
from typing import Any

from tests import processes

# Enters the root $0, where the folders $1 are the machine's own, as the user $2 in the folder $3.
ENTER = """set -e
root=$0 folders=$1 user=$2 cwd=$3; shift 3
for folder in $folders; do
    mkdir -p "$root$folder"
    mount --rbind "$folder" "$root$folder"
    case $folder in /dev|/proc) ;; *) mount -o remount,bind,ro "$root$folder" ;; esac
done
exec chroot --userspec="$user" "$root" /usr/bin/env --chdir="$cwd" "$@"
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """[(name, argument)] of a Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


@dataclass
class Stage:
    """A stage: its root folder, and how its processes run."""

    root: pathlib.Path
    environment: dict[str, str]
    user: str = "0"
    cwd: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def _inside(self, command: list[str]) -> list[str]:
        folders = ["/usr", sys.base_prefix, "/dev", "/proc"]
        enter = ["unshare", "--mount", "sh", "-c", ENTER, str(self.root), " ".join(folders)]
        return [*enter, f"{self.user}:{self.user}", self.cwd, *command]

    def start(self, command: list[str]) -> processes.Process:
        return processes.Process(self._inside(command), env=self.environment)

    def run(self, command: list[str]) -> Any:
        """The completed process."""
        return processes.run(self._inside(command), env=self.environment)


class Image:
    """The stages of a Dockerfile by their names, with all their steps done.

    Args:
        text: of the Dockerfile.
        context: the folder that COPY reads.
        folder: an empty folder for the roots.
        arguments: build arguments.
    """

    def __init__(
        self, text: str, context: pathlib.Path, folder: pathlib.Path, arguments: dict[str, str]
    ):
        self._context, self._folder, self._given = context, folder, arguments
        self._arguments: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        self.stage = Stage(folder, {})  # before the first FROM
        for name, rest in instructions(text):
            getattr(self, f"_{name.lower()}")(rest)

    def _expand(self, text: str) -> str:
        values = self._arguments | self.stage.environment
        return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], text)

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self._arguments[name] = self._given.get(name, default)

    def _from(self, rest: str) -> None:
        base, _, name = rest.partition(" AS ")
        if base in self.stages:  # of which no other stage is made, so they can share the root
            self.stage = Stage(**vars(self.stages[base]))
        else:
            kept = {k: v for k, v in os.environ.items() if "proxy" in k.lower() or "PIP" in k}
            path = f"{sys.base_prefix}/bin:/usr/bin:/usr/sbin"
            self.stage = Stage(self._folder / name, kept | {"PATH": path, "HOME": "/root"})
            for path in ("root", "tmp", "var/tmp", "home"):
                (self.stage.root / path).mkdir(parents=True)
            (self.stage.root / "tmp").chmod(0o1777)
            shutil.copytree("/etc", self.stage.root / "etc", symlinks=True)
            for link in ("bin", "sbin", "lib", "lib64"):
                (self.stage.root / link).symlink_to(f"usr/{link}")
        self.stages[name] = self.stage

    def _workdir(self, rest: str) -> None:
        self.stage.cwd = rest
        self._inside(rest).mkdir(parents=True, exist_ok=True)

    def _inside(self, path: str) -> pathlib.Path:
        """A path of the stage, as the machine names it."""
        return self.stage.root / os.path.join(self.stage.cwd, path).lstrip("/")

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        root = self._context
        if sources[0].startswith("--from="):
            root = self.stages[sources.pop(0).removeprefix("--from=")].root
        for source in sources:
            origin, to = root / source.lstrip("/"), self._inside(target)
            if origin.is_dir():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(origin, to, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy(origin, to)

    def _run(self, rest: str) -> None:
        done = self.stage.run(["sh", "-c", self._expand(rest)])
        assert done.returncode == 0, f"RUN {rest}\n{done.stdout}\n{done.stderr}"

    def _env(self, rest: str) -> None:
        values = dict(pair.split("=", 1) for pair in self._expand(rest).split())
        self.stage.environment = self.stage.environment | values

    def _user(self, rest: str) -> None:
        self.stage.user = rest
        self.stage.environment = self.stage.environment | {"HOME": self.stage.cwd}

    def _entrypoint(self, rest: str) -> None:
        self.stage.entrypoint = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        self.stage.command = json.loads(rest)

    def _healthcheck(self, rest: str) -> None:
        self.stage.health = json.loads(rest.partition("CMD ")[2])

    def _expose(self, rest: str) -> None:
        assert rest.isdecimal()
