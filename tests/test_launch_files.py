"""docs/launch: the manifest has the form that JobSet takes, names agree, flags exist, scripts parse."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ntkjax.cli import main
from ntkjax.job import cluster
from ntkjax.parallel import parse_mesh

LAUNCH = Path(__file__).resolve().parents[1] / "docs" / "launch"


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object of these properties alone."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


TEXT, COUNT, NAME = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[a-z0-9-]+$"}
SOURCE = closed(["fieldRef"], fieldRef=closed(["fieldPath"], fieldPath=TEXT))
CONTAINER = closed(
    ["name", "image", "command"],
    name=NAME, image=TEXT, command={"type": "array", "items": TEXT}, args={"type": "array", "items": TEXT},
    env={"type": "array", "items": closed(["name"], name=TEXT, value=TEXT, valueFrom=SOURCE)},
    ports={"type": "array", "items": closed(["containerPort"], containerPort=COUNT)},
    resources=closed([], limits={"type": "object", "additionalProperties": TEXT}),
    volumeMounts={"type": "array", "items": closed(["name", "mountPath"], name=NAME, mountPath=TEXT)},
)  # fmt: skip
VOLUME = closed(["name"], name=NAME, persistentVolumeClaim=closed(["claimName"], claimName=NAME))
POD = closed(
    ["restartPolicy", "containers"],
    restartPolicy={"enum": ["Never", "OnFailure"]}, terminationGracePeriodSeconds=COUNT,
    containers={"type": "array", "minItems": 1, "items": CONTAINER}, volumes={"type": "array", "items": VOLUME},
)  # fmt: skip
JOB = closed(
    ["completionMode", "completions", "parallelism", "template"],
    completionMode={"const": "Indexed"}, completions=COUNT, parallelism=COUNT, backoffLimit=COUNT,
    template=closed(["spec"], spec=POD),
)  # fmt: skip
JOBS = closed(["name", "template"], name=NAME, replicas=COUNT, template=closed(["spec"], spec=JOB))
# The fields of JobSet v1alpha2, Job batch/v1 and Pod v1 that the manifest uses, and no others.
SCHEMA = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(["name"], name=NAME),
    spec=closed(
        ["replicatedJobs"],
        network=closed([], enableDNSHostnames={"type": "boolean"}, subdomain=NAME),
        failurePolicy=closed([], maxRestarts=COUNT),
        replicatedJobs={"type": "array", "minItems": 1, "items": JOBS},
    ),
)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_the_manifest_has_the_form_that_jobset_takes(manifest):
    jsonschema.validate(manifest, SCHEMA)
    broken = yaml.safe_load(yaml.safe_dump(manifest))
    broken["spec"]["replicatedJobs"][0]["template"]["spec"]["completionmode"] = "Indexed"
    with pytest.raises(jsonschema.ValidationError, match="completionmode"):
        jsonschema.validate(broken, SCHEMA)


def test_its_processes_find_each_other(manifest):
    jobs = manifest["spec"]["replicatedJobs"][0]
    job = jobs["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    # JobSet's host of a pod: JOBSET-JOB-JOBINDEX-PODINDEX.SUBDOMAIN.
    host = f"{manifest['metadata']['name']}-{jobs['name']}-0-0.{manifest['spec']['network']['subdomain']}"
    port = container["ports"][0]["containerPort"]
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{host}:{port}" and cluster(env) == "environment"
    assert int(env["JAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"]
    data, fsdp, model = parse_mesh(container["args"][container["args"].index("--mesh") + 1])
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert (data or 1) * fsdp * model == gpus * job["completions"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in job["template"]["spec"]["volumes"]}


def commands() -> list[tuple[str, list[str]]]:
    """The ntkjax command of every file in docs/launch."""
    container = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    container = container["template"]["spec"]["template"]["spec"]["containers"][0]
    found = [("jobset.yaml", [*container["command"], *container["args"]])]
    for script in sorted(LAUNCH.glob("*.sh")):
        text = script.read_text().replace("\\\n", " ")
        line = next(line for line in text.splitlines() if "ntkjax select" in line and not line.startswith("#"))
        found.append((script.name, shlex.split(line[line.index("ntkjax") :].rstrip('"'))))
    return found


@pytest.mark.parametrize(("name", "words"), commands(), ids=lambda x: x if isinstance(x, str) else "")
def test_its_flags_are_those_of_the_command(name, words, capsys):
    """All that is wrong is that the files are not here: the flags and the mesh were read."""
    assert words[0] == "ntkjax" and main([word for word in words[1:] if word != "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "/shared/" in said or ("mesh" in said and "devices" in said), said


def test_every_script_parses():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 2
    for script in scripts:
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
