"""A backend service that holds a stream open for hours: it feeds Unisono with questions from a queue of its own.

    python clients/python/examples/backend_service.py --listen 127.0.0.1:7070
    echo '{"id": 1, "prompt": "Why is the sky blue?"}' | nc -N 127.0.0.1 7070

Its callers send a line of JSON for each question, `{"id": …, "prompt": …}`, and get one for each answer as it comes:
`{"id": …, "answer": …}` or `{"id": …, "error": …}`. To make a service of your own of it, keep `Answerer` and what
`serve` does in the end, and put your way of taking work (HTTP, a message broker) in the place of `Callers`.

What happens when
- work comes faster than it is answered: `ask` waits while the queue is full, so callers are not read any faster;
- the connection is lost, or silent for three heartbeats: the client comes back to the batch by itself;
- a batch has had its items, or its time: the next one is opened, while the old one's results still come;
- Unisono is started anew: what has no answer goes into a new batch. Nothing is answered twice;
- Unisono stays away (--give-up-after): the program ends with exit code 1, for whoever supervises it;
- SIGTERM: nothing more is taken, the stream is half-closed, and what was taken is answered, for as long as --drain
  says. What is left then is cancelled, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
from dataclasses import dataclass, field
from typing import Final

from unisono_client import Chat, Client, RefusedError, Report, Result, RollingSession, UnisonoError

log = logging.getLogger("backend_service")

# Questions that wait to be sent, and questions that were sent and are not answered: what it holds in memory at most.
QUEUE_SIZE: Final = 1_000
MAX_PENDING: Final = 1_000
# How many one caller may have open; beyond, it is not read until it has taken answers.
MAX_OPEN_A_CALLER: Final = 500
# Bytes of a question's line.
MAX_LINE: Final = 1024 * 1024
# Unisono may be away for so long: longer than it takes to install its next version.
GIVE_UP_AFTER_S: Final = 600.0
# Once the service is told to stop, what was taken is answered for so long: less than its supervisor waits.
DRAIN_S: Final = 25.0


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """Something to be answered, and who waits for it."""

    prompt: str
    answer: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Answerer:
    """The queue, and the stream that is fed from it."""

    def __init__(self, session: RollingSession) -> None:
        self._session = session
        self._queue: asyncio.Queue[Question | None] = asyncio.Queue(QUEUE_SIZE)
        # Those that were sent, by the number that the session gives them.
        self._sent: dict[int, Question] = {}

    async def ask(self, prompt: str) -> asyncio.Future[Result]:
        """Takes a question, and waits while the queue is full; what it returns has the answer later."""
        question = Question(prompt)
        await self._queue.put(question)
        return question.answer

    async def run(self) -> None:
        """Answers until `stop`; raises UnisonoError, in a group, where that cannot go on."""
        async with asyncio.TaskGroup() as tasks:
            _ = tasks.create_task(self._feed())
            _ = tasks.create_task(self._collect())

    async def stop(self) -> None:
        """No more questions will come: `run` ends when those that were taken are answered."""
        await self._queue.put(None)

    @property
    def unanswered(self) -> int:
        """Questions that were taken, and have no answer."""
        return self._queue.qsize() + len(self._sent)

    async def _feed(self) -> None:
        while (question := await self._queue.get()) is not None:
            if question.answer.cancelled():
                continue  # nobody waits for it any more
            number = self._session.added
            self._sent[number] = question
            try:
                await self._session.add(Chat(question.prompt))  # waits while MAX_PENDING have no answer
            except RefusedError as error:
                # It cannot be sent; the others can. (Where the session has failed, `_collect` is told as well.)
                del self._sent[number]
                question.answer.set_exception(error)
        await self._session.close_input()  # the half-close: no more items, and all results still come

    async def _collect(self) -> None:
        async for result in self._session:
            question = self._sent.pop(result.place)
            if not question.answer.done():
                question.answer.set_result(result)


class Callers:
    """Those who ask: a line for a question, a line for an answer."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._calls: set[asyncio.Task[None]] = set()
        self._reading: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One caller, until it has hung up, or is left."""
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            # By `leave`. Nobody waits for this task but asyncio's server, which would log a traceback.
            log.info("a caller was left before it had all its answers")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (call := asyncio.current_task()) is not None:
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(self._read(reader, writer, tasks))
                self._reading.add(reading)
                reading.add_done_callback(self._reading.discard)
        except* (OSError, ValueError, KeyError, TypeError) as errors:
            # It hung up, or does not speak as it should. What it asked is not sent any more, or not listened for.
            log.warning("a caller was left: %r", errors.exceptions[0])
        finally:
            writer.close()

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tasks: asyncio.TaskGroup
    ) -> None:
        may_ask = asyncio.Semaphore(MAX_OPEN_A_CALLER)
        async for line in reader:
            asked = json.loads(line)
            _ = await may_ask.acquire()
            answer = await self._answerer.ask(asked["prompt"])
            told = tasks.create_task(self._reply(writer, asked["id"], answer))
            told.add_done_callback(lambda _: may_ask.release())

    async def _reply(self, writer: asyncio.StreamWriter, name: object, answer: asyncio.Future[Result]) -> None:
        try:
            line = {"id": name, "answer": (await answer).raise_for_error().content}
        except UnisonoError as error:
            line = {"id": name, "error": str(error)}
        writer.write(json.dumps(line).encode() + b"\n")
        await writer.drain()

    def take_no_more(self) -> None:
        """What they send from now on is not read. What they were promised they still get, and then a goodbye."""
        for reading in self._reading:
            _ = reading.cancel()

    async def all_told(self) -> None:
        """Returns when all of them have all their answers."""
        if self._calls:
            _ = await asyncio.wait(self._calls)

    async def leave(self) -> None:
        """Leaves those that are still there."""
        for call in self._calls:
            _ = call.cancel()
        await self.all_told()


async def serve(given: argparse.Namespace) -> bool:
    """Serves until SIGTERM or SIGINT; whether all that was taken was answered. Raises UnisonoError, in a group."""
    stopped = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stopped.set)
    async with (
        Client(given.target, give_up_after_s=given.give_up_after) as client,
        client.rolling_session(
            model=given.model, max_pending=MAX_PENDING, items_per_batch=given.items_per_batch, on_report=log_report
        ) as session,
    ):
        answerer = Answerer(session)
        callers = Callers(answerer)
        host, _, port = given.listen.rpartition(":")
        server = await asyncio.start_server(callers.serve, host, int(port), limit=MAX_LINE)
        log.info("listening on %s:%d", *server.sockets[0].getsockname()[:2])
        running = asyncio.create_task(answerer.run())
        stopping = asyncio.create_task(stopped.wait())
        try:
            _ = await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            log.info("stopping: %d questions are to be answered", answerer.unanswered)
            server.close()
            callers.take_no_more()
            async with asyncio.timeout(given.drain):
                if not running.done():
                    await answerer.stop()
                await running
                await callers.all_told()
        except TimeoutError:
            log.warning("%d questions were not answered within %g s", answerer.unanswered, given.drain)
            return False
        finally:
            _ = stopping.cancel()
            _ = running.cancel()
            await callers.leave()
    log.info("stopped: all are answered")
    return True


def log_report(report: Report) -> None:
    """A batch has ended."""
    log.info("%s: %d answered, %d failed, %s", report.batch_id, report.completed, report.failed, report.duration)


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--listen", default="127.0.0.1:7070", help="HOST:PORT for callers (port 0: any that is free)")
    parser.add_argument("--target", default="127.0.0.1:50051", help="HOST:PORT of Unisono")
    parser.add_argument("--model", default="", help="which model answers (default: the service's)")
    parser.add_argument("--items-per-batch", type=int, default=10_000, help="then the next batch is opened")
    parser.add_argument(
        "--give-up-after", type=float, default=GIVE_UP_AFTER_S, help="seconds that Unisono may be away"
    )
    parser.add_argument("--drain", type=float, default=DRAIN_S, help="seconds to answer what was taken, once stopped")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    is_done = False
    try:
        is_done = asyncio.run(serve(given))
    except* UnisonoError as errors:
        log.critical("it cannot go on: %s", errors.exceptions[0])
    return 0 if is_done else 1


if __name__ == "__main__":
    sys.exit(main())
