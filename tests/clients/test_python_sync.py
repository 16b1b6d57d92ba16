"""The client's sync twin, over a service in a process of its own: the same names, and plain loops."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.clients.served import served
from unisono_client import Chat, Delta, RefusedError, Result, State, UnisonoError, UnreachableError, sync
from unisono_client.sync import Client, batch_benchmark, batch_generate


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """Where a service listens."""
    with served(pass_s=0.001, settings={"max_open_items": "500"}) as found:
        yield found


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    """A client of it."""
    with Client(target) as made:
        yield made


def test_a_batch_in_a_plain_loop(client: Client) -> None:
    """Results as they finish or in order, progress in the calling thread, the report at the end."""
    told: list[tuple[int, int, threading.Thread]] = []
    run = client.run(
        [Chat(f"[[say=answer {n}]]", n=2 if n == 1 else None) for n in range(4)],
        in_order=True,
        on_progress=lambda *at: told.append((*at, threading.current_thread())),
    )
    assert [result.content for result in run] == ["answer 0", "answer 1", "answer 1", "answer 2", "answer 3"]
    assert run.report is not None
    assert run.report.batch_id == run.batch_id
    assert told[-1] == (5, 5, threading.current_thread())
    assert list(client.run([])) == []


def test_items_without_end_and_leaving(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless source is asked for what can be sent; leaving the loop cancels the batch."""
    monkeypatch.setattr(sync, "_AHEAD", 200)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield f"[[say=ok]] {taken}"

    with client.run(endless()) as run:
        for _, result in zip(range(20), run, strict=False):
            assert result.content == "ok"
    assert taken < 20_000
    assert State.CANCELLED in {result.state for result in client.attach(run.batch_id)}


def test_a_session(client: Client) -> None:
    """10 items are added before the first is read; another thread may add while this one reads."""
    with client.session(release={"size": 1}) as session:
        session.add(*(f"[[say={n}]]" for n in range(10)))

        def add() -> None:
            session.add("[[say=10]]")
            session.release()
            session.close_input()

        adder = threading.Thread(target=add)
        adder.start()
        assert sorted(int(result.content) for result in session) == list(range(11))
        adder.join()
        assert session.is_over
        assert session.report is not None
        assert (session.added, session.outstanding, session.unsent) == (11, 0, 0)


def test_cancelling(client: Client) -> None:
    """By the session, the run, and the batch's id."""
    slow = "[[tokens=100000]]"
    with client.session(release={"size": 1}, options={"num_ctx": 100_000}) as session:
        session.add(slow, slow)
        session.cancel("0")
        assert [result.item_id for result in session.take()] == ["0"]
        assert client.cancel(session.batch_id) == (1, 1)
        assert [result.state for result in session] == [State.CANCELLED]


def test_one_answer_and_one_that_streams(client: Client) -> None:
    """`infer` and `stream`."""
    assert client.infer("[[say=Rome]]").content == "Rome"
    *deltas, result = client.stream("[[tokens=30]]", deltas={"flush_interval": 0.01})
    assert isinstance(result, Result)
    assert "".join(each.content for each in deltas if isinstance(each, Delta)) == result.content


def test_errors(client: Client) -> None:
    """What is wrong with a call is raised here, in the calling thread."""
    with pytest.raises(RefusedError):
        _ = list(client.run(["x"], max_attempts=99))
    with pytest.raises(UnisonoError, match="BATCH_NOT_FOUND"):
        _ = list(client.attach("batch_none"))
    with pytest.raises(ZeroDivisionError):
        _ = list(client.run(str(1 // n) for n in (1, 0)))
    with pytest.raises(UnreachableError), Client("127.0.0.1:9", give_up_after_s=0.2) as nobody:
        _ = nobody.infer("x")
    (refused,) = (result for result in client.run([Chat("x", item_id="a"), Chat("y", item_id="a")]) if result.error)
    assert refused.state is State.REFUSED


def test_helpers_for_scripts(target: str) -> None:
    """batch_generate and batch_benchmark."""
    told: list[tuple[int, int]] = []
    results = batch_generate(
        [f"[[say={n}]]" for n in range(5)], model="first", target=target, on_progress=lambda *at: told.append(at)
    )
    assert [result.content for result in results] == list("01234")
    assert told[-1] == (5, 5)
    (found,) = batch_benchmark(["first"], ["[[tokens=8]]", "[[tokens=9]]"], num_runs=1, target=target)
    assert found.runs[0].completed == 2
    assert found.tokens_per_second > 0
    assert batch_generate([], target=target) == []


def test_many_threads_share_a_client(client: Client) -> None:
    """Each thread has its own answers."""
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        found[number] = [
            each.content for each in client.run([f"[[say={number}.{n}]]" for n in range(20)], in_order=True)
        ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {number: [f"{number}.{n}" for n in range(20)] for number in range(8)}
