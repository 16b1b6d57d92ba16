"""What the README says is so: its snippets run, and its tables leave nothing out."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf import json_format

from tests.fakes.ollama import FakeModel, FakeOllama
from tests.integration.service import House, chat, house
from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import kept_pb2
from unisono.config import Settings
from unisono.core import errors
from unisono.edge.rest.openapi import document

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


async def test_the_first_call_from_python_answers() -> None:
    """The Python snippet, as it stands, asks a service and gets an answer for each question."""
    (snippet,) = [block for block in blocks("python") if "import grpc" in block]
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)  # that it runs is the point
    ask = names["ask"]
    assert callable(ask)
    # The snippet leaves the choice of the model to a backend that has one.
    async with house(models=[FakeModel(name="only")]) as h:
        answers = await ask(h.target, ["[[say=Rome]]", "[[say=Paris]]"])
    assert answers == {"question-0": "Rome", "question-1": "Paris"}


async def test_openai_s_client_answers(tmp_path: Path) -> None:
    """The snippet for OpenAI's client, as it stands, with the port that is the default."""
    (snippet,) = [block for block in blocks("python") if "from openai import OpenAI" in block]
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)  # that it runs is the point
    answers = names["answers"]
    assert callable(answers)
    assert f"http://{Settings.model_fields['http_listen'].default}/v1" in snippet
    body = {"messages": [{"role": "user", "content": "[[say=Rome]]"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "requests.jsonl").write_text(json.dumps(line) + "\n")
    async with house(models=[FakeModel(name="only")], keeps_in=tmp_path / "data", with_http=True) as h:
        found = await asyncio.to_thread(answers, f"{h.http_url}/v1", str(tmp_path / "requests.jsonl"))
    assert json.loads(found)["response"]["body"]["choices"][0]["message"]["content"] == "Rome"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_the_http_calls_answer(tmp_path: Path) -> None:
    """As they are printed, but for the port: a batch that came by gRPC is read and tried again, and one is run."""
    own_port = Settings.model_fields["http_listen"].default
    snippets = [block for block in blocks("sh") if own_port in block]
    assert len(snippets) == 2
    async with house(models=[FakeModel(name="only")], keeps_in=tmp_path / "data", with_http=True) as h:
        batch = await h.submit([chat("a", "[[say=Rome]]"), chat("b", model="absent")], model="only")
        _ = await h.attach(batch.batch_id)
        said = ""
        for snippet in snippets:
            assert f" {own_port}/" in snippet or f'"{own_port}/' in snippet
            lines = snippet.replace(own_port, h.http_url).replace("curl ", "curl -sS --fail-with-body ")
            said += await in_a_clone(lines, tmp_path, BATCH=batch.batch_id)
            (tmp_path / "service").unlink()
        children = [one async for one in kept_batches(h) if one.parent_batch_id == batch.batch_id]
    assert said.count("Rome") == 2
    assert "event: summary" in said
    assert len(children) == 1
    assert '"pending_batches":' in said
    assert '"throughput_gain":' in said or '"processing_time":' in said
    for path in re.findall(r"`(/[a-z.]+(?:/[a-z]+)*)`", README[README.index("one that came by gRPC too") :]):
        if path.startswith(("/api/batch/", "/health", "/ready", "/metrics", "/openapi")):
            assert path in document()["paths"], path


async def kept_batches(h: House) -> AsyncIterator[kept_pb2.KeptBatch]:
    """All that are kept."""
    for one in (await h.stub.ListBatches(pb.ListBatchesRequest())).batches:
        yield one


def test_the_grpcurl_call_is_one_of_the_contract() -> None:
    """What grpcurl is given is a RunBatchRequest, and the method exists."""
    (command,) = [block for block in blocks("sh") if "grpcurl" in block]
    found = re.search(r"-d '(.*?)' (\S+) (\S+)/(\S+)", command, re.DOTALL)
    assert found is not None
    text, target, service, method = found.groups()
    request = json_format.Parse(text, pb.RunBatchRequest())
    assert len(request.items) == len(json.loads(text)["items"])
    assert target == Settings.model_fields["listen"].default
    assert method in pb.DESCRIPTOR.services_by_name["BatchInference"].methods_by_name
    assert service == pb.DESCRIPTOR.services_by_name["BatchInference"].full_name


async def in_a_clone(snippet: str, folder: Path, **ours: str) -> str:
    """Runs lines of a shell as they are printed; all must succeed. What they said."""
    (folder / "service").symlink_to(ROOT / "service")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("UNISONO_", "OLLAMA_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = await asyncio.create_subprocess_exec(
        *("bash", "-e", "-c", snippet),
        cwd=folder,
        env=inherited | {"PATH": path, "UNISONO_STATE_DIR": "none", **ours},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(shell.communicate(), 60)
    assert shell.returncode == 0, said.decode()
    return said.decode()


def examples() -> int:
    """How many conversations the examples are."""
    return len((ROOT / "service" / "unisono" / "examples" / "batch.jsonl").read_text().splitlines())


async def test_the_command_lines_run(tmp_path: Path) -> None:
    """As they are printed, in a clone: the file is there, and no model has to be named."""
    (snippet,) = [block for block in blocks("sh") if block.startswith("unisono run")]
    async with FakeOllama([FakeModel(name="only")]) as fake:
        _ = await in_a_clone(snippet, tmp_path, OLLAMA_HOST=fake.url, UNISONO_SERVER="127.0.0.1:1")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == examples()


async def test_a_batch_is_kept_by_the_command_lines(tmp_path: Path) -> None:
    """Submitted, watched to its end, its results written, its state told; an answer for each line, in its form."""
    (snippet,) = [block for block in blocks("sh") if "unisono submit" in block]
    async with house(keeps_in=tmp_path / "kept", models=[FakeModel(name="only")]) as h:
        said = await in_a_clone(snippet, tmp_path, UNISONO_SERVER=h.target)
    assert f"  items            {examples()} completed" in said
    assert f"  items            {examples()} of {examples()} completed" in said
    written = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (ROOT / "service/unisono/examples/batch.jsonl").read_text().splitlines()]
    assert {line.get("custom_id", "") or line["id"] for line in written} == {
        line.get("custom_id") or line["id"] for line in asked
    }
    assert sum("custom_id" in line for line in written) == sum("custom_id" in line for line in asked)


def test_every_rpc_is_listed() -> None:
    """The table of rpcs leaves none out."""
    for method in pb.DESCRIPTOR.services_by_name["BatchInference"].methods:
        assert f"`{method.name}`" in README


def reasons(kind: type[errors.UnisonoError]) -> set[str]:
    """The reasons of a class of errors and all below it, but for those that only group others."""
    # An adapter may have some of its own, which never travel.
    below = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    own = {kind.reason} if not below else set()
    return own.union(*(reasons(child) for child in below))


def test_every_reason_is_explained() -> None:
    """The table of reasons has each that an error can carry, and none that no error does."""
    table = README[README.index("| Reason |") : README.index("## Settings")]
    explained = set(re.findall(r"`([A-Z][A-Z_]+)`", re.sub(r"\|[^|]*\|[^|]*\|$", "|", table, flags=re.MULTILINE)))
    assert explained == reasons(errors.UnisonoError)


def test_every_setting_is_listed() -> None:
    """The table of settings has each variable, by its whole name or with its siblings."""
    table = README[README.index("## Settings") :]
    for name in Settings.model_fields:
        short = f"…_{name.removeprefix('embedded_').upper()}`"
        assert f"`UNISONO_{name.upper()}`" in table or (name.startswith("embedded_") and short in table), name


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z][a-z-]*)", README)) - {"sure"}))
def test_every_make_target_exists(target: str) -> None:
    """No command of the README is unknown to make."""
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_links_lead_somewhere() -> None:
    """Every relative link names a file that is there."""
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / link).exists(), link
