"""The manifest: what it says, who is given it, and that the command of each pod trains."""

import os
import re
import socket
import sys

import pytest
import yaml
from processes import end

OPTIONS = ["kubernetes", "--nodes", "3", "--gpus-per-node", "8", "--image", "registry/image:1"]


@pytest.fixture
def manifest(rendered, small):
    """`manifest(option, ...)` as a mapping."""
    batch = ["train.global_batch=24", "run.device=auto"]
    return lambda *options: yaml.safe_load(rendered(*OPTIONS, *options, "--", *small, *batch))


def pod(job, kind: str = "Master"):
    return job["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]


def test_a_pod_is_a_node_and_all_pods_are_alike(manifest):
    job = manifest()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = {kind: spec["replicas"] for kind, spec in job["spec"]["pytorchReplicaSpecs"].items()}
    assert replicas == {"Master": 1, "Worker": 2}
    assert pod(job, "Worker") == pod(job)
    (container,) = pod(job)["containers"]
    assert (container["name"], container["image"]) == ("pytorch", "registry/image:1")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_a_single_node_is_a_master_alone(rendered, small):
    job = yaml.safe_load(rendered("kubernetes", "--gpus-per-node", "2", "--image", "i", "--", *small))
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    (container,) = pod(job)["containers"]
    assert "--standalone" in container["command"]
    assert "resources" not in container, "a run on CPUs asks for GPUs"


def test_there_is_time_to_save_before_a_pod_is_killed(manifest):
    spec = pod(manifest("--save-seconds", "500"))
    (patience,) = (e["value"] for e in spec["containers"][0]["env"] if e["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert patience == "500"
    assert spec["terminationGracePeriodSeconds"] > 500


def test_secrets_are_named_and_never_told(manifest):
    env = {entry["name"]: entry for entry in pod(manifest("--secret", "mine"))["containers"][0]["env"]}
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        assert env[name]["valueFrom"] == {"secretKeyRef": {"name": "mine", "key": name, "optional": True}}
        assert "value" not in env[name]


def test_volumes_are_mounted_where_they_are_asked_for(manifest):
    job = manifest("--volume", "runs:/w/runs", "--volume", "data:/a b", "--workdir", "/w", "--namespace", "ml")
    spec = pod(job)
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v
    }
    mounts = {claims.get(m["name"], m["name"]): m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "runs": "/w/runs", "data": "/a b"}
    assert (job["metadata"]["namespace"], spec["containers"][0]["workingDir"]) == ("ml", "/w")


def test_kubectl_is_given_the_manifest_and_its_status_is_passed_on(launch, rendered, small, stand_in, empty_folder):
    stand_in('echo "$@" >asked; cat >given; exit 4', "kubectl")
    words = ["kubernetes", "--image", "i", "--gpus-per-node", "2", "--", *small]
    assert launch(*words)[0] == 4
    assert (empty_folder / "asked").read_text() == "apply -f -\n"
    assert (empty_folder / "given").read_text() == rendered(*words)


def expanded(words: list[str], variables: dict[str, str]) -> list[str]:
    """As Kubernetes does: $(NAME) of what is set, $$ for $."""
    return [re.sub(r"\$\$|\$\((\w+)\)", lambda m: variables.get(m[1], m[0]) if m[1] else "$", word) for word in words]


def test_overrides_arrive_as_they_were_given(rendered, small):
    odd = ['sample.prompts=["$(RANK) of it\'s `x`"]', 'run.dir="a: b #c"']
    job = yaml.safe_load(rendered("kubernetes", "--image", "i", "--gpus-per-node", "2", "--", *small, *odd))
    words = expanded(pod(job)["containers"][0]["command"], {"RANK": "0"})
    assert words[words.index("train") + 1 :] == [*small, *odd]


@pytest.mark.slow
def test_the_commands_of_two_pods_train_together(background, rendered, small):
    options = ["--nodes", "2", "--gpus-per-node", "1", "--image", "i", "--python", sys.executable]
    job = yaml.safe_load(rendered("kubernetes", *options, "--", *small, "train.steps=2"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    pods = []
    for rank in ("0", "1"):  # as the operator sets them: pods are counted
        variables = {"RANK": rank, "WORLD_SIZE": "2", **meet}
        command = expanded(pod(job)["containers"][0]["command"], os.environ | variables)
        pods.append(background(*command, **variables))
    ended = [end(process) for process in pods]
    assert [status for status, _ in ended] == [0, 0], ended
    assert "done: step 2 of 2" in "".join(out for _, out in ended)
