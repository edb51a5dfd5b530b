"""The Kubernetes JobSet that launch/gke.sh prints, field by field, and which exit codes start a job again."""

import re

import pytest
import yaml

from tests.helpers.launch_commands import GKE, TRAIN, dry


def jobset(*args):
    lines = dry("gke.sh", "create", *args).splitlines()
    assert lines[0] == "kubectl apply -f - <<'END'" and lines[-1] == "END"
    return yaml.safe_load("\n".join(lines[1:-1]))


def test_jobset_field_by_field():
    awkward = 'A=b & "c" \\d $(HOME)'
    found = jobset(
        *GKE,
        "--slices",
        "2",
        "--max-restarts",
        "7",
        "--service-account",
        "robot",
        "--env",
        awkward,
        "--dry-run",
        *TRAIN,
    )
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and found["kind"] == "JobSet"
    assert found["metadata"] == {
        "name": "run1",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    assert set(found["spec"]) == {"failurePolicy", "replicatedJobs"}
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["restartStrategy"] == "BlockingRecreate"
    (slices,) = found["spec"]["replicatedJobs"]
    assert (slices["name"], slices["replicas"]) == ("slice", 2)
    job = slices["template"]["spec"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert (job["parallelism"], job["completions"]) == (64, 64)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
    assert pod["terminationGracePeriodSeconds"] == 300 and pod["serviceAccountName"] == "robot"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container == {
        "name": "worker",
        "image": "images/skysense:1",
        "command": ["bash", "launch/worker.sh"],
        "args": [
            "--extra",
            "tpu",
            "--processes",
            "128",
            "--env",
            "TPU_TYPE=tpu-v6e-slice",
            "--env",
            awkward.replace("$(", "$$("),
            *TRAIN,
        ],  # Kubernetes reads $$( as $(
        "resources": {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}},
    }


def restart_action(found, code=None, condition=None):
    """What Kubernetes and JobSet do with a pod that ends so (their first matching rules, their messages)."""
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        exits = rule.get("onExitCodes", {"values": []})
        if code in exits["values"]:
            assert (exits["containerName"], exits["operator"]) == ("worker", "In")
            reason = "PodFailurePolicy"
            message = (
                f"Container worker for pod default/a-0 failed with exit code {code} "
                f"matching FailJob rule at index {index}"
            )
            break
        if {"type": condition, "status": "True"} in rule.get("onPodConditions", []):
            reason = "PodFailurePolicy"
            message = f"Pod default/a-0 has condition {condition} matching FailJob rule at index {index}"
            break
    for rule in found["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    "end, action",
    [
        ({"code": 65}, "FailJobSet"),
        ({"code": 78}, "FailJobSet"),
        ({"code": 65, "condition": "DisruptionTarget"}, "FailJobSet"),
        ({"code": 75}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 137, "condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 70}, "RestartJobSet"),
        ({"code": 74}, "RestartJobSet"),
        ({"code": 1}, "RestartJobSet"),
        ({"code": 137}, "RestartJobSet"),
    ],
)
def test_jobset_restarts_by_exit_code(end, action):
    assert restart_action(jobset(*GKE, "--dry-run", *TRAIN), **end) == action


def test_gke_other_verbs():
    assert dry("gke.sh", "delete", "--name", "run1", "--option=--namespace=eo", "--dry-run") == (
        "kubectl --namespace=eo delete jobset run1\n"
    )
    assert "jobset-name=run1" in dry("gke.sh", "logs", "--name", "run1", "--dry-run")
    assert dry("gke.sh", "status", "--name", "run1", "--dry-run").startswith("kubectl get jobset run1 -o wide\n")
