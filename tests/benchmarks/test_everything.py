"""All benchmarks in one call: what one of them does to itself does nothing to the others."""

import argparse
import importlib
import sys
import types

import pytest

from benchmarks import everything
from benchmarks.everything import Task
from tests import processes


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """(tasks, options) -> (exit status, what is printed, everything.md); tasks are Python."""
    output = tmp_path / "a folder"

    def run(tasks, *options, limit=60):
        monkeypatch.setattr(everything, "TASKS", {n: Task(c, limit) for n, c in tasks.items()})
        monkeypatch.setattr(
            everything, "command_of", lambda task, *_: [sys.executable, "-c", task.command]
        )
        there = {"backend": "gpu", "device": "a chip", "jax": "1.2.3"}
        monkeypatch.setattr(everything, "what_is_there", lambda: there)
        try:
            everything.main([f"--output={output}", *options])
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        return status, capsys.readouterr().out, (output / "everything.md").read_text()

    return run


def test_the_others_go_on(call):
    """Also after one whose output ends within a letter."""
    tasks = {
        "bad": "raise SystemExit('no such device')",
        "half": "import sys; sys.stdout.buffer.write(bytes([0xE2, 0x80])); print(6 * 7)",
        "good": "print('ta' + 'ble')",
    }
    status, printed, report = call(tasks)
    assert [line.split(",")[0] for line in printed.splitlines()] == [
        "bad: failed (1): no such device",
        "half: done",
        "good: done",
    ]
    assert status == 1 and "table" in report and "42" in report and "a chip, jax 1.2.3" in report


def test_what_is_out_of_time_is_killed_with_its_children(call, tmp_path, monkeypatch):
    """What it printed until then is kept."""
    real, file = everything.subprocess, tmp_path / "pid"

    class Popen(real.Popen):
        def wait(self, timeout=None):
            if timeout is not None:  # it comes when the child is there
                processes.until(lambda: file.exists() and file.read_text(), self)
                raise real.TimeoutExpired(self.args, timeout)
            return super().wait()

    patched = types.SimpleNamespace(Popen=Popen, TimeoutExpired=real.TimeoutExpired)
    monkeypatch.setattr(everything, "subprocess", patched)
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(1e6)"
    code = "import subprocess, sys, time; print('be' + 'gun', flush=True); "
    code += f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(1e6)"
    status, printed, report = call({"slow": code}, limit=3)
    assert status == 1 and printed.startswith("slow: out of time after 3 s") and "begun" in report
    pid = int(file.read_text())
    processes.until(lambda: not processes.is_alive(pid))


def test_a_list_needs_no_folder_and_a_run_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(everything, "what_is_there", lambda: {"backend": "cpu"})
    everything.main(["--list"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(everything.TASKS)
    assert any(line.startswith("python -m benchmarks.ladder --workdir=DIR/") for line in printed)
    (tmp_path / "file").touch()
    for argv, message in (
        ([], "--output=DIR is missing"),
        (
            [f"--output={tmp_path / 'file'}", "--only", "ranks"],
            "file: not a folder to write in (File exists)",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            everything.main(argv)
        assert message in capsys.readouterr().err


def test_one_cache_of_programs_for_all_and_none_from_before(call, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/from/before")
    show = "import os; print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    _, _, report = call({"one": show, "two": show})
    folders = [line for line in report.splitlines() if line.startswith("/")]
    assert len(folders) == 2 and len(set(folders)) == 1 and folders[0] != "/from/before"


def test_some_of_them_one_call_after_the_other(call):
    tasks = {"one": "print('fir' + 'st')", "two": "print('sec' + 'ond')"}
    _, printed, report = call(tasks, "--only", "two")
    assert printed.startswith("two: done") and "first" not in report
    _, _, report = call(tasks, "--only", "one")
    assert report.index("first") < report.index("second")
    status, printed, report = call(tasks, "--minutes=0")
    assert printed == "one: no time was left for it\ntwo: no time was left for it\n"
    assert status == 1 and "first" in report  # what an earlier call measured stays


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("name", everything.TASKS)
def test_each_command_is_one_that_its_benchmark_takes(name, cpu, monkeypatch, tmp_path):
    """Its parser goes through the arguments; what would be measured is not."""
    command = everything.command_of(everything.TASKS[name], str(tmp_path / "a folder"), cpu)

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        parse(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [command[2], *command[3:]])
    with pytest.raises(Parsed):
        importlib.import_module(command[2]).main()
