"""The manifest: what it says, who is given it, and that the command of each pod trains."""

import os
import re
import socket
import sys

import pytest
import yaml
from processes import end

from nemohybrid.launch import kubernetes
from nemohybrid.launch.job import Job

OPTIONS = ["kubernetes", "--nodes", "3", "--gpus-per-node", "8", "--image", "registry/image:1"]
VOLUME = ["--volume", "runs:/runs"]
ONE_POD = ["kubernetes", "--gpus-per-node", "2", "--image", "i", *VOLUME]


@pytest.fixture
def manifest(rendered, small):
    """`manifest(option, ...)` as a mapping."""
    batch = ["train.global_batch=24", "run.device=auto"]

    def read(*options: str):
        return yaml.safe_load(
            rendered(*OPTIONS, *([] if "--volume" in options else VOLUME), *options, "--", *small, *batch)
        )

    return read


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
    job = yaml.safe_load(rendered(*ONE_POD, "--", *small))
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
    job = manifest("--volume", "runs:/w/run", "--volume", "data:/a b", "--workdir", "/w", "--namespace", "ml")
    spec = pod(job)
    claims = {
        v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v
    }
    mounts = {claims.get(m["name"], m["name"]): m["mountPath"] for m in spec["containers"][0]["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "runs": "/w/run", "data": "/a b"}
    assert (job["metadata"]["namespace"], spec["containers"][0]["workingDir"]) == ("ml", "/w")


def test_kubectl_is_given_the_manifest_and_its_status_is_passed_on(launch, rendered, small, stand_in, empty_folder):
    stand_in('echo "$@" >asked; cat >given; exit 4', "kubectl")
    words = [*ONE_POD, "--", *small]
    assert launch(*words)[0] == 4
    assert (empty_folder / "asked").read_text() == "apply -f -\n"
    assert (empty_folder / "given").read_text() == rendered(*words)


def expanded(words: list[str], variables: dict[str, str]) -> list[str]:
    """As Kubernetes does: $(NAME) of what is set, $$ for $."""
    return [re.sub(r"\$\$|\$\((\w+)\)", lambda m: variables.get(m[1], m[0]) if m[1] else "$", word) for word in words]


def test_overrides_arrive_as_they_were_given(rendered, small):
    odd = ['sample.prompts=["$(RANK) of it\'s `x`"]', 'run.dir="a: b #c"']
    job = yaml.safe_load(rendered(*ONE_POD, "--", *small, *odd))
    words = expanded(pod(job)["containers"][0]["command"], {"RANK": "0"})
    assert words[words.index("train") + 1 :] == [*small, *odd]


def restarts_before_it_fails(job) -> int:
    """As PastBackoffLimit of the operator counts: restarts of all pods together. Here every pod restarts each time."""
    limit = job["spec"]["runPolicy"]["backoffLimit"]
    pods = sum(spec["replicas"] for spec in job["spec"]["pytorchReplicaSpecs"].values())
    return next(times for times in range(1000) if (times * pods >= limit if limit else times)) - 1


@pytest.mark.parametrize("nodes, restarts", [(1, 0), (1, 1), (32, 0), (32, 20)])
def test_a_run_starts_again_as_often_as_it_may(nodes, restarts):
    job = Job("", (), nodes, gpus_per_node=8, name="a", run_dir="run", python="python", save_seconds=300)
    text = kubernetes.render(job, kubernetes.Cluster(image="i", secret="s", max_restarts=restarts))
    assert restarts_before_it_fails(yaml.safe_load(text)) == restarts


def test_names_that_yaml_reads_as_something_else_stay_text(manifest):
    job = manifest("--name", "true", "--secret", "null", "--namespace", "123", "--volume", "0:/a")
    spec = pod(job)
    env = {entry["name"]: entry for entry in spec["containers"][0]["env"]}
    claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert job["metadata"] == {"name": "true", "namespace": "123"}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "null"
    assert claims == ["0"]


def test_a_run_gives_the_job_a_name_that_the_operator_takes(rendered, small):
    text = rendered(*ONE_POD, "--", *small, f"run.name=2026_{'A' * 44}.b")
    assert yaml.safe_load(text)["metadata"]["name"] == f"run-2026-{'a' * 41}"


@pytest.mark.parametrize(
    "options, message", [([], "no --volume"), ([*VOLUME, "--volume", "b:/runs"], "/runs is given twice")]
)
def test_a_run_needs_a_volume_and_each_a_place_of_its_own(launch, small, options, message):
    code, out, err = launch("kubernetes", "--image", "i", "--gpus-per-node", "2", *options, "--dry-run", "--", *small)
    assert (code, out, message in err) == (1, "", True), err


@pytest.mark.slow
def test_the_commands_of_two_pods_train_together(background, rendered, small):
    options = ["--nodes", "2", "--gpus-per-node", "1", "--image", "i", *VOLUME, "--python", sys.executable]
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
