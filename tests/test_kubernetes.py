"""The manifest for Kubernetes: a job that the command line accepts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "docs/kubernetes/pretrain.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def pod(job: dict[str, Any]) -> dict[str, Any]:
    spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def test_the_command_is_accepted_by_the_tool(job: dict[str, Any]) -> None:
    (container,) = pod(job)["containers"]
    torchrun, tool, *words = container["command"] + container["args"]
    assert torchrun == "torchrun"  # its own arguments come from the operator's PET_ variables
    command = [sys.executable, tool, *words, "--explain", "SEED"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_pod_asks_for_as_many_gpus_as_it_starts_processes(job: dict[str, Any]) -> None:
    (container,) = pod(job)["containers"]
    assert container["name"] == "pytorch"  # the only container that the operator recognises
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    workers = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert job["spec"]["elasticPolicy"]["maxReplicas"] == workers["replicas"]


def test_every_mount_has_its_volume(job: dict[str, Any]) -> None:
    (container,) = pod(job)["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod(job)["volumes"]}
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    for word in container["args"]:
        if "/" in word:
            assert any(path in word for path in paths), word  # nothing is written into the pod
