"""One turn of a model: a prompt is run on a runner and its answer written, unless a fault breaks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from tests.fakes.ollama.answers import Script
from tests.fakes.ollama.faults import Fault, FaultKind
from tests.fakes.ollama.http import Exchange
from tests.fakes.ollama.runner import Job, Runner
from tests.fakes.ollama.voices import Final, Voice

# llm/llama_server.go, Completion(): after so many equal tokens it stops reading, without an error and without done.
_REPEATS = 30


class Turn:
    """Runs one prompt; the listener of its job."""

    def __init__(
        self,
        exchange: Exchange,
        runner: Runner,
        *,
        prompt: Sequence[str],
        script: Script,
        voice: Voice,
        loaded_ns: int,
    ) -> None:
        self._exchange = exchange
        self._runner = runner
        self._script = script
        self._voice = voice
        self._loaded_ns = loaded_ns
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._said = 0
        self._last = ""
        self._repeats = 0
        self._ended_by_fault = False
        self._job = Job(
            exchange.live,
            prompt,
            script.tokens,
            stops=script.stops,
            on_token=self._token,
            on_end=self._end,
            crash_after=script.crash_after,
        )
        fault = exchange.fault
        # RESET counts bytes where it was given bytes, and NO_DONE lines only where it was given lines.
        by_bytes = fault is not None and fault.kind is FaultKind.RESET and fault.after_bytes is not None
        at_the_end = fault is not None and fault.kind is FaultKind.NO_DONE and fault.after_lines is None
        self._fault: Fault | None = None if by_bytes or at_the_end else fault
        self._without_done = at_the_end

    async def run(self) -> None:
        """Return when the answer is written, or the fault done; frees the slot when cancelled."""
        job = self._job
        self._check_fault()
        if not self._over.done():
            self._runner.submit(job)
        try:
            await self._over
        except asyncio.CancelledError:
            self._runner.cancel(job)
            raise

    def _token(self, place: int) -> None:
        word = self._script.tokens[place].strip()
        if word == self._last:
            self._repeats += 1
            if self._repeats > _REPEATS:
                self._stop()
                self._voice.cut()
                return
        else:
            self._last = word
            self._repeats = 0
        if self._voice.token(place):
            self._said += 1
            if self._fault is not None:
                self._check_fault()

    def _end(self) -> None:
        job, live = self._job, self._exchange.live
        if self._over.done():
            return
        self._over.set_result(None)
        if job.error is not None:
            self._voice.fail(job.error.status, job.error.message)
        elif self._without_done:
            self._voice.cut()
        else:
            self._voice.done(
                Final(
                    reason="stop" if job.stops else "length",
                    total_ns=time.monotonic_ns() - live.headers_ns,
                    load_ns=self._loaded_ns - live.headers_ns,
                    prompt_tokens=len(job.prompt),
                    prompt_eval_ns=job.prompt_eval_ns,
                    tokens=job.said,
                    eval_ns=job.eval_ns,
                )
            )

    def _stop(self) -> None:
        self._runner.cancel(self._job)
        if not self._over.done():
            self._over.set_result(None)

    def _check_fault(self) -> None:
        fault = self._fault
        if fault is None or self._said < (fault.after_lines or 0):
            return
        self._fault = None
        job, voice = self._job, self._voice
        match fault.kind:
            case FaultKind.RESET:
                self._stop()
                self._exchange.reset()
            case FaultKind.ERROR_LINE:
                self._stop()
                voice.begin()
                voice.fail(500, fault.message)
            case FaultKind.NO_DONE:
                self._stop()
                voice.cut()
            case FaultKind.BAD_LINE:
                voice.raw_line(fault.bad_line)
            case FaultKind.STALL if not fault.released.is_set():
                self._runner.freeze(job, frozen=True)
                fault.on_release.append(lambda: self._runner.freeze(job, frozen=False))
            case FaultKind.KILL_RUNNER if self._said:
                self._runner.kill()
            case FaultKind.KILL_RUNNER:
                job.on_slot = self._runner.kill
            case _:
                pass  # the other kinds are done where the request is taken in, or where it is written
