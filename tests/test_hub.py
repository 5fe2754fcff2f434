"""A run is pushed to a Hub and loaded from it by name; what goes wrong there is one line."""

import json
import sys

import pytest
from safetensors import numpy as safetensors_numpy

from tests import checkpoints, processes, runs
from tests import hub as hubs
from tests.report.finished_runs import write_run
from vop_jax.clip.weights import load_clip
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.prompt_set import PromptSet, save_prompts

pytest.importorskip("huggingface_hub", reason="the extra `hub`")

NAME = "hf://me/demo"
RESULT = {"R@1": 50.0, "R@5": 60.0, "R@10": 70.0, "MnR": 4.5, "MdR": 1.0}


@pytest.fixture(scope="module")
def hub():
    with hubs.running() as hub:
        yield hub


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a finished run that trained its CLIP, as the demo does."""
    root = tmp_path_factory.mktemp("run") / "run"
    keys = {"pretrain.steps": 4, "data.kind": "msrvtt9k", "data.videos": "/home/me/clips"}
    keys |= {"data.records": "gs://home/me/records/", "clip.arch": "ViT-B/32"}
    skipped = {"id": "7", "path": "/home/me/clips/7.mp4", "where": "/home/me/a.csv:7"}
    summary = {
        "skipped_videos": [skipped],
        "protocol": "MSR-VTT-9k, test 1k-A",
        "t2v": RESULT,
        "before": {"t2v": RESULT},
    }
    write_run(root, summary=summary, **keys)
    clip = load_clip(runs.write_clip(root / "clip.safetensors"))
    method = MethodConfig(visual_prompts=2, text_prefix=1, text_suffix=1)
    params = {"prompts": {"visual": [[[0.5] * 32] * 2] * 2, "text": [[[0.5] * 16] * 2] * 2}}
    prompts = PromptSet(params, method, clip.fingerprint, clip.name, clip.config, {"frames": 3})
    save_prompts(root / "prompts.safetensors", prompts)
    return root


@pytest.fixture(scope="module")
def pushed(hub, workdir):
    """The files of a repository as a push leaves them; its card is not there."""
    names = ("clip.safetensors", "prompts.safetensors", "config.json", "summary.json")
    return hub.commit("me/demo", {name: (workdir / name).read_bytes() for name in names})


@pytest.fixture
def python(hub, tmp_path):
    """Runs a program in a process of its own, whose Hub is this one; returns the JSON it prints."""

    def python(code, *arguments, **environment):
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        variables = runs.environment() | own | environment
        done = processes.run(command, env=variables, cwd=tmp_path, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return python


PUSH = """
import json, sys
import vop_jax
from huggingface_hub import ModelCard
from vop_jax.push import main

workdir, name = sys.argv[1:]
assert main([workdir, name, "--private", "--base-model=openai/clip-vit-base-patch32"]) == 0
first = ModelCard.load(name)
first.validate()
here = vop_jax.load(f"{workdir}/clip.safetensors", f"{workdir}/prompts.safetensors")
there = vop_jax.load(f"hf://{name}", f"hf://{name}@main/prompts.safetensors")
assert there.prompts_fingerprint == here.prompts_fingerprint != ""
assert (here.embed_text(["a circle"]) == there.embed_text(["a circle"])).all()
first.data.license = "mit"
first.text = "Written by hand.\\n" + first.text
first.push_to_hub(name)
assert main([workdir, name, "--dataset=some/videos"]) == 0
print(json.dumps([[card.data.to_dict(), card.text] for card in (first, ModelCard.load(name))]))
"""


def test_a_push_is_described_and_loaded_by_name(hub, workdir, python):
    (data, text), (later, edited) = python(PUSH, workdir, "me/pushed", HF_TOKEN=hubs.TOKEN)
    assert "me/pushed" in hub.private and hub.requests.count("POST /api/validate-yaml") == 5
    *_, (_, files) = hub.repositories["me/pushed"]
    for name in ("prompts.safetensors", "clip.safetensors"):
        assert files[name] == (workdir / name).read_bytes()
    config = json.loads(files["config.json"])
    folders = config["data"]["videos"], config["data"]["records"], config["clip"]["arch"]
    assert folders == ("clips", "records", "ViT-B/32")
    assert json.loads(files["summary.json"])["skipped_videos"] == [{"id": "7"}]
    assert not any(b"home/me" in content for content in files.values())
    assert data["library_name"] == "vop_jax" and data["pipeline_tag"] == "feature-extraction"
    assert data["base_model"] == "openai/clip-vit-base-patch32" and data["datasets"] == ["msrvtt9k"]
    assert "recall_at_1" in data["metrics"]
    (model,) = data["model-index"]
    t2v, v2t = model["results"]
    assert t2v["task"]["type"] == "text-to-video-retrieval" != v2t["task"]["type"]
    assert t2v["dataset"]["name"] == "MSR-VTT-9k, test 1k-A" and t2v["dataset"]["split"] == "test"
    assert {metric["name"]: metric["value"] for metric in t2v["metrics"]} == RESULT
    assert 'vop_jax.load(clip="hf://me/pushed", prompts="hf://me/pushed")' in text
    assert "| text-to-video retrieval | 50.0 | 60.0 | 70.0 | 4.5 | 1.0 |" in text
    assert later["license"] == "mit" and later["datasets"] == ["some/videos"]
    assert edited.startswith("Written by hand.\n") and edited.count("# pushed") == 1


LOAD = """
import json, sys
import vop_jax
from vop_jax.storage import hub

names = json.loads(sys.argv[1])
pinned = [hub.pin(name, hub.CLIP_FILE) for name in names]
print(json.dumps([pinned, [vop_jax.load(name).clip_fingerprint for name in names]]))
"""


def test_what_is_in_the_cache_needs_no_hub(hub, pushed, workdir, python):
    names = [NAME, f"{NAME}@{pushed}", f"{NAME}@main/clip.safetensors"]
    expected = [
        [f"{NAME}@{pushed}/clip.safetensors"] * 3,
        [load_clip(workdir / "clip.safetensors").fingerprint] * 3,
    ]
    assert python(LOAD, json.dumps(names)) == expected
    assert python(LOAD, json.dumps(names), HF_ENDPOINT="http://127.0.0.1:1") == expected
    hub.requests.clear()
    assert python(LOAD, json.dumps(names[1:2])) == [part[1:2] for part in expected]
    assert not hub.requests


# Prints [[status, stdout, stderr]] of command lines of `vop`, each with a token before it.
COMMANDS = """
import contextlib, io, json, os, sys
from tests.processes import file_limit
from vop_jax.__main__ import main

results = []
for token, limit, *arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), file_limit(limit):
        results.append([main(arguments), out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def test_what_goes_wrong_is_one_line(hub, pushed, workdir, python, tmp_path):
    hub.commit("me/hidden", {"clip.safetensors": b""})
    hub.private.add("me/hidden")
    hub.commit("other/clip", {"model.safetensors": b""})
    no, wrong, huge = "", "hf_wrong", 1 << 40

    def verify(name, token=no, limit=huge):
        return [token, limit, "convert", f"--verify={name}"]

    def push(name, token=hubs.TOKEN, run=workdir):
        return [token, huge, "push", str(run), name]

    def train(setting):
        return [no, huge, "train", "--config=folder", "--workdir=run", f"--config.{setting}"]

    calls = (
        (verify("hf://me/none"), f"no such repository on {hub.url}, or a private one: hf auth"),
        (verify("hf://me/hidden"), "no such repository on"),
        (verify(f"{NAME}@v9"), "no such branch, tag or commit"),
        (verify(f"{NAME}/x.bin"), "the repository holds no x.bin"),
        (verify("hf://other/clip"), "vop convert --source=hf://other/clip --output=clip.safetens"),
        (verify("hf://clip"), "hf://clip: write hf://OWNER/NAME[@REV][/FILE]"),
        (verify(f"{NAME}/../x"), "hf://me/demo/../x: "),
        (verify(NAME, wrong), "with status 401 (Invalid credentials"),
        (verify(NAME, no, 10_000), f"File too large: {tmp_path}"),
        (push("me/demo", no), "no token to write with; hf auth login, or set HF_TOKEN"),
        (push("me/demo", wrong), "with status 401 (Invalid credentials"),
        (push("other/demo"), "with status 403 (You don't have the rights"),
        (push("me"), "me: write OWNER/NAME"),
        (push("me/demo", run=tmp_path), "give the workdir of a finished run"),
        (train("init.clip=hf://me/none"), "hf://me/none: no such repository"),
        (train("data.records=hf://me/demo"), "config.data.records=hf://me/demo: only"),
    )
    results = python(COMMANDS, json.dumps([arguments for arguments, _ in calls]))
    for (arguments, message), result in zip(calls, results, strict=True):
        assert result[2].count("\n") == 1, (arguments, result)
        runs.assert_refused(result, message)
    assert not (tmp_path / "run").exists()
    gone = [verify("hf://me/none"), push("me/demo")]
    for result in python(COMMANDS, json.dumps(gone), HF_ENDPOINT="http://127.0.0.1:1"):
        assert result[2].count("\n") == 1, result
        runs.assert_refused(result, "http://127.0.0.1:1 cannot be reached")
    (result,) = python(COMMANDS, json.dumps(gone[:1]), HF_HUB_OFFLINE="1")
    runs.assert_refused(result, "cannot be reached (HF_HUB_OFFLINE is set)", "holds no copy")


@pytest.mark.slow
def test_programs_take_names_of_the_hub(hub, pushed, folder, python, tmp_path):
    state = checkpoints.openai_state(checkpoints.random_params(checkpoints.SIZES))
    safetensors_numpy.save_file(state, tmp_path / "model.safetensors")
    source = {"open_clip_model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    hub.commit("other/openclip", {**source, "unused.bin": b"1"})
    heads = ("--vision-heads=2", "--text-heads=1")
    model, config = ("--clip", NAME, "--prompts", NAME), f"--config={runs.ROOT}/configs/folder.py"
    convert = ["convert", "--source=hf://other/openclip", "--output=clip.st", *heads]
    index = ["search", "index", str(folder / "videos"), "--index=index", *model]
    evaluate = ["eval", config, "--config.method.name=zero_shot", f"--config.init.clip={NAME}"]
    evaluate += runs.arguments(folder, NAME, tmp_path / "run")[1:]
    query = ["search", "query", "a squid", "--index=index", "--json"]
    calls = [["", 1 << 40, *call] for call in (convert, index, evaluate)]
    for status, _, err in python(COMMANDS, json.dumps(calls)):
        assert status == 0, err
    assert load_clip(tmp_path / "clip.st").source == "hf://other/openclip"
    calls = [["", 1 << 40, *call] for call in (query, ["search", "info", "--index=index"])]
    hits, info = python(COMMANDS, json.dumps(calls), HF_ENDPOINT="http://127.0.0.1:1")
    assert hits[0] == 0 and json.loads(hits[1])
    assert f"{NAME}@{pushed}/clip.safetensors" in info[1]
