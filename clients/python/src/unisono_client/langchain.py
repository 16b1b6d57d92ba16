"""Unisono as a chat model of LangChain (the extra `langchain`).

    model = ChatUnisono(model="llama3.2", options={"temperature": 0})
    answers = model.batch(["Why is the sky blue?", "Why is grass green?"])

`batch` and `abatch` are one batch of the service each, whatever their number: no pool of threads stands between, and
`max_concurrency` of a config is the batch's own. `invoke`, `ainvoke`, `stream` and `astream` are requests of one
item; what many threads or tasks ask at about the same time is gathered by the service, and shares forward passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

import grpc
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import get_config_list
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, model_validator

from unisono_client.client import DEFAULT_TARGET, Client
from unisono_client.config import BatchConfig, Options
from unisono_client.errors import UnisonoError
from unisono_client.gathered import Gathered
from unisono_client.items import Chat
from unisono_client.langchain_messages import to_messages
from unisono_client.portal import portal
from unisono_client.results import Delta, Result

_T = TypeVar("_T")
# The batch that requests made in this context belong to.
_gathered: ContextVar[Gathered | None] = ContextVar("unisono_gathered", default=None)
# What may be said beside the messages, as keywords or by `bind`; all else is an option of the model.
_OF_CHAT: Final = ("tools", "format", "think", "logprobs", "truncate", "shift")
# Said by LangChain for its own bookkeeping.
_PASSED_OVER: Final = frozenset({"ls_structured_output_format", "tool_choice", "strict"})


class ChatUnisono(BaseChatModel):
    """A chat model whose batches are batches."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    # HOST:PORT of the service.
    target: str = DEFAULT_TARGET
    # None: the backend's only one.
    model: str | None = None
    # Options of the model, as `unisono_client.Options`.
    options: dict[str, Any] = Field(default_factory=dict)
    # What applies to each request, as `unisono_client.BatchConfig`: `priority`, `queue_timeout` and so on.
    config: dict[str, Any] = Field(default_factory=dict)
    # For a service behind TLS, or behind something that asks who calls.
    credentials: grpc.ChannelCredentials | None = Field(default=None, exclude=True)
    metadata_of_calls: dict[str, str] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        """A name that is not known is not passed over: it would be an option that does nothing."""
        known = {name for field, about in cls.model_fields.items() for name in (field, about.alias) if name}
        for name in given if isinstance(given, Mapping) else ():
            if name in Options.__annotations__:
                raise ValueError(f"{name!r} is an option of the model: say options={{{name!r}: …}}")
            if name not in known:
                raise ValueError(
                    f"{name!r} is not known; options of the model go into `options`, and what applies to a batch into"
                    f" `config`; else there are: {', '.join(sorted(known))}"
                )
        return given

    @property
    def _llm_type(self) -> str:
        return "unisono"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model": self.model, "options": self.options, "config": self.config}

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with functions that it may call; which one, or whether, is the model's choice.

        Raises ValueError where that is not to be so: a `tool_choice` other than "auto", or `strict`. That of
        `with_structured_output` ("any") is passed over: what is no call is told by its parser.
        """
        is_structured = "ls_structured_output_format" in kwargs
        _refuse_forced(None if is_structured else tool_choice, kwargs.get("strict"))
        return self.bind(tools=[convert_to_openai_tool(each) for each in tools], **kwargs)

    # -- Batches -------------------------------------------------------------------------------------------

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """An answer for each input, in their order, as one batch."""
        return portal().call(self.abatch(inputs, config, return_exceptions=return_exceptions, **kwargs))

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """An answer for each input, in their order, as one batch.

        Raises the first input's error, and cancels the others, unless `return_exceptions`.
        """
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        batch_config = self._batch_config()
        if most := configs[0].get("max_concurrency"):
            batch_config["max_concurrency"] = most
        # Each input's config, but for the number that is now the batch's.
        own: list[RunnableConfig] = [{**each, "max_concurrency": None} for each in configs]
        gathered = await _in_portal(self._gather(batch_config, len(inputs)))
        token = _gathered.set(gathered)
        try:
            answers = await super().abatch(inputs, own, return_exceptions=return_exceptions, **kwargs)
        except BaseException as error:
            await _in_portal(gathered.__aexit__(type(error), error, error.__traceback__))
            raise
        finally:
            _gathered.reset(token)
        await _in_portal(gathered.__aexit__(None, None, None))
        return answers

    async def _gather(self, config: BatchConfig, expected: int) -> Gathered:
        return await Gathered(self._client(), config, expected).__aenter__()

    # -- One answer ----------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return portal().call(self._ask(messages, stop, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await _in_portal(self._ask(messages, stop, kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        told = _Told()
        said = self._client().stream(self._chat(messages, stop, kwargs), **self._batch_config())
        for each in portal().each(said):
            chunk = told.chunk(each)
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        told = _Told()
        said = self._client().stream(self._chat(messages, stop, kwargs), **self._batch_config())
        try:
            while (each := await _in_portal(_next(said))) is not None:
                chunk = told.chunk(each)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            await _in_portal(said.aclose())

    # -- Inside --------------------------------------------------------------------------------------------

    async def _ask(self, messages: list[BaseMessage], stop: list[str] | None, said: dict[str, Any]) -> ChatResult:
        item = self._chat(messages, stop, said)
        gathered = _gathered.get()
        if gathered is None:
            result = await self._client().infer(item, **self._batch_config())
        else:
            result = await gathered.ask(item)
        result.raise_for_error()
        message = AIMessage(
            content=result.content,
            tool_calls=[
                tool_call(name=each.name, args=dict(each.arguments), id=each.id) for each in result.tool_calls
            ],
            usage_metadata=_usage(result),
            response_metadata=_response_metadata(result),
            additional_kwargs={"reasoning_content": result.thinking} if result.thinking else {},
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chat(self, messages: list[BaseMessage], stop: list[str] | None, said: dict[str, Any]) -> Chat:
        """Raises RefusedError for an option, and ValueError for a message, that the contract does not know."""
        _refuse_forced(said.get("tool_choice"), said.get("strict"))
        options: dict[str, Any] = {key: each for key, each in said.items() if key not in _PASSED_OVER}
        of_chat = {key: options.pop(key) for key in _OF_CHAT if key in options}
        if stop:
            options["stop"] = stop
        return Chat(to_messages(messages), options=cast("Options", options), **of_chat)

    def _batch_config(self) -> BatchConfig:
        config = cast("BatchConfig", {**self.config})
        if self.model is not None:
            config["model"] = self.model
        if self.options:
            config["options"] = cast("Options", {**self.options})
        return config

    def _client(self) -> Client:
        """The client that all models of this service share; it connects, and stays, in the portal's event loop."""
        key = (self.target, self.credentials, tuple(sorted(self.metadata_of_calls.items())))
        client = _clients.get(key)
        if client is None:
            made = Client(self.target, credentials=self.credentials, metadata=self.metadata_of_calls)
            client = _clients.setdefault(key, made)
        return client


_clients: dict[tuple[object, ...], Client] = {}


class _Told:
    """The chunks of one answer: what was told is not told again where another attempt says the same."""

    def __init__(self) -> None:
        self._attempt = 1
        self._text = self._told = ""

    def chunk(self, each: Delta | Result) -> ChatGenerationChunk:
        """The next chunk; the last has what is only known at the end. Raises ItemError, and UnisonoError."""
        if isinstance(each, Result):
            each.raise_for_error()
            self._text = each.content
            calls = [
                tool_call_chunk(name=call.name, args=call.arguments_json, id=call.id, index=place)
                for place, call in enumerate(each.proto.completion.tool_calls)
            ]
            message = AIMessageChunk(
                content=self._new(),
                tool_call_chunks=calls,
                usage_metadata=_usage(each),
                response_metadata=_response_metadata(each),
                chunk_position="last",
            )
            return ChatGenerationChunk(message=message)
        if each.attempt != self._attempt:
            self._attempt, self._text = each.attempt, ""
        self._text += each.content
        more = {"reasoning_content": each.thinking} if each.thinking else {}
        return ChatGenerationChunk(message=AIMessageChunk(content=self._new(), additional_kwargs=more))

    def _new(self) -> str:
        """What was not told yet."""
        if self._told.startswith(self._text):
            return ""
        if not self._text.startswith(self._told):
            message = (
                "the backend failed in the middle of the answer, and another attempt says something else; ask again"
            )
            raise UnisonoError(message, reason="ANSWER_CHANGED")
        new, self._told = self._text[len(self._told) :], self._text
        return new


def _refuse_forced(tool_choice: object, strict: object) -> None:
    if tool_choice not in {None, "auto"}:
        raise ValueError(
            f"tool_choice is {tool_choice!r}: a model behind Ollama cannot be made to call; leave it out"
        )
    if strict:
        raise ValueError(
            "strict: arguments of calls are not held to their schema; leave it out, or ask with `format`"
        )


def _usage(result: Result) -> UsageMetadata | None:
    usage = result.usage
    if usage is None:
        return None
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _response_metadata(result: Result) -> dict[str, Any]:
    return {
        "model_name": result.model,
        "finish_reason": result.finish_reason.lower(),
        "shared_with": result.shared_with,
        "passes": result.passes,
    }


async def _in_portal(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine where the client lives, whichever event loop asks."""
    return await asyncio.wrap_future(portal().submit(work))


async def _next(said: AsyncGenerator[Delta | Result, None]) -> Delta | Result | None:
    return await anext(said, None)
