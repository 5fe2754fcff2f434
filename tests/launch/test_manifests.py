"""The manifests and the unit under launch/: their schemas, and that their commands are ours."""

import configparser
import copy
import json
import math
import re
import shutil

import pytest
import yaml

from tests import processes, runs
from vop_jax import cli, main
from vop_jax.config.keys import KEYS
from vop_jax.serve.__main__ import _parser

jsonschema = pytest.importorskip("jsonschema")

LAUNCH = runs.ROOT / "launch"
UNIT = LAUNCH / "vop-serve.service"
SCHEMA = json.loads((runs.ROOT / "tests" / "launch" / "kubernetes.json").read_text())
TPU_PAGE = (runs.ROOT / "docs" / "guides" / "tpu.md").read_text()
# | TPU | accelerator | machine | chips of a host | topology | hosts | devices |
SLICES = re.findall(
    r"^\| (\w+) \| `([\w-]+)` \| `([\w-]+)` \| (\d) \| `([\dx]+)` \| (\d+) \| (\d+) \|",
    TPU_PAGE,
    re.MULTILINE,
)


def documents(name):
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def mistakes(document):
    """["field: what is wrong"] of a document by the schema of its kind."""
    schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(document):
    spec = job_of(document) if document["kind"] == "JobSet" else document["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return container


def check_program(arguments):
    """The program of a container takes these arguments."""
    program, *arguments = arguments
    if program == "serve":
        _parser().parse_args(arguments)
    else:
        assert program == "train"
        _, overrides = cli.parse_flags(arguments, "", main.define_flags)
        assert set(cli.overridden_keys(overrides)) <= set(KEYS)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_manifest_is_valid_and_its_command_is_known(path):
    for document in documents(path.name):
        assert mistakes(document) == []
        if document["kind"] in ("JobSet", "Job", "Deployment"):
            check_program(container_of(document)["args"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda job: job.update(paralelism=4), "paralelism"),
        (lambda job: job.update(parallelism="4"), "'4' is not of type"),
        (lambda job: job["template"]["spec"].pop("containers"), "'containers' is a required"),
        (lambda job: job["template"]["spec"]["containers"][0].update(arg=[]), "'arg'"),
    ],
)
def test_the_schema_finds_mistakes(change, error):
    jobset = copy.deepcopy(documents("tpu.yaml")[1])
    change(job_of(jobset))
    (mistake,) = mistakes(jobset)
    assert error in mistake


@pytest.mark.parametrize("row", SLICES, ids=lambda row: row[0])
def test_a_slice_of_the_page_fits_the_manifest(row):
    """Its numbers agree, and the manifest with them is valid."""
    tpu, accelerator, machine, chips, topology, hosts, devices = row
    assert machine.endswith(f"-{chips}t")
    assert math.prod(map(int, topology.split("x"))) == int(chips) * int(hosts)
    cores = 2 if tpu == "TPU7x" else 1  # a chip of TPU7x is two devices for jax
    assert int(devices) == int(chips) * int(hosts) * cores
    text = (LAUNCH / "tpu.yaml").read_text()
    text = re.sub(r"\d+( # slice: hosts)", rf"{hosts}\g<1>", text)
    text = re.sub(r"(accelerator: ).*( # slice)", rf"\g<1>{accelerator}\g<2>", text)
    text = re.sub(r"(topology: )\d.*( # slice)", rf"\g<1>{topology}\g<2>", text)
    account, jobset = yaml.safe_load_all(text)
    assert mistakes(jobset) == []
    job = job_of(jobset)
    pod = job["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert (job["parallelism"], job["completions"]) == (int(hosts), int(hosts))
    assert {*pod["nodeSelector"].values()} == {accelerator, topology}
    container = container_of(jobset)
    assert container["resources"]["limits"] == {"google.com/tpu": int(chips)}
    batch = int(re.search(r"batch_size=(\d+)", " ".join(container["args"]))[1])
    assert batch % int(devices) == 0


def test_the_page_has_the_tpus_that_are_sold():
    assert [row[0] for row in SLICES] == ["v5e", "v6e", "TPU7x"]


def probes_of(deployment):
    return [value for key, value in container_of(deployment).items() if key.endswith("Probe")]


def test_the_probes_ask_for_pages_of_the_server():
    monitoring = pytest.importorskip("vop_jax.serve.monitoring", reason="the extra serve")
    paths = {route.path for route in monitoring.router.routes}
    asked = {probe["httpGet"]["path"] for probe in probes_of(documents("serve.yaml")[0])}
    assert asked == {"/healthz", "/readyz"} and asked <= paths
    assert "http://127.0.0.1:8000/healthz" in (LAUNCH / "Dockerfile").read_text()


def test_the_service_sends_requests_to_the_pods():
    deployment, service = documents("serve.yaml")
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert pod["metadata"]["labels"] == service["spec"]["selector"]
    ports = {port["name"] for port in container_of(deployment)["ports"]}
    assert {probe["httpGet"]["port"] for probe in probes_of(deployment)} == ports
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container_of(deployment)["volumeMounts"]} == volumes


def unit():
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser["Service"]


def test_the_unit_starts_the_server_and_knows_its_status():
    service = unit()
    program, *arguments = service["ExecStart"].split()
    assert program == "/opt/vop/bin/vop"
    check_program(arguments)
    assert service["SuccessExitStatus"] == "143"  # of SIGTERM, see docs/reference/commands.md
    assert service["RestartPreventExitStatus"] == "2"
    assert f"/var/lib/{service['StateDirectory']}/" in service["ExecStart"]
    assert service["Environment"].endswith(f"=/var/cache/{service['CacheDirectory']}")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_knows_the_unit(tmp_path):
    copied = tmp_path / UNIT.name
    program = shutil.which("true")  # verify looks for the program
    copied.write_text(UNIT.read_text().replace("/opt/vop/bin/vop", program))
    done = processes.run(["systemd-analyze", "verify", copied])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    options = ["--offline=yes", "--threshold=20", copied]  # tenths
    done = processes.run(["systemd-analyze", "security", *options])
    assert done.returncode == 0, done.stdout
