"""All benchmarks in one call: what one of them does to itself does nothing to the others."""

import argparse
import importlib
import sys

import pytest

from benchmarks import everything
from benchmarks.everything import Task


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """(tasks, options) -> (what is printed, everything.md); tasks are lines of Python."""

    def run(tasks, *options):
        monkeypatch.setattr(everything, "TASKS", {n: Task(c, 60) for n, c in tasks.items()})
        monkeypatch.setattr(
            everything, "command_of", lambda task, *_: [sys.executable, "-c", task.command]
        )
        monkeypatch.setattr(everything, "_backend", lambda: "cpu")
        everything.main([f"--output={tmp_path}", *options])
        return capsys.readouterr().out, (tmp_path / "everything.md").read_text()

    return run


def test_the_others_go_on(call):
    tasks = {
        "good": "print('| a | table |')",
        "bad": "raise SystemExit('no such device')",
        "slow": "import time; print('begun', flush=True); time.sleep(60)",
        "late": "print('never')",
    }
    printed, report = call(tasks, "--minutes=0.1")
    assert [line.split(",")[0].split(" after")[0] for line in printed.splitlines()] == [
        "good: done",
        "bad: failed (1): no such device",
        "slow: out of time",
        "late: no time was left for it",
    ]
    assert "| a | table |" in report and "begun" in report and "never\n" not in report


def test_one_cache_of_programs_for_all_and_none_from_before(call, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/from/before")
    show = "import os; print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    _, report = call({"one": show, "two": show})
    folders = [line for line in report.splitlines() if line.startswith("/")]
    assert len(folders) == 2 and len(set(folders)) == 1 and folders[0] != "/from/before"


def test_only_some(call):
    printed, report = call({"one": "print(1)", "two": "print(2)"}, "--only", "two")
    assert printed.startswith("two: done") and "## one" not in report


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("name", everything.TASKS)
def test_each_command_is_one_that_its_benchmark_takes(name, cpu, monkeypatch, tmp_path):
    """Its parser goes through the arguments; what would be measured is not."""
    command = everything.command_of(everything.TASKS[name], str(tmp_path), cpu)

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
