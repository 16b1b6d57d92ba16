"""Work without an end, over one batch after the other: each item has its result once, whatever becomes of batches."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest

from tests.clients.line import Line, asked, line
from tests.integration.service import LIMIT_S, House, house
from unisono.app.follow import follow
from unisono_client import (
    Chat,
    ClosedError,
    RefusedError,
    Release,
    Report,
    Result,
    RollingSession,
    State,
    UnreachableError,
    patience,
    rolling,
)

# Each item is released at once.
AT_ONCE: Release = {"size": 1}


def sizes(h: House) -> list[int]:
    """How many items each batch of the service took, in the order in which they were opened."""
    return [batch.accepted_count for batch in h.batches._batches.values()]


def contents(results: Iterable[Result]) -> list[tuple[int, str]]:
    """What was answered, by place."""
    return sorted((result.place, result.content) for result in results)


def answers(count: int) -> list[tuple[int, str]]:
    """What `asked(count)` comes to."""
    return [(n, f"answer {n}") for n in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    """Returns when that holds, of which nobody is told."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - there is nothing to wait for
            await asyncio.sleep(0.005)


async def rest(session: RollingSession) -> list[Result]:
    """All results up to the end."""
    async with asyncio.timeout(LIMIT_S):
        await session.close_input()
        return [result async for result in session]


async def some(session: RollingSession, count: int) -> list[Result]:
    """At least so many results."""
    results: list[Result] = []
    async with asyncio.timeout(LIMIT_S):
        while len(results) < count:
            results += await session.take()
    return results


@asynccontextmanager
async def moved(here: Line, **settings: object) -> AsyncGenerator[House, None]:
    """The connection is cut, and leads to another service from then on, as after a service was started anew."""
    async with house(settings={"slots": 4, **settings}) as successor:
        here.proxy.move_to(successor.target)
        here.proxy.cut()
        yield successor
        # Before the successor ends, its clients are gone.
        here.proxy.is_away = True
        here.proxy.cut()


# -- One batch after the other ---------------------------------------------------------------------------------


async def test_it_rolls_over_after_so_many_items() -> None:
    """Each batch takes as many as it may, and no more; each item has its answer once; each batch its report."""
    reports: list[Report] = []
    async with (
        line() as here,
        here.client.rolling_session(
            model="fake", items_per_batch=10, on_report=reports.append, release={"size": 5}
        ) as session,
    ):
        await session.add(*asked(35))
        assert contents(await rest(session)) == answers(35)
        assert sizes(here.house) == [10, 10, 10, 5]
        assert session.batches == 4
    assert sorted(report.completed for report in reports) == [5, 10, 10, 10]
    assert len(here.house.work) == 35


async def test_it_asks_the_service_how_many_a_batch_may_have() -> None:
    """A service that takes fewer gets fewer, and refuses none; an item counts once for each of its answers."""
    async with line(max_items=7) as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        await session.add(*(Chat(f"[[say={n}]]", n=3) for n in range(5)))
        results = await rest(session)
        assert sizes(here.house) == [6, 6, 3]
    assert sorted(result.item_id for result in results) == [f"{n}#{k}" for n in range(5) for k in (1, 2, 3)]
    assert all(result.content == result.variant_of for result in results)
    assert all(result.state is State.COMPLETED and result.answers == 3 for result in results)


async def test_a_batch_that_is_full_before_it_was_thought_to_be() -> None:
    """What it refuses goes into the next one."""
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        await session.add(*asked(1))
        results = await some(session, 1)
        assert here.batch is not None
        object.__setattr__(here.batch._limits, "max_items", 3)
        await session.add(*asked(8)[1:])
        results += await rest(session)
        assert contents(results) == answers(8)
        assert sizes(here.house) == [3, 3, 2]


async def test_there_is_no_gap_between_two_batches() -> None:
    """The next one is at work while the old one still is."""
    async with line() as here:
        here.house.fake.hold_passes()
        async with here.client.rolling_session(model="fake", items_per_batch=2, release=AT_ONCE) as session:
            await session.add(*asked(4))
            await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
            assert sizes(here.house) == [2, 2]
            here.house.fake.release_passes()
            assert contents(await rest(session)) == answers(4)


async def test_it_rolls_over_by_age() -> None:
    """A batch that is old takes no more, and ends, so that its report and trace are there."""
    reports: list[Report] = []
    async with (
        line() as here,
        here.client.rolling_session(
            model="fake", batch_age_s=0.0, on_report=reports.append, release=AT_ONCE
        ) as session,
    ):
        for n, item in enumerate(asked(3)):
            await session.add(item)
            assert contents(await some(session, 1)) == [(n, f"answer {n}")]
        assert await rest(session) == []
        assert len(reports) == len(sizes(here.house)) == 3


async def test_adding_waits_for_results() -> None:
    """Backpressure: so many items have no result, or one that nobody has read; then adding waits."""
    async with line() as here, here.client.rolling_session(model="fake", max_pending=5, release=AT_ONCE) as session:
        adding = asyncio.create_task(session.add(*asked(30)))
        most = 0
        results: list[Result] = []
        async with asyncio.timeout(LIMIT_S):
            while len(results) < 30:
                # Nothing is read before as many are added as may be.
                while session.added < min(30, len(results) + 5):  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0)
                most = max(most, session.pending)
                results += await session.take()
        await adding
        assert most == 5
        assert contents(results) == answers(30)
        assert session.pending == 0


async def test_ids() -> None:
    """Items without one are numbered through all batches; one that is in use is refused; a name is free later on."""
    async with line() as here, here.client.rolling_session(model="fake", items_per_batch=2) as session:
        await session.add("[[say=a]]", "[[say=b]]", "[[say=c]]")
        assert sorted((result.item_id, result.content) for result in await rest(session)) == [
            ("0", "a"),
            ("1", "b"),
            ("2", "c"),
        ]
    async with line() as here, here.client.rolling_session(model="fake", items_per_batch=2) as session:
        await session.add(Chat("[[say=a]]", item_id="x"), Chat("[[say=b]]", item_id="x"))
        first = await some(session, 2)
        await session.add(Chat("[[say=c]]"), Chat("[[say=d]]", item_id="x"))
        told = [(each.place, each.state, each.error and each.error.reason) for each in first + await rest(session)]
    assert sorted(told) == [
        (0, State.COMPLETED, None),
        (1, State.REFUSED, "DUPLICATE_ITEM"),
        (2, State.COMPLETED, None),
        (3, State.COMPLETED, None),
    ]


# -- Connections and batches that are lost ---------------------------------------------------------------------


async def test_cuts_anywhere() -> None:
    """The connection breaks again and again while batches follow each other: nothing is lost, or computed twice."""
    chance = random.Random(11)
    async with line() as here:
        here.house.fake.pass_s = 0.002

        def cut_later() -> None:
            at = here.proxy.up + here.proxy.down + chance.randrange(3_000)
            here.proxy.cut_when(lambda proxy: proxy.up + proxy.down > at)

        async with here.client.rolling_session(
            model="fake", items_per_batch=15, max_pending=20, release={"size": 3, "interval": 0.005}
        ) as session:
            adding = asyncio.create_task(session.add(*asked(200)))
            results: list[Result] = []
            while len(results) < 200:
                here.proxy.is_reset = chance.random() < 0.5
                if here.proxy._condition is None and here.proxy.cuts < 12:
                    cut_later()
                results += await some(session, 1)
            here.proxy.cut_when(lambda proxy: False)
            await adding
            results += await rest(session)
        assert contents(results) == answers(200)
        assert here.proxy.cuts >= 8
        assert sizes(here.house) == [15] * 13 + [5]
        assert len(here.house.work) == 200


async def test_a_service_that_was_started_anew() -> None:
    """What has no result goes into a new batch of it; what has one is not asked again."""
    async with (
        line() as here,
        here.client.rolling_session(model="fake", items_per_batch=10, release=AT_ONCE) as session,
    ):
        await session.add(*asked(6))
        results = await some(session, 6)
        here.house.fake.hold_passes()
        # Items of two batches are under way.
        await session.add(*asked(14)[6:])
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
        async with moved(here) as successor:
            results += await some(session, 8)
            await session.add(*asked(16)[14:])
            results += await rest(session)
            assert contents(results) == answers(16)
            assert sorted(result.item_id for result in results) == sorted(f"i{n}" for n in range(16))
            assert len(successor.work) == 10


async def test_a_service_that_is_started_anew_while_no_more_is_added() -> None:
    """Also what is taken after the half-close ends, and in order."""
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        here.house.fake.hold_passes()
        await session.add(*asked(6))
        await session.close_input()
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
        async with moved(here) as successor:
            assert contents(await rest(session)) == answers(6)
            assert sizes(successor) == [6]


async def test_one_of_several_answers_is_there() -> None:
    """An item whose batch is lost among its answers is asked again, and no answer is given twice."""
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        here.house.fake.hold_passes()
        await session.add(Chat("[[tokens=4]]", n=5))
        # Four slots: the fifth answer waits.
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
        while sum(request.outcome == "completed" for request in here.house.work) < 4:
            await here.house.fake.step()
        first = await some(session, 4)
        async with moved(here):
            results = first + await rest(session)
    assert sorted(result.item_id for result in results) == [f"0#{k}" for k in range(1, 6)]
    assert {result.state for result in results} == {State.COMPLETED}


async def test_a_service_that_stops() -> None:
    """Items that it ends because it stops are not the caller's business: the successor answers them."""
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        here.house.fake.hold_passes()
        await session.add(*asked(6))
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
        await here.house.batches.close(drain_s=0)
        # Its new batches are refused with SHUTTING_DOWN for a while.
        await session.add(*asked(8)[6:])
        assert session.batches >= 1
        async with moved(here) as successor:
            results = await rest(session)
            assert contents(results) == answers(8)
            assert sum(sizes(successor)) == 8


async def test_events_that_are_gone() -> None:
    """A batch of which not all events are kept is given up; items without a result go into another."""
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        await session.add(*asked(2))
        results = await some(session, 2)
        here.house.fake.hold_passes()
        await session.add(*asked(6)[2:])
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
        former = here.batch
        assert former is not None
        here.proxy.is_away = True
        here.proxy.cut()
        await until(lambda: not former.journal.has_readers)
        _ = former.cancel(["i2"])
        former.journal._journal.prune(former.batch_id, former.journal.last_sequence)
        here.house.fake.release_passes()
        here.proxy.is_away = False
        results += await rest(session)
        assert contents(results) == answers(6)
        # The one that was given up is cancelled: nobody waits for it.
        await until(lambda: former.is_over)


async def test_an_item_that_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was in so many lost batches is not tried for ever: its result says so."""
    monkeypatch.setattr(rolling, "MAX_BATCHES_AN_ITEM", 2)
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        here.house.fake.hold_passes()
        await session.add(*asked(1))
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 1)
        async with moved(here) as second:
            second.fake.hold_passes()
            await second.fake.wait_for(lambda fake: fake.busy_slots == 1)
            async with moved(here) as third:
                (result,) = await rest(session)
                assert not third.work
    assert result.state is State.FAILED
    assert result.error is not None
    assert result.error.reason == "BATCH_NOT_FOUND"
    assert "2 batches that were lost" in str(result.error)


async def test_a_batch_that_somebody_else_cancels() -> None:
    """Its items are cancelled, as they were to be; what is added later goes into a new batch."""
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        here.house.fake.hold_passes()
        await session.add(*asked(3))
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 3)
        _ = await here.client.cancel(session.batch_id)
        assert {result.state for result in await some(session, 3)} == {State.CANCELLED}
        here.house.fake.release_passes()
        await session.add(*asked(5)[3:])
        assert contents(await rest(session)) == [(3, "answer 3"), (4, "answer 4")]


async def test_a_service_that_stays_away() -> None:
    """Once the stated time is over, whoever adds and whoever reads is told."""
    async with (
        line(give_up_after_s=0.3) as here,
        here.client.rolling_session(model="fake", max_pending=2, release=AT_ONCE) as session,
    ):
        here.house.fake.hold_passes()
        adding = asyncio.create_task(session.add(*asked(3)))
        await here.house.fake.wait_for(lambda fake: fake.busy_slots == 2)
        here.proxy.is_away = True
        here.proxy.cut()
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(UnreachableError):
                _ = await session.take()
            with pytest.raises(UnreachableError):
                await adding
        with pytest.raises(UnreachableError):
            await session.add("x")
        here.house.fake.release_passes()


async def test_a_connection_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without heartbeats is taken for lost, and the next one as well: nothing hangs for ever."""
    monkeypatch.setattr(patience, "SILENT_S", 0.5)
    async with line(give_up_after_s=1.0) as here, here.client.session(model="fake", release={"size": 1}) as session:
        await session.add(*asked(1))
        assert len(await session.take()) == 1
        here.proxy.swallows_down = True
        await session.add("x")
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(UnreachableError, match="not even a heartbeat"):
                _ = await session.take()
        here.proxy.cut()


async def test_heartbeats_keep_a_quiet_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is silent for hours keeps its connection: the service says that it lives, and that is heard."""
    monkeypatch.setattr(patience, "SILENT_S", 0.5)
    assert follow.__kwdefaults__ is not None
    monkeypatch.setitem(follow.__kwdefaults__, "heartbeat_s", 0.1)
    async with line() as here, here.client.rolling_session(model="fake", release=AT_ONCE) as session:
        await session.add(*asked(1))
        _ = await some(session, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                _ = await session.take()
        await session.add(*asked(2)[1:])
        assert contents(await rest(session)) == [(1, "answer 1")]
        assert here.proxy.connections == 1
        assert sizes(here.house) == [2]


# -- Its end ---------------------------------------------------------------------------------------------------


async def test_leaving_cancels_what_has_no_result() -> None:
    """Nothing goes on for a caller that has left; whoever still waits is told."""
    async with line() as here:
        here.house.fake.hold_passes()
        async with here.client.rolling_session(
            model="fake", items_per_batch=2, max_pending=4, release=AT_ONCE
        ) as session:
            adding = asyncio.create_task(session.add(*asked(6)))
            await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
        with pytest.raises(ClosedError):
            await adding
        with pytest.raises(ClosedError):
            _ = await session.take()
        await here.house.until_running(0)
        here.house.fake.release_passes()


async def test_cancelling() -> None:
    """Items are cancelled by their ids, whichever batch they are in, or all that were added."""
    async with line() as here:
        here.house.fake.hold_passes()
        async with here.client.rolling_session(model="fake", items_per_batch=2, release=AT_ONCE) as session:
            await session.add(*asked(4))
            await here.house.fake.wait_for(lambda fake: fake.busy_slots == 4)
            await session.cancel("i0", "i3", "nobody")
            states = {each.item_id: each.state for each in await some(session, 2)}
            assert states == {"i0": State.CANCELLED, "i3": State.CANCELLED}
            await session.cancel()
            states = {each.item_id: each.state for each in await some(session, 2)}
            assert states == {"i1": State.CANCELLED, "i2": State.CANCELLED}
            here.house.fake.release_passes()
            await session.add(*asked(5)[4:])
            assert contents(await rest(session)) == [(4, "answer 4")]


async def test_what_it_does_not_take() -> None:
    """Terms of one batch, numbers that are none, items that cannot be sent, and anything after the end."""
    async with line() as here:
        for name, value in (("request_id", "r"), ("batch_deadline", 1.0), ("on_disconnect", "DETACH")):
            with pytest.raises(RefusedError, match=name):
                _ = here.client.rolling_session(**{name: value})  # type: ignore[arg-type]
        for name in ("max_pending", "items_per_batch"):
            with pytest.raises(RefusedError, match="at least 1"):
                _ = here.client.rolling_session(**{name: 0})  # type: ignore[arg-type]
        async with here.client.rolling_session(model="fake") as session:
            with pytest.raises(RefusedError):
                await session.add(Chat([{"role": "nobody", "content": "x"}]))
            await session.close_input()
            with pytest.raises(ClosedError):
                await session.add("x")
            assert await session.take() == []
            assert session.batch_id == ""
        async with here.client.rolling_session(model="fake", max_attempts=99) as session:
            await session.add("x")
            with pytest.raises(RefusedError) as caught:
                _ = await rest(session)
            assert caught.value.reason == "INVALID_REQUEST"
