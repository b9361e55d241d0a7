"""Every manifest of deploy/, rendered and read by the tool of its platform; broken ones refused.

No Docker, cluster or cloud account is here: nothing is built, started or charged.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from wanflow.cli import build_parser, serve
from wanflow.cli.flags import ENVIRONMENT
from wanflow.serve.jobs import Job, new_id
from wanflow.serve.local import LocalStore

ROOT = Path(__file__).parents[2]
DEPLOY, GUIDES = ROOT / "deploy", ROOT / "docs" / "guides" / "deploy"
TOOLS = ROOT / ".venv-deploy" / "bin"

# What a user fills in that is not any text.
FILLED = {"STORAGE_ID": "42"}
SECRETS = {"WANFLOW_TOKEN": "a-token", "POSTGRES_PASSWORD": "a-password"}

# kind of check, manifest, a mistake to make in it, and what the tool says of that
CASES = [
    ("compose", "compose.yaml", ("stop_grace_period", "stop_grace"), "stop_grace"),
    ("compose", "compose.cpu.yaml", ("healthcheck", "health_check"), "health_check"),
    ("skypilot", "skypilot/task.yaml", ("accelerators", "accelerator"), "accelerator"),
    ("skypilot", "skypilot/service.yaml", ("    path:", "    pathh:"), "readiness_probe"),
    ("skypilot", "skypilot/service.yaml", ("    - infra: azure\n", ""), "runs on AWS"),
    ("eas", "aliyun/eas.json", ('"shm_size"', '"shmSize"'), "shmSize"),
    (
        "eas",
        "aliyun/eas.json",
        ('"port": 8000,\n      "env"', '"port": 8080,\n      "env"'),
        "8080",
    ),
    ("dlc", "aliyun/dlc.json", ('"PodCount"', '"podCount"'), "$.JobSpecs[0].podCount: unknown"),
    ("tione-service", "tencent/service.json", ('"HTTPGet": {"P', '"Http": {"P'), "Http: unknown"),
    ("tione-task", "tencent/task.json", ('"CFSSource"', '"CfsSource"'), "CfsSource: unknown key"),
    ("gongji", "gongji/task.json", ('"target_dir"', '"mount_path"'), "mount_path"),
]
COMMANDS = {"serve", "worker", "download", "generate", "doctor"}
KUSTOMIZATIONS = ["base", "keda", "trial", "weights"]


def tool(name: str) -> str:
    """A tool that `make deploy-tools` installed."""
    found = TOOLS / name
    assert found.exists(), f"{found} is missing; run: make deploy-tools"
    return str(found)


def run(*command: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": "", **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def rendered(file: Path) -> str:
    """A manifest with its placeholders filled in; compose and shells fill in their own."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        return text
    return re.sub(r"\$\{(\w+)\}", lambda match: FILLED.get(match[1], f"a-{match[1].lower()}"), text)


def checked(kind: str, texts: dict[str, str], folder: Path) -> str:
    """What the tool of a kind says of manifests, by their names; a line for each problem."""
    files = []
    for name, text in texts.items():
        (file := folder / name).write_text(text, encoding="utf-8")
        files.append(str(file))
    check = (tool("python"), str(ROOT / "tests" / "deploy" / "check.py"), kind)
    done = run(*check, *files, home=folder)
    assert done.returncode == bool(done.stdout.strip()), done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({case[0] for case in CASES}))
def test_a_platform_reads_its_manifests_and_finds_mistakes(kind: str, tmp_path: Path) -> None:
    texts, expected = {}, {}
    for number, (_, name, mistake, says) in enumerate(case for case in CASES if case[0] == kind):
        text = rendered(DEPLOY / name)
        assert mistake[0] in text, mistake
        texts[name.replace("/", "-")] = text
        texts[f"broken-{number}"] = text.replace(*mistake, 1)
        expected[f"broken-{number}"] = says
    said = checked(kind, texts, tmp_path)
    for name in texts:
        of_this = "".join(re.findall(f"{re.escape(name)}: (.*)", said))
        assert expected[name] in of_this if name in expected else not of_this, said


def composed(home: Path, *names: str, **more: str) -> subprocess.CompletedProcess[str]:
    """What podman-compose makes of files together, variables filled in; it needs no podman."""
    podman = home / "podman"
    podman.write_text("#!/bin/sh\necho podman version 5.0.0\n", encoding="utf-8")
    podman.chmod(0o755)
    files = [word for name in names for word in ("-f", str(DEPLOY / name))]
    return run(
        tool("podman-compose"), "--podman-path", str(podman), *files, "config", home=home, **more
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", [("compose.yaml",), ("compose.yaml", "compose.cpu.yaml")])
def test_compose_renders_and_keeps_secrets_where_they_belong(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    text = composed(tmp_path, *names, **SECRETS).stdout
    assert "${" not in text
    services = yaml.safe_load(text)["services"]
    said = checked("compose", {"rendered": yaml.safe_dump({"services": services})}, tmp_path)
    assert not said.strip()
    api, worker = services["api"]["environment"], services["worker"]["environment"]
    assert api["WANFLOW_TOKEN"] == "a-token" and "WANFLOW_TOKEN" not in worker
    assert api["WANFLOW_DB"] == "postgresql://wanflow:a-password@postgres/wanflow"
    gpu = bool(services["worker"]["deploy"]["resources"]["reservations"])
    assert gpu == (names == ("compose.yaml",)) == (worker["WANFLOW_CKPT_DIR"] == "/weights")
    (port,) = services["api"]["ports"]
    assert port.startswith("127.0.0.1:")
    for missing in SECRETS:
        done = composed(tmp_path, *names, **{**SECRETS, missing: ""})
        assert done.returncode != 0 and "set it in deploy/.env" in done.stderr


def kustomized(folder: Path, home: Path) -> subprocess.CompletedProcess[str]:
    return run(tool("kubectl"), "kustomize", str(folder), home=home)


def validated(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What kubernetes-validate says of a rendered stream, unknown keys refused."""
    file = folder / "rendered.yaml"
    file.write_text(text, encoding="utf-8")
    return run(tool("kubernetes-validate"), "--strict", str(file), home=folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_kubernetes_takes_what_kustomize_renders(name: str, tmp_path: Path) -> None:
    text = kustomized(DEPLOY / "kubernetes" / name, tmp_path).stdout
    done = validated(text, tmp_path)
    assert done.returncode == 0 and "passed" in done.stdout + done.stderr, done.stderr
    unknown = re.findall(r"find schema for kind (\w+)", done.stdout + done.stderr)
    assert unknown == (["ScaledObject", "TriggerAuthentication"] if name == "keda" else [])
    if name == "keda":
        broken = text.replace("cooldownPeriod", "coolDownPeriod")
        broken = broken.replace("parameter: connection", "param: connection")
        said = checked("keda", {"right": text, "broken": broken}, tmp_path)
        assert "coolDownPeriod" in said and "'param'" in said and "right:" not in said
    for pod in pods(text):
        if pod["metadata"]["name"] != "wanflow-postgres":
            holds_to_the_rules(pod["metadata"]["name"], pod["spec"]["template"])


@pytest.mark.slow
def test_a_mistake_in_kubernetes_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", copy)
    for file, right, wrong in (
        ("worker.yaml", "terminationGracePeriodSeconds", "terminationGraceSeconds"),
        ("api.yaml", "containerPort: 8000", 'containerPort: "8000"'),
    ):
        text = (copy / "base" / file).read_text("utf-8")
        (copy / "base" / file).write_text(text.replace(right, wrong), "utf-8")
        done = validated(kustomized(copy / "base", tmp_path).stdout, tmp_path)
        assert done.returncode != 0, file
        (copy / "base" / file).write_text(text, "utf-8")
    kustomization = copy / "keda" / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text("utf-8").replace("patches:", "patch:"))
    assert "patch" in kustomized(copy / "keda", tmp_path).stderr


def pods(text: str) -> list[dict[str, Any]]:
    """The objects of a stream that have a template of pods."""
    documents = list(yaml.safe_load_all(text))
    found = [document for document in documents if "template" in document.get("spec", {})]
    for document in found:
        selector = document["spec"].get("selector", {}).get("matchLabels", {})
        labels = document["spec"]["template"].get("metadata", {}).get("labels", {})
        assert selector.items() <= labels.items(), document["metadata"]["name"]
    return found


def holds_to_the_rules(name: str, template: dict[str, Any]) -> None:
    """No pod of ours is root, has an image without a version, or mounts what is not there."""
    spec = template["spec"]
    (container,) = spec["containers"]
    user, own = spec["securityContext"], container["securityContext"]
    assert user["runAsNonRoot"] and user["runAsUser"] == 10001, name
    assert not own["allowPrivilegeEscalation"] and own["readOnlyRootFilesystem"], name
    assert own["capabilities"] == {"drop": ["ALL"]} and not spec["automountServiceAccountToken"]
    assert re.search(r":[\w.-]*\d", container["image"]), container["image"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}, name
    if name == "wanflow-worker":
        assert spec["terminationGracePeriodSeconds"] >= 600
        (shm,) = (volume for volume in spec["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"


def test_keda_counts_the_jobs_that_want_a_worker(tmp_path: Path) -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes/keda/scaledobject.yaml").read_text())
    (scaled,) = (each for each in documents if each["kind"] == "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    store = LocalStore(tmp_path)
    for _ in range(3):
        store.submit(Job(new_id(), {"prompt": "a red circle"}))
    begun, done = store.claim("one"), store.claim("two")
    assert begun and done and store.finish(done, "completed")
    assert store.run(query, []) == [(2,)]
    store.close()


@pytest.mark.slow
def test_the_dockerfile_is_clean(tmp_path: Path) -> None:
    file = DEPLOY / "Dockerfile"
    done = run(tool("hadolint"), str(file), home=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    text = file.read_text(encoding="utf-8")
    for right, wrong, rule in (
        ("${CUDA}-base-ubuntu24.04", "latest", "DL3007"),
        ('CMD ["serve"]', "CMD serve", "DL3025"),
        ("--no-install-recommends ", "", "DL3015"),
    ):
        broken = tmp_path / "Dockerfile"
        broken.write_text(text.replace(right, wrong), "utf-8")
        assert rule in run(tool("hadolint"), str(broken), home=tmp_path).stdout


def test_the_image_is_one_user_that_is_not_root_and_holds_no_weights() -> None:
    lines = (DEPLOY / "Dockerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and line[0] not in "# "]
    last = dict(words)  # of each instruction
    assert last["USER"] == "10001:10001"
    assert json.loads(last["ENTRYPOINT"]) == ["wanflow"] and json.loads(last["CMD"]) == ["serve"]
    assert "/healthz" in last["HEALTHCHECK"]
    copied = [value for name, value in words if name in ("COPY", "ADD")]
    assert copied == ["constraints.txt /opt/wanflow/"]


@pytest.mark.slow
def test_the_context_of_the_image_is_enough_to_build_the_package(tmp_path: Path) -> None:
    """No Docker is here: what .dockerignore lets through is built by the same pip command."""
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    context = tmp_path / "context"
    context.mkdir()
    for rule in rules[1:]:
        if rule.startswith("!"):
            source = ROOT / rule[1:]
            if source.is_dir():
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, context / rule[1:], ignore=skip)
            else:
                shutil.copy(source, context)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(context))
    done = run(*pip, *build, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("wanflow-*.whl"))) == 1


def words(text: str) -> list[list[str]]:
    """The arguments of wanflow in a manifest: of containers, of shells, of units."""
    found = [shlex.split(match) for match in re.findall(r"bin/wanflow ([^\n]*)", text)]
    found += [shlex.split(match) for match in re.findall(r'"(?:wanflow) ([^"]*)"', text)]
    listed = re.findall(r"(?:args|command): (\[[^\]]*\])", text)
    return found + [argv for one in listed if (argv := yaml.safe_load(one))[0] in COMMANDS]


STANDS_FOR = {
    "$TASK": "t2v-A14B",
    "${WANFLOW_TASK:-t2v-A14B}": "t2v-A14B",
    "$VARIANT": "official",
    "$@": "--prompt=a red circle",
    "$OPTIONS": "--size=1280*720",
}
MANIFESTS = [file for file in sorted(DEPLOY.rglob("*")) if file.is_file()]


def test_every_command_of_a_manifest_is_one_of_wanflow() -> None:
    seen = set()
    for file in MANIFESTS:
        for argv in words(file.read_text("utf-8")):
            argv = [STANDS_FOR.get(word, word) for word in argv]
            build_parser().parse_args(argv)
            seen.add(argv[0])
    assert seen == COMMANDS


def test_every_variable_of_a_manifest_is_read() -> None:
    read = set(ENVIRONMENT.values())
    own = {"WANFLOW_TASK", "WANFLOW_IMAGE"}  # of compose
    for file in MANIFESTS:
        assert set(re.findall(r"WANFLOW_[A-Z_]+", file.read_text("utf-8"))) <= read | own, file
    guide = (GUIDES / "index.md").read_text("utf-8")
    assert read <= set(re.findall(r"WANFLOW_[A-Z_]+", guide))


def test_a_password_of_the_environment_is_on_no_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANFLOW_DB", "postgresql://wanflow:s3cret@db/wanflow")
    monkeypatch.setenv("WANFLOW_GPUS", "0,1")
    args = build_parser().parse_args(["serve", "--ckpt_dir", "nano", "--gpus", "2"])
    serve.environment(args)
    argv = serve.worker_command(args, tmp_path)
    assert args.db and "s3cret" not in " ".join(argv)
    assert argv[argv.index("--gpus") + 1] == "2" and "nano" in argv


def unit(name: str, folder: Path) -> Path:
    """A unit whose programs are ones that every machine has: verify looks for them."""
    text = (DEPLOY / "vm" / name).read_text("utf-8")
    assert "/opt/wanflow/bin/wanflow " in text
    text = re.sub(r"/opt/wanflow/bin/wanflow|/usr/bin/nvidia-modprobe", "/bin/true", text)
    (folder / name).write_text(text, "utf-8")
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wanflow-serve.service", "wanflow-worker.service"])
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    assert shutil.which("systemd-analyze"), "systemd-analyze is missing; run: make services"
    file = unit(name, tmp_path)
    done = run("systemd-analyze", "verify", str(file), home=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    secure = ("systemd-analyze", "security", "--offline=true", "--threshold=25", str(file))
    assert (done := run(*secure, home=tmp_path)).returncode == 0, done.stdout[-400:]
    text = file.read_text("utf-8")
    file.write_text(text.replace("NoNewPrivileges", "NoPrivileges"), "utf-8")
    assert "NoPrivileges" in run("systemd-analyze", "verify", str(file), home=tmp_path).stderr
    open_ = re.sub(r"(?m)^(Protect|Restrict|SystemCall|NoNew)\w+=.*$", "", text)
    file.write_text(open_, "utf-8")
    assert run(*secure, home=tmp_path).returncode != 0


@pytest.mark.parametrize("name", sorted({case[1] for case in CASES if "json" in case[1]}))
def test_a_guide_names_what_is_filled_in(name: str) -> None:
    wanted = set(re.findall(r"\$\{(\w+)\}", (DEPLOY / name).read_text("utf-8")))
    for language in (".md", ".zh-CN.md"):
        guide = (GUIDES / (name.split("/")[0] + language)).read_text("utf-8")
        assert wanted <= set(re.findall(r"\b[A-Z][A-Z_]+\b", guide)), language
