"""What deploy/ says is so, as far as that shows without Docker: files exist, names are known, figures are served."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # PyYAML carries no types, and is used by this file only

from tests.fakes.scraped import Scraped
from tests.integration.service import LIMIT_S, chats, house
from tests.integration.test_metrics import scrape
from unisono.config import Settings
from unisono.core.idle import IdleReason
from unisono.edge.cli import trace_command

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "unisono.json").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
# This machine, from itself and from a container.
HERE = {"127.0.0.1", "host.docker.internal"}
# A comment, or one instruction with all its lines.
INSTRUCTIONS = [
    line.replace("\\\n", " ").split(maxsplit=1)
    for line in re.findall(r"^(?!#)\S(?:.*\\\n)*.*$", DOCKERFILE, re.MULTILINE)
]


def written(kind: str) -> list[str]:
    """What the Dockerfile's instructions of a kind say."""
    return [rest for name, rest in INSTRUCTIONS if name == kind]


def default_of(text: str) -> str:
    """A value as compose reads it where no variable is set."""
    inner = re.sub(r"\$\{[A-Z_]+:?-([^${}]*)\}", r"\1", text)
    return inner if inner == text else default_of(inner)


# -- Compose -----------------------------------------------------------------------------------------------------


def test_the_stack_is_whole() -> None:
    """The service, its backend, and what shows them; each has a health check and comes back after a restart."""
    assert set(SERVICES) == {"ollama", "unisono", "jaeger", "prometheus", "grafana"}
    known = {
        "image", "build", "command", "environment", "ports", "volumes", "healthcheck", "depends_on", "restart",
        "stop_grace_period", "extra_hosts",
    }  # fmt: skip
    for name, service in SERVICES.items():
        assert set(service) <= known, name
        assert service["restart"] == "unless-stopped"
        if name != "unisono":
            assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES
            assert how == {"condition": "service_healthy"}


def test_images_are_pinned_and_ports_are_on_loopback() -> None:
    """An exact version each; nothing of this asks who calls."""
    for name, service in SERVICES.items():
        tag = default_of(service["image"]).rpartition(":")[2]
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag) or (name == "unisono" and tag == "local"), name
        for port in service.get("ports", ()):
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), name


def test_what_is_mounted_exists() -> None:
    """Files beside compose.yaml, and volumes that it names."""
    named: set[str] = set()
    for service in SERVICES.values():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
                assert mount.endswith(":ro")
            else:
                named.add(source)
    assert named == set(COMPOSE["volumes"])


def test_the_service_is_built_from_here_and_set_by_what_it_knows() -> None:
    """Each of its variables is a setting, or one of OpenTelemetry's; addresses name services of the file."""
    build = SERVICES["unisono"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert f"AS {build['target']}\n" in DOCKERFILE
    for variable, value in SERVICES["unisono"]["environment"].items():
        if variable.startswith("UNISONO_"):
            assert variable.removeprefix("UNISONO_").lower() in Settings.model_fields
        else:
            assert variable in {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME"}
        host = re.match(r"http://([a-z]+):", default_of(value))
        assert host is None or host[1] in SERVICES
    given = {name: default_of(value) for name, value in SERVICES["unisono"]["environment"].items()}
    made = Settings.model_validate(
        {name.removeprefix("UNISONO_").lower(): v for name, v in given.items() if v and name[0] == "U"}
    )
    assert made.slots == int(default_of(SERVICES["ollama"]["environment"]["OLLAMA_NUM_PARALLEL"]))
    assert made.ollama_url == "http://ollama:11434"
    # What runs may end before it is killed.
    assert float(SERVICES["unisono"]["stop_grace_period"].removesuffix("s")) > made.drain


def test_jaeger_keeps_few_traces() -> None:
    """In memory; a search of `unisono trace-check` may not ask for more than it keeps."""
    (option,) = SERVICES["jaeger"]["command"]
    setting, _, value = option.partition("=")[2].partition("=")
    assert setting.endswith(".memory.max_traces")
    assert int(value) > trace_command._SEARCH_DEPTH
    assert f"the last {int(value):,}," in (DEPLOY / "README.md").read_text()


def test_a_gpu_is_a_matter_of_comments() -> None:
    """Without their #, these lines give Ollama all NVIDIA GPUs."""
    text = (DEPLOY / "compose.yaml").read_text()
    before, _, after = text.partition("    # deploy:\n")
    lines = after.splitlines(keepends=True)
    commented = lines[: next(n for n, line in enumerate(lines) if "#" not in line)]
    freed = "".join(line.replace("# ", "", 1) for line in commented)
    whole = yaml.safe_load(before + "    deploy:\n" + freed + "".join(lines[len(commented) :]))
    (device,) = whole["services"]["ollama"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


# -- Figures -----------------------------------------------------------------------------------------------------


def expressions() -> list[str]:
    """All PromQL of the dashboard."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]


def labels_of(seen: Scraped) -> dict[str, set[str]]:
    """The labels of each metric, as far as it has samples."""
    found: dict[str, set[str]] = {}
    for sample in seen.samples:
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


async def test_every_figure_that_is_drawn_is_served() -> None:
    """Names and labels of the dashboard are those of a service that has answered a batch."""
    async with house(with_metrics=True) as h:
        _ = await h.run(chats(4))
        seen = await scrape(h.metrics_url)
    labels = labels_of(seen)
    drawn: set[str] = set()
    for expression in expressions():
        for opened, closed in ("()", "{}", "[]"):
            assert expression.count(opened) == expression.count(closed), expression
        for name, selector in re.findall(r"(unisono_[a-z_]+)(?:\{([^}]*)\})?", expression):
            assert name in seen.names, expression
            drawn.add(name)
            wanted = set(re.findall(r"([a-z]+)\s*=~?", selector))
            wanted |= set(re.findall(r"[a-z]+", " ".join(re.findall(r"by \(([^)]*)\)", expression))))
            assert wanted <= labels.get(name, wanted), expression
        for legend in re.findall(r"\$([a-z_]+)", expression):
            assert legend in {"backend", "model", "__rate_interval", "__range"} or legend.startswith("__")
    # What is counted is shown, but for the version.
    families = {family.name for family in seen.families if family.name.startswith("unisono_")}
    families -= {"unisono_build_info", "unisono_items_per_pass"}
    assert all(any(name.startswith(family) for name in drawn) for family in families)


def test_each_reason_of_idle_slots_is_explained() -> None:
    """In the table, and beside the panel."""
    (panel,) = [panel for panel in DASHBOARD["panels"] if panel["title"] == "Idle slots"]
    rows = re.findall(r"^\| `([a-z_]+)` \|", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(reason.value for reason in IdleReason)
    for reason in IdleReason:
        assert re.search(rf"\b{reason.value}\b", panel["description"]), reason


def test_panels_have_places_of_their_own() -> None:
    """Ids differ, none lies on another, each says what it shows, and all ask the source that is provisioned."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["description"].endswith(".")
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    (sources,) = (DEPLOY / "grafana" / "provisioning" / "datasources").iterdir()
    provisioned = {source["uid"]: source for source in yaml.safe_load(sources.read_text())["datasources"]}
    assert {panel["datasource"]["uid"] for panel in panels} == {"prometheus"} < set(provisioned)
    for source in provisioned.values():
        host = re.match(r"http://([a-z]+):", source["url"])
        assert host is not None
        assert host[1] in SERVICES


def test_grafana_finds_the_dashboard_and_prometheus_the_service() -> None:
    """Paths and addresses agree with compose.yaml and the image."""
    (provider,) = (DEPLOY / "grafana" / "provisioning" / "dashboards").iterdir()
    (one,) = yaml.safe_load(provider.read_text())["providers"]
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    assert one["options"]["path"] == mounts["./grafana/dashboards"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{one['options']['path']}/unisono.json"
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in SERVICES
    assert f"UNISONO_METRICS_LISTEN=0.0.0.0:{port}" in DOCKERFILE
    assert job.get("metrics_path", "/metrics") == "/metrics"


# -- The image ---------------------------------------------------------------------------------------------------


def test_every_stage_is_named_and_pinned() -> None:
    """By an exact version of Python that the service runs on."""
    stages = [re.fullmatch(r"python:3\.(\d+)\.\d+-slim-[a-z]+ AS ([a-z]+)", stage) for stage in written("FROM")]
    assert [stage[2] for stage in stages if stage] == ["build", "service"]
    assert all(stage and int(stage[1]) >= 11 for stage in stages)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    """Each source is a file or folder here that .dockerignore lets through; or comes from an earlier stage."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert "*" in lines
    used: set[str] = set()
    for copied in written("COPY"):
        words = copied.split()
        if words[0].startswith("--from="):
            assert words[0] == "--from=build"
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists(), source
            used.update(each for each in allowed if fnmatch.fnmatch(source, each))
            assert any(fnmatch.fnmatch(source, each) for each in allowed), source
    assert used == set(allowed)


def test_it_runs_as_nobody_in_particular() -> None:
    """By number, so that a cluster can see that it is not root; and writes to its volume only."""
    assert written("USER") == ["10001:10001"]
    last = DOCKERFILE[DOCKERFILE.rindex("FROM ") :]
    assert last.index("USER ") < last.index("ENTRYPOINT ")
    state = re.search(r"UNISONO_STATE_DIR=(\S+)", DOCKERFILE)
    assert state is not None
    assert written("VOLUME") == [state[1]]
    assert any(mount.endswith(f":{state[1]}") for mount in SERVICES["unisono"]["volumes"])
    for variable in re.findall(r"(UNISONO_[A-Z_]+)=", DOCKERFILE):
        assert variable.removeprefix("UNISONO_").lower() in Settings.model_fields


def test_packages_are_installed_by_their_hashes() -> None:
    """From whatever index the builder is set to: none is named."""
    installs = [line for line in DOCKERFILE.splitlines() if "pip install" in line]
    assert all("--no-deps" in line for line in installs)
    assert [line for line in installs if "--require-hashes" not in line and "/wheels/" not in line] == []
    assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", DOCKERFILE)
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix in {".yaml", ".json", ".py", ".md", ""}:
            # Addresses are of this machine, or of the compose file's services.
            elsewhere = set(re.findall(r"https?://([a-z0-9.]+)", path.read_text())) - {*SERVICES, *HERE}
            assert not elsewhere, path


@pytest.mark.parametrize(
    ("listen", "asked"),
    [
        ("0.0.0.0:1", "127.0.0.1:1"),
        (":1", "127.0.0.1:1"),
        ("[::]:1", "[::1]:1"),
        ("[::1]:1", "[::1]:1"),
        ("10.0.0.7:1", "10.0.0.7:1"),
        ("unix:/run/u.sock", "unix:/run/u.sock"),
    ],
)
def test_the_health_check_asks_where_the_service_listens(
    monkeypatch: pytest.MonkeyPatch, listen: str, asked: str
) -> None:
    """What listens everywhere is asked on loopback, all else at its own address."""
    monkeypatch.delenv("UNISONO_SERVER", raising=False)
    monkeypatch.setenv("UNISONO_LISTEN", listen)
    assert runpy.run_path(str(DEPLOY / "health.py"))["target"]() == asked


@pytest.mark.parametrize("is_there", [True, False])
async def test_the_health_check_tells_whether_the_service_answers(*, is_there: bool) -> None:
    """Exit code 0 where it does, 1 where nobody does."""
    async with house() as h:
        target = h.target if is_there else "127.0.0.1:1"
        listen = target.replace("127.0.0.1", "0.0.0.0")
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(DEPLOY / "health.py"), env={"UNISONO_LISTEN": listen}
        )
        code = await asyncio.wait_for(process.wait(), LIMIT_S)
    assert code == (0 if is_there else 1)
    assert "/opt/unisono/health.py" in written("HEALTHCHECK")[0]
    assert "COPY deploy/health.py /opt/unisono/health.py" in DOCKERFILE


def test_links_lead_somewhere() -> None:
    """Every relative link of deploy/README.md names a file that is there, and every panel is explained."""
    text = (DEPLOY / "README.md").read_text()
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (DEPLOY / link).exists(), link
    table = text[text.index("| Panel |") : text.index("## Good to know")]
    for word in ("Backends", "Queue", "Idle slots", "Items per pass", "Spread of release", "First token", "Loads"):
        assert word in table
        assert any(word.lower() in panel["title"].lower() for panel in DASHBOARD["panels"]), word
