"""The Kubernetes jobs: their parts agree with each other, and their commands with the command line."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.recipes import ROOT, TINY

from nemo_pivotrl.config.load import load_recipe

FOLDER = ROOT / "deploy/kubernetes"


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def job(name: str) -> dict[str, Any]:
    (found,) = [made for made in objects(name) if made["kind"] == "Job"]
    return found


def words_of(name: str, folder: Path, index: int) -> list[str]:
    """What the container of the pod with this index would run, seen by programs that only print their arguments."""
    (container,) = job(name)["spec"]["template"]["spec"]["containers"]
    for program in ("nemo-pivotrl", "python"):
        path = folder / program
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
        path.chmod(0o755)
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    if "PIVOTRL" in given:
        given["PIVOTRL"] = Path(given["PIVOTRL"]).name
    environment = {**given, "JOB_COMPLETION_INDEX": str(index), "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [*container["command"], *container["args"]]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("name", ["profile.yaml", "train.yaml"])
def test_a_jobs_parts_agree(name: str) -> None:
    spec = job(name)["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert environment["SHARDS" if name == "profile.yaml" else "NODES"] == str(spec["completions"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert (
        pod["securityContext"]["runAsNonRoot"]
        and f"USER {pod['securityContext']['runAsUser']}" in (ROOT / "Dockerfile").read_text()
    )
    if "GPUS" in environment:
        assert int(environment["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        assert rule.get("onExitCodes", {"containerName": container["name"]})["containerName"] == container["name"]
        assert pod["restartPolicy"] == "Never"  # Kubernetes refuses the policy otherwise


def test_the_service_finds_the_pods_and_names_the_first() -> None:
    service, train = objects("train.yaml")
    template = train["spec"]["template"]
    assert service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    (container,) = template["spec"]["containers"]
    master = {entry["name"]: entry["value"] for entry in container["env"]}["MASTER"]
    assert master == f"{train['metadata']['name']}-0.{service['metadata']['name']}"  # an Indexed Job names its pods so


def test_a_pod_profiles_its_own_shard_counted_from_0(tmp_path: Path) -> None:
    assert words_of("profile.yaml", tmp_path, 7)[1:] == ["profile", "recipe.yaml", "--shard", "7/8"]


def test_a_pod_joins_the_training_by_its_index(tmp_path: Path) -> None:
    words = words_of("train.yaml", tmp_path, 1)[1:]
    at = words.index("nemo_pivotrl.cli")
    assert words[at + 1 :] == ["train", "recipe.yaml", "policy.backend=megatron"]
    options = dict(zip(words[2:at:2], words[3:at:2], strict=False))
    assert options["--node-rank"] == "1" and options["--nnodes"] == "2" and options["--nproc-per-node"] == "8"
    assert options["--master-addr"] == "pivotrl-train-0.pivotrl-train"


def test_rays_pods_agree_with_each_other_and_with_the_package() -> None:
    (made,) = objects("profile-ray.yaml")
    assert made["kind"] == "RayJob" and made["apiVersion"] == "ray.io/v1"
    cluster = made["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "deploy/docker/vllm.txt").read_text()
    (workers,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert f"USER {pod['securityContext']['runAsUser']}" in (ROOT / "Dockerfile").read_text()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, stage, path, *overrides = made["spec"]["entrypoint"].split()
    recipe = load_recipe(TINY, overrides)
    assert (program.rpartition("/")[2], stage, path) == ("nemo-pivotrl", "profile", "recipe.yaml")
    assert recipe.executor == "ray" and recipe.workers == workers["replicas"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert recipe.ray.gpus_per_worker == limits["nvidia.com/gpu"]
