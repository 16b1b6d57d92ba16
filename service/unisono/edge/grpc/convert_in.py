"""Messages of the contract → values of the core.

Theory of operation. What a value can hold is taken over as it is: whether it is *allowed* is for `core/limits.py`,
which judges items from every door alike. Refused here is only what no value can say: a role that is none, an answer's
shape that is missing, a request that is absent, a number of an enum or of a field that this service does not know;
and lists so long that converting them would itself be the harm. All that is wrong is listed, with paths, up to a
hundred places an item.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.unknown_fields import UnknownFieldSet

from unisono._generated.unisono.v1 import batch_inference_pb2 as pb
from unisono._generated.unisono.v1 import item_pb2
from unisono.core import batch, limits, model
from unisono.core.errors import InvalidRequestError, Violation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from google.protobuf.duration_pb2 import Duration

# Violations of one item; a message of many megabytes can hold millions of them.
MAX_VIOLATIONS: Final = 100
# Spans above a century are slips; backends count in nanoseconds of 64 bits, which end at 292 years.
LONGEST_SPAN_S: Final = 100 * 366 * 86_400
MAX_ATTEMPTS: Final = 10
MAX_REQUEST_ID_BYTES: Final = 256
MAX_FLUSH_BYTES: Final = 1024 * 1024
FLUSH_INTERVALS_S: Final = (0.01, 10.0)

_ROLES: Final[Mapping[int, model.Role]] = {
    item_pb2.ROLE_SYSTEM: model.Role.SYSTEM,
    item_pb2.ROLE_USER: model.Role.USER,
    item_pb2.ROLE_ASSISTANT: model.Role.ASSISTANT,
    item_pb2.ROLE_TOOL: model.Role.TOOL,
}
_THINKS: Final[Mapping[int, model.Think | None]] = {
    item_pb2.THINK_UNSPECIFIED: None,
    item_pb2.THINK_OFF: model.Think.OFF,
    item_pb2.THINK_ON: model.Think.ON,
    item_pb2.THINK_LOW: model.Think.LOW,
    item_pb2.THINK_MEDIUM: model.Think.MEDIUM,
    item_pb2.THINK_HIGH: model.Think.HIGH,
    item_pb2.THINK_MAX: model.Think.MAX,
}
_STRICT: Final[Mapping[int, bool]] = {
    pb.VALIDATION_MODE_UNSPECIFIED: True,
    pb.VALIDATION_MODE_STRICT: True,
    pb.VALIDATION_MODE_PER_ITEM: False,
}
_DETACHES: Final[Mapping[int, bool]] = {
    pb.ON_DISCONNECT_UNSPECIFIED: False,
    pb.ON_DISCONNECT_CANCEL: False,
    pb.ON_DISCONNECT_DETACH: True,
}

# Values that most items share; they are frozen.
_NO_OPTIONS: Final = model.Options()
_ANY_JSON: Final = model.Format()
_LIMITS: Final = limits.Limits()
_DEFAULTS: Final = batch.BatchConfig()


class _Found:
    """What is wrong so far."""

    __slots__ = ("violations",)

    def __init__(self) -> None:
        self.violations: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self.violations.append(Violation(field=field, description=description))

    @property
    def is_full(self) -> bool:
        return len(self.violations) >= MAX_VIOLATIONS


# -- Items -----------------------------------------------------------------------------------------------------


def items(
    messages: Sequence[item_pb2.Item], *, path: str = "items", bounds: limits.Limits = _LIMITS
) -> list[model.Item | batch.BadItem]:
    """All items of a message. Raises InvalidRequestError where there are more than a batch may have at all."""
    found = _Found()
    if len(messages) > bounds.max_items:
        found.add(path, f"has {len(messages):,} items; at most {bounds.max_items:,} are taken")
    _raise_if_any(found, "")
    return [item(one, bounds=bounds) for one in messages]


def item(message: item_pb2.Item, *, bounds: limits.Limits = _LIMITS) -> model.Item | batch.BadItem:
    """The item with index 0, its model and options as they stand on it alone; or why it is none.

    Paths are from the item on: "chat.messages[0].role".
    """
    found = _Found()
    options = _options(message.options, "options", found) if message.HasField("options") else _NO_OPTIONS
    request: model.ChatRequest | model.GenerateRequest | model.EmbedRequest | None
    match message.WhichOneof("request"):
        case "chat":
            request = _chat(message.chat, found, bounds)
        case "generate":
            request = _generate(message.generate, found)
        case "embed":
            request = _embed(message.embed, found, bounds)
        case _:
            request = None
            is_newer = len(UnknownFieldSet(message)) > 0
            found.add("request", "is of a kind that this service does not know" if is_newer else _NO_REQUEST)
    if found.violations or request is None:
        return batch.BadItem(item_id=message.item_id, violations=tuple(found.violations[:MAX_VIOLATIONS]))
    return model.Item(item_id=message.item_id, index=0, request=request, model=message.model, options=options)


_NO_REQUEST: Final = "is required: one of chat, generate, embed"


def _chat(message: item_pb2.ChatRequest, found: _Found, bounds: limits.Limits) -> model.ChatRequest:
    messages: tuple[model.Message, ...] = ()
    if len(message.messages) > bounds.max_messages:
        found.add(
            "chat.messages", f"has {len(message.messages):,} messages; at most {bounds.max_messages:,} are taken"
        )
    else:
        messages = tuple([_message(one, i, found) for i, one in enumerate(message.messages) if not found.is_full])
    tools: tuple[model.Tool, ...] = ()
    if len(message.tools) > bounds.max_tools:
        found.add("chat.tools", f"has {len(message.tools):,} tools; at most {bounds.max_tools:,} are taken")
    elif message.tools:
        tools = tuple(
            model.Tool(name=tool.name, description=tool.description, parameters_json=tool.parameters_json)
            for tool in message.tools
        )
    return model.ChatRequest(
        messages=messages,
        tools=tools,
        format=_format(message.format, "chat.format", found) if message.HasField("format") else None,
        think=_think(message.think, "chat.think", found),
        top_logprobs=message.logprobs.top if message.HasField("logprobs") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
        shift=message.shift if message.HasField("shift") else None,
    )


def _message(message: item_pb2.Message, place: int, found: _Found) -> model.Message:
    role = _ROLES.get(message.role)
    if role is None:
        found.add(f"chat.messages[{place}].role", _not_a_role(message.role))
        role = model.Role.USER  # stands in; the item is refused
    return model.Message(
        role=role,
        content=message.content,
        thinking=message.thinking,
        images=tuple(message.images),
        tool_calls=tuple([_tool_call(call) for call in message.tool_calls]) if message.tool_calls else (),
        tool_name=message.tool_name,
        tool_call_id=message.tool_call_id,
    )


def _not_a_role(number: int) -> str:
    what = f"is {number}, which is no role" if number else "is required"
    return f"{what}: one of ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL"


def _tool_call(message: item_pb2.ToolCall) -> model.ToolCall:
    """A call; one without arguments has an empty object, since that is how backends write it."""
    return model.ToolCall(id=message.id, name=message.name, arguments_json=message.arguments_json or "{}")


def _generate(message: item_pb2.GenerateRequest, found: _Found) -> model.GenerateRequest:
    return model.GenerateRequest(
        prompt=message.prompt,
        suffix=message.suffix,
        system=message.system,
        template=message.template,
        raw=message.raw,
        images=tuple(message.images),
        format=_format(message.format, "generate.format", found) if message.HasField("format") else None,
        think=_think(message.think, "generate.think", found),
        top_logprobs=message.logprobs.top if message.HasField("logprobs") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
        shift=message.shift if message.HasField("shift") else None,
    )


def _embed(message: item_pb2.EmbedRequest, found: _Found, bounds: limits.Limits) -> model.EmbedRequest:
    texts: tuple[str, ...] = ()
    if len(message.input) > bounds.max_inputs:
        found.add("embed.input", f"has {len(message.input):,} texts; at most {bounds.max_inputs:,} are taken")
    else:
        texts = tuple(message.input)
    return model.EmbedRequest(
        input=texts,
        dimensions=message.dimensions if message.HasField("dimensions") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
    )


def _format(message: item_pb2.ResponseFormat, path: str, found: _Found) -> model.Format | None:
    match message.WhichOneof("kind"):
        case "json_schema":
            return model.Format(json_schema=message.json_schema)
        case "json" if message.json:
            return _ANY_JSON
        case "json":
            found.add(path, "has json: false; set it to true, or leave the format out for free text")
        case _:
            found.add(path, "is empty; set json or json_schema, or leave the format out for free text")
    return None


def _think(number: int, path: str, found: _Found) -> model.Think | None:
    if number not in _THINKS:
        names = ", ".join(name for name in item_pb2.Think.keys() if name != "THINK_UNSPECIFIED")  # noqa: SIM118  # no dict
        found.add(path, f"is {number}, which is no way to think: one of {names}")
        return None
    return _THINKS[number]


# -- Options ---------------------------------------------------------------------------------------------------


def _options(message: item_pb2.Options, path: str, found: _Found) -> model.Options:
    """The options that are set. They have the same names in the contract and in the core, but for one."""
    _refuse_unknown(message, path, found)
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        match value:
            case float():
                values[field.name] = shortest(value)
            case item_pb2.RunnerOptions():
                _refuse_unknown(value, f"{path}.runner", found)
                runner = {one.name: number for one, number in value.ListFields()}
                values["runner"] = model.RunnerOptions(**runner)
            case _ if field.name == "stop":
                values["stop"] = tuple(value)
            case _ if field.name == "extra_options_json":
                values["extra_json"] = value
            case _:
                values[field.name] = value
    return model.Options(**values)


def _refuse_unknown(message: item_pb2.Options | item_pb2.RunnerOptions, path: str, found: _Found) -> None:
    """An option that a newer contract has must not be passed over in silence."""
    unknown = UnknownFieldSet(message)
    for place in range(min(len(unknown), MAX_VIOLATIONS)):
        number = unknown[place].field_number
        found.add(path, f"has an option of number {number} that this service, perhaps an older one, does not know")


@lru_cache(maxsize=1024)
def shortest(value: float) -> float:
    """The shortest decimal that is the same number in 32 bits: 0.7 for what travelled as 0.699999988079071."""
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value


# -- What applies to a batch -----------------------------------------------------------------------------------


def config(message: pb.BatchConfig, *, path: str = "config", bounds: limits.Limits = _LIMITS) -> batch.BatchConfig:
    """What applies to the batch; deltas are checked, too, and read by `delta_settings`.

    Raises InvalidRequestError with all that is wrong, its paths beginning with `path`.
    """
    found = _Found()
    options = _NO_OPTIONS
    if message.HasField("options"):
        options = _options(message.options, "options", found)
        found.violations += limits.check_options(options, bounds)
    found.violations += limits.check_model(message.model, bounds)
    if message.max_attempts > MAX_ATTEMPTS or (message.HasField("max_attempts") and not message.max_attempts):
        found.add("max_attempts", f"is {message.max_attempts}; it may be 1 to {MAX_ATTEMPTS}")
    if (size := len(message.request_id.encode())) > MAX_REQUEST_ID_BYTES:
        found.add("request_id", f"has {size:,} bytes; at most {MAX_REQUEST_ID_BYTES} are taken")
    release = message.release
    if release.HasField("size") and not release.size:
        found.add("release.size", "is 0; it may be 1 or more")
    interval_s = _span(release, "interval", "release.interval", found)
    _ = _deltas(message, "deltas", found)
    made = batch.BatchConfig(
        model=message.model,
        options=options,
        keep_alive_s=_span(message, "keep_alive", "keep_alive", found),
        is_strict=_choice(_STRICT, message.validation, "validation", "way to validate", found),
        # 0 is no limit, as absent is; but for the item's, where absent is the service's setting.
        queue_timeout_s=_span(message, "queue_timeout", "queue_timeout", found) or None,
        item_timeout_s=_span(message, "item_timeout", "item_timeout", found),
        deadline_s=_span(message, "batch_deadline", "batch_deadline", found) or None,
        max_attempts=message.max_attempts or _DEFAULTS.max_attempts,
        detaches=_choice(_DETACHES, message.on_disconnect, "on_disconnect", "way to go on", found),
        detach_grace_s=_span(message, "detach_grace", "detach_grace", found),
        request_id=message.request_id,
        release_size=release.size or _DEFAULTS.release_size,
        release_interval_s=_DEFAULTS.release_interval_s if interval_s is None else interval_s,
    )
    _raise_if_any(found, path)
    return made


_HoldsDeltas = pb.BatchConfig | pb.AttachBatchRequest | pb.ReopenBatch


def delta_settings(message: _HoldsDeltas, *, path: str | None = None) -> batch.DeltaSettings | None:
    """How text is to be sent as it is generated; None: not at all.

    Takes the message that holds `deltas`, since only that tells whether they are asked for. Raises
    InvalidRequestError, whose paths begin with `path`: "config" for a config, nothing for others, unless said.
    """
    found = _Found()
    settings = _deltas(message, "deltas", found)
    _raise_if_any(found, ("config" if isinstance(message, pb.BatchConfig) else "") if path is None else path)
    return settings


def _deltas(
    message: pb.BatchConfig | pb.AttachBatchRequest | pb.ReopenBatch, path: str, found: _Found
) -> batch.DeltaSettings | None:
    if not message.HasField("deltas"):
        return None
    made = batch.DeltaSettings()
    asked = message.deltas
    interval_s = _span(asked, "flush_interval", f"{path}.flush_interval", found)
    least_s, most_s = FLUSH_INTERVALS_S
    if interval_s is not None and not least_s <= interval_s <= most_s:
        found.add(f"{path}.flush_interval", f"is {interval_s:g} s; it may be 10 ms to 10 s")
    flush_bytes = asked.flush_bytes if asked.HasField("flush_bytes") else made.flush_bytes
    if not 1 <= flush_bytes <= MAX_FLUSH_BYTES:
        found.add(f"{path}.flush_bytes", f"is {flush_bytes:,}; it may be 1 to {MAX_FLUSH_BYTES:,}")
    return batch.DeltaSettings(
        flush_interval_s=made.flush_interval_s if interval_s is None else interval_s, flush_bytes=flush_bytes
    )


def _span(message: pb.BatchConfig | pb.ReleasePolicy | pb.DeltaConfig, name: str, path: str, found: _Found) -> Any:
    """The seconds of a span of time (float); None where it is absent or wrong."""
    if not message.HasField(name):  # type: ignore[arg-type]  # a field of the message, as the tests of each show
        return None
    span: Duration = getattr(message, name)
    seconds = span.seconds + span.nanos / 1e9
    if not -1_000_000_000 < span.nanos < 1_000_000_000 or span.seconds * span.nanos < 0:
        found.add(path, f"is no duration: {span.seconds:,} seconds and {span.nanos:,} nanoseconds")
    elif seconds < 0:
        found.add(path, f"is {seconds:g} s; it may not be negative")
    elif seconds > LONGEST_SPAN_S:
        found.add(path, f"is {span.seconds:,} seconds, more than a century")
    else:
        return seconds
    return None


def _choice(known: Mapping[int, bool], number: int, path: str, what: str, found: _Found) -> bool:
    if number not in known:
        found.add(path, f"is {number}, which is no {what}; it may be {min(known)} to {max(known)}")
        return False
    return known[number]


def _raise_if_any(found: _Found, path: str) -> None:
    """Refuses a request with all that is wrong with it: the first in words, each in the list."""
    if not found.violations:
        return
    before = f"{path}." if path else ""
    placed = [Violation(field=before + one.field, description=one.description) for one in found.violations]
    more = f" (and {len(placed) - 1:,} more)" if len(placed) > 1 else ""
    raise InvalidRequestError(f"{placed[0].field}: {placed[0].description}{more}", violations=placed)
