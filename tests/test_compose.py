"""docker-compose.yml and HAProxy's configuration agree with each other and with the settings."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from service import config
from service.config import PREFIX, Settings
from tests.balancers import TEMPLATE
from tests.servers import ROOT, needs, settings_of

_BASE, _GPU = "docker-compose.yml", "docker-compose.gpu.yml"
FILES = {
    "cpu": (_BASE,),
    "cuda": (_BASE, _GPU),
    "sd": (_BASE, "docker-compose.sd.yml"),
    "sd on cuda": (_BASE, _GPU, "docker-compose.sd.yml"),
    "sdxl": (_BASE, "docker-compose.sdxl.yml"),
    "sdxl on cuda": (_BASE, _GPU, "docker-compose.sdxl.yml"),
}
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
BESIDE_A_BODY = 65_536  # bytes of a request's other parts


def composed(target: str) -> dict[str, Any]:
    """The services of merged files. Implements the merging that our files need."""
    services: dict[str, Any] = {}
    for name in FILES[target]:
        services = merged(services, yaml.safe_load((ROOT / name).read_text())["services"])
    return services


def merged(below: Any, above: Any) -> Any:
    """Two values as compose merges them, where no list stands over another."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        assert not (isinstance(below, list) and below)
        return above
    return {**below, **{name: merged(below.get(name), value) for name, value in above.items()}}


@pytest.fixture(params=FILES)
def services(request: pytest.FixtureRequest) -> dict[str, Any]:
    return composed(request.param)


@pytest.fixture
def settings(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The program's settings in a replica."""
    variables = services["stepwise"]["environment"].items()
    return settings_of({name: without_variables(value) for name, value in variables if value is not None}, monkeypatch)


def without_variables(value: str) -> str:
    """A value as compose expands it if no variable is set: `${NAME:-default}` is the default.

    compose passes a lone variable on as it is, so it stays unset.
    """
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) / (1000 if unit == "ms" else 1)


def default(variable: str) -> str:
    """HAProxy's value for a variable that the environment lacks: `${NAME-default}`."""
    [value] = set(re.findall(rf"\$\{{{PREFIX}{variable}-([^}}]*)\}}", TEMPLATE.read_text()))
    return str(value)


@pytest.mark.slow
@needs("docker-compose")
@pytest.mark.parametrize("target", FILES)
def test_docker_compose_understands_the_files(target: str) -> None:
    arguments = [argument for name in FILES[target] for argument in ("-f", name)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    done = subprocess.run(
        ["docker-compose", *arguments, "config"], cwd=ROOT, env=inherited, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # it warns of unset variables
    known = yaml.safe_load(done.stdout)["services"]
    assert known.keys() == {"haproxy", "stepwise", "prometheus", "grafana"}
    merged_by_us = composed(target)
    replicas = without_variables(str(merged_by_us["stepwise"]["deploy"]["replicas"]))
    assert known["stepwise"]["deploy"]["replicas"] == int(replicas) == (2 if target == "cpu" else 1)
    for name, fields in known.items():
        for variable, value in fields.get("environment", {}).items():
            ours = merged_by_us[name]["environment"][variable]
            assert value == (None if ours is None else without_variables(ours))
    assert {name for name, fields in known.items() if "profiles" in fields} == {"prometheus", "grafana"}


@pytest.mark.slow
@needs("haproxy")
def test_haproxy_understands_its_configuration_without_any_variable() -> None:
    done = subprocess.run(
        ["haproxy", "-c", "-f", TEMPLATE], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()


def longest(services: dict[str, Any]) -> float:
    """How many seconds HAProxy lets an answer take, both while it runs and when it stops."""
    directives = re.findall(r'^ +(.*\S) "\$\{STEPWISE_LONGEST-', TEMPLATE.read_text(), re.MULTILINE)
    assert directives == ["hard-stop-after", "timeout server"]
    return seconds(services["haproxy"]["environment"].get("STEPWISE_LONGEST", default("LONGEST")))


def test_a_replica_is_not_killed_before_it_has_finished(services: dict[str, Any], settings: Settings) -> None:
    assert seconds(services["stepwise"]["stop_grace_period"]) >= settings.drain_timeout + 10
    assert seconds(services["haproxy"]["stop_grace_period"]) > longest(services)


def test_the_balancer_waits_longer_than_a_request_may_take(services: dict[str, Any], settings: Settings) -> None:
    assert longest(services) > settings.timeout


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_a_large_model_has_memory_and_time(model: str) -> None:
    """As much as its pod on Kubernetes."""
    kustomization = yaml.safe_load((ROOT / "deploy" / "kubernetes" / model / "kustomization.yaml").read_text())
    patches = [one for patch in kustomization["patches"] for one in yaml.safe_load(patch["patch"])]
    values = {one["path"].removeprefix("/spec/template/spec/"): one["value"] for one in patches}
    replica = composed(model)["stepwise"]
    container = "containers/0"
    assert (
        values[f"{container}/resources"]["limits"]["memory"] == f"{replica['deploy']['resources']['limits']['memory']}i"
    )
    assert values[f"{container}/env/-"]["value"] == replica["environment"]["STEPWISE_TIMEOUT"]
    assert values[f"{container}/env/1/value"] == replica["environment"]["STEPWISE_DRAIN_TIMEOUT"]
    assert replica["environment"]["STEPWISE_WEIGHTS"].endswith(f"/weights/{model}}}")


def test_every_upload_but_photos_may_be_asked_for_again(settings: Settings) -> None:
    """People have Stable Diffusion begin from photos. HAProxy does not keep so much for each request."""
    kept = TypeAdapter(ByteSize).validate_python(default("RETRIED_BODY"))
    if "sd" in str(settings.weights):
        assert settings.max_body == Settings.model_fields["max_body"].default > kept
    else:
        assert settings.max_body == kept - BESIDE_A_BODY


def test_the_balancer_finds_the_replicas(services: dict[str, Any], settings: Settings) -> None:
    name, port = default("REPLICAS").split(":")
    assert name in services
    assert int(port) == settings.port
    assert services[name]["expose"] == [port, str(settings.metrics_port)]
    [published] = services["haproxy"]["ports"]
    host, _, inside = without_variables(published).split(":")
    assert host == "127.0.0.1"  # open to the world only by an explicit setting
    assert f":{inside}" == default("BIND")


def test_replicas_believe_the_balancer(settings: Settings) -> None:
    assert settings.forwarded_allow_ips == "*"


def test_prometheus_asks_where_the_balancer_does_not(services: dict[str, Any], settings: Settings) -> None:
    """Then no spelling of a path leads a client of the balancer to the metrics."""
    [job] = [job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "stepwise"]
    [replicas] = job["dns_sd_configs"]
    assert replicas["names"] == ["stepwise"]
    assert replicas["port"] == settings.metrics_port
    assert default("REPLICAS").split(":")[1] != str(settings.metrics_port)
    assert not settings.public_metrics
    assert "ports" not in services["stepwise"]


def test_no_setting_that_is_empty_opens_a_replica(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unset stays unset. What is set to an empty value is passed on, and refused."""
    for name in ("STEPWISE_API_KEYS", "STEPWISE_CHECK", "STEPWISE_RECIPE_PROMPTS"):
        assert services["stepwise"]["environment"][name] is None
    for name, value in services["stepwise"]["environment"].items():
        if value is not None:
            monkeypatch.setenv(name, without_variables(value))
    config.refuse_open()


@needs("docker-compose")
@pytest.mark.parametrize("keys", [None, "", "alpha"])
def test_docker_compose_passes_keys_on_as_they_are(keys: str | None) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    env = inherited if keys is None else {**inherited, "STEPWISE_API_KEYS": keys}
    done = subprocess.run(["docker-compose", "config"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["services"]["stepwise"]["environment"]["STEPWISE_API_KEYS"] == keys


def test_what_is_mounted_is_there(services: dict[str, Any]) -> None:
    volumes = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["volumes"]
    for fields in services.values():
        for source, *_ in (volume.split(":") for volume in fields.get("volumes", [])):
            assert source in volumes or (ROOT / source).exists(), source


def test_the_image_has_the_target(services: dict[str, Any], request: pytest.FixtureRequest) -> None:
    target = services["stepwise"]["build"]["target"]
    assert services["stepwise"]["image"] == f"stepwise:{target}"
    stages = re.findall(r"^FROM .* AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.IGNORECASE)
    assert target in stages


@pytest.mark.parametrize("name", ["haproxy", "stepwise", "prometheus", "grafana"])
def test_nothing_may_do_more_than_it_must(services: dict[str, Any], name: str) -> None:
    assert services[name]["read_only"] is True
    assert services[name]["cap_drop"] == ["ALL"]
    assert services[name]["security_opt"] == ["no-new-privileges:true"]
    assert ":" in services[name]["image"]


def test_paths_of_the_configuration_are_those_of_its_image() -> None:
    [mount] = composed("cpu")["haproxy"]["volumes"]
    source, target, mode = mount.split(":")
    assert (ROOT / source).samefile(TEMPLATE)
    assert Path(target) == Path("/usr/local/etc/haproxy/haproxy.cfg")  # the path that the haproxy image reads
    assert mode == "ro"
