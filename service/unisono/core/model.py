"""The values that the house speaks of: what is asked, who answers, what comes back.

All are frozen; none knows how it travels. Times of day are nanoseconds since 1970 (`_ns`), spans are seconds
(`_s`).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING

# A vector of 32-bit floats, `array("f")`. By a name of its own, since Python 3.11 cannot subscript the class where
# annotations are read at run time, as the journal does.
if TYPE_CHECKING:
    Vector = array[float]
else:
    Vector = array
# Where a field is called by that name.
Bytes = bytes


class Role(Enum):
    """Who speaks a message; the value is the word that chat APIs use."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Think(Enum):
    """Whether, and how much, a thinking model thinks first."""

    OFF = "off"
    ON = "on"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    MAX = "max"


class FinishReason(Enum):
    """Why an answer ended."""

    UNKNOWN = "unknown"
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    EMBEDDED = "embedded"


class ItemState(Enum):
    """How an item ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class SlotSource(Enum):
    """Where a number of slots comes from."""

    UNKNOWN = "unknown"
    CONFIGURED = "configured"
    TOLD = "told"
    LEARNED = "learned"
    # Learned in an earlier run, or before an outage; not confirmed yet.
    REMEMBERED = "remembered"


class PassMethod(Enum):
    """How forward passes are counted."""

    CREATED_AT = "created_at"
    ARRIVAL = "arrival"


# -- What is asked ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model makes, or made."""

    # The call's id; empty where the model gave none.
    id: str = ""
    # The function's name.
    name: str
    # Its arguments, a JSON object as text: key order and number types as written.
    arguments_json: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    # The JSON schema of its arguments, as text; empty for none.
    parameters_json: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str = ""
    # What the assistant thought before it said `content`.
    thinking: str = ""
    # The bytes of picture files.
    images: tuple[bytes, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    # For a tool's answer: which function, and which call.
    tool_name: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How an answer must be shaped: any JSON, or JSON that fits a schema."""

    # The schema as JSON text; None for any JSON.
    json_schema: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to answer."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    format: Format | None = None
    think: Think | None = None
    # How many alternatives a token; None: no log probabilities at all.
    top_logprobs: int | None = None
    # None is sent as False: a prompt too long is an error, not a silent cut.
    truncate: bool | None = None
    # None leaves the backend's default; a value is part of how the model is loaded.
    shift: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt to complete."""

    prompt: str
    suffix: str = ""
    system: str = ""
    template: str = ""
    raw: bool = False
    images: tuple[bytes, ...] = ()
    format: Format | None = None
    think: Think | None = None
    top_logprobs: int | None = None
    truncate: bool | None = None
    shift: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Texts to embed."""

    input: tuple[str, ...]
    dimensions: int | None = None
    truncate: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """Options that decide how a model is loaded; None leaves the backend's default.

    Source: Ollama 0.32, api/types.go, type Runner.
    """

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None
    draft_num_predict: int | None = None

    def over(self, base: RunnerOptions) -> RunnerOptions:
        """These options laid over others, field by field."""
        set_here = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        return replace(base, **set_here)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of an answer; None (and no stop texts) leaves the model's own value.

    Source: Ollama 0.32, api/types.go, type Options.
    """

    num_keep: int | None = None
    seed: int | None = None
    num_predict: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    temperature: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    runner: RunnerOptions = field(default_factory=RunnerOptions)
    # A JSON object as text, passed on unread; empty for none.
    extra_json: str = ""

    def over(self, base: Options) -> Options:
        """These options laid over others, field by field."""
        if base == _NO_OPTIONS:
            return self
        set_here = {name: v for name in _OPTION_NAMES if (v := getattr(self, name)) not in (None, (), "")}
        return replace(base, **{**set_here, "runner": self.runner.over(base.runner)})


_OPTION_NAMES = tuple(field.name for field in fields(Options))
_NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """A caller's HTTP request, to be sent to a backend as it came."""

    method: str
    # Path and query, from the API's root on: "/api/chat?x=1".
    target: str
    # Names as they were written; nothing that concerns one connection only.
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request of a batch."""

    # The caller's name for it, unique in its batch.
    item_id: str
    # Its place among the batch's items, from 0.
    index: int
    request: ChatRequest | GenerateRequest | EmbedRequest
    # The model's name, the batch's default already applied; empty where the caller named none.
    model: str = ""
    # Its options, the batch's already beneath them.
    options: Options = field(default_factory=Options)
    # How many answers are wanted, as the caller sent it; an item that runs has one.
    n: int = 1
    # For one of several answers: the id of the item that asked for them.
    variant_of: str = ""
    # What is sent for it, where that is not made of the request: the request only says what was understood of it.
    forwarded: Forwarded | None = None


# -- Who answers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model that a backend can load."""

    # The backend's name in the configuration.
    backend: str
    # The model's name, as the backend writes it.
    name: str
    # The digest of its files; where a backend tells none, the name.
    digest: str
    family: str = ""
    parameter_size: str = ""
    quantization: str = ""
    # The longest context that it was trained for, in tokens; 0: not known.
    context_length: int = 0
    # "completion", "tools", "thinking", "vision", "embedding"; None: not known.
    capabilities: frozenset[str] | None = None
    # Of its files, which is about what its weights take in memory; 0: not known.
    size_bytes: int = 0
    # What each token of context takes in memory, in each slot; None: not known.
    kv_bytes_per_token: int | None = None
    # Tokens of context of each slot, where the backend holds the model with just these; 0: a load decides.
    fixed_context: int = 0
    # Tokens that it drafts for each pass at most, where a request does not say; 0: none, as far as is known.
    draft_num_predict: int = 0

    def drafted_with(self, options: RunnerOptions) -> int:
        """Tokens that it drafts for each pass at most."""
        asked = options.draft_num_predict
        return self.draft_num_predict if asked is None else asked

    @property
    def is_embedding(self) -> bool:
        """Whether it can do nothing but embed."""
        return self.capabilities is not None and (
            "embedding" in self.capabilities and "completion" not in self.capabilities
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSpec:
    """A model loaded with certain options: only requests to the same one can share forward passes."""

    # The backend's name in the configuration.
    backend: str
    # The model's name, as the backend writes it. Aliases of one digest share the first one's.
    model: str
    digest: str
    options: RunnerOptions = field(default_factory=RunnerOptions)
    # Context shift, where the caller says.
    shift: bool | None = None
    # Loaded by an empty embedding instead of an empty chat.
    is_embedding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRunner:
    """A model that a backend holds in memory."""

    model: str
    digest: str
    # Tokens of context a slot; 0 where the backend does not say.
    context_length: int = 0
    size_bytes: int = 0
    size_vram_bytes: int = 0
    expires_at_ns: int | None = None
    # The number of slots, where the backend tells it.
    slots: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many sequences a runner computes side by side; 0 while unknown."""

    count: int = 0
    source: SlotSource = SlotSource.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """What is known of a runner's slots at this moment."""

    slots: Slots = field(default_factory=Slots)
    # So many items held a slot at one time.
    at_least: int = 0
    # So many of our requests may hold one now; fewer than there are where others use the backend.
    limit: int = 0
    # Where there is only one: why, and what to do about it.
    reason: str = ""
    remedy: str = ""

    @property
    def fewest(self) -> int:
        """The number of slots, or how many there are at least; 0: nothing is known."""
        return max(self.slots.count, self.at_least)


# -- What comes back -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token of the answer with its natural logarithm of probability."""

    token: str
    logprob: float
    bytes: Bytes = b""
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoke:
    """A piece of an answer arrived: at least one token."""

    # When it was made, for counting passes: the backend's clock where it tells it.
    at_ns: int
    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    # Whether the same pass gave the item's last token too: a draft was right. None: the backend does not tell.
    is_drafted: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one item."""

    # Of the prompt, those found in a cache included.
    prompt_tokens: int = 0
    # Of these, those found in a cache; None where the backend does not say.
    cached_prompt_tokens: int | None = None
    # Of the answer, the end token included where the backend counts it.
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """What the backend says of an item's time, the time for which it was held taken out; None: not said."""

    total_s: float | None = None
    load_s: float | None = None
    prompt_eval_s: float | None = None
    eval_s: float | None = None

    @property
    def slot_wait_s(self) -> float | None:
        """Time without a slot: what the total holds beyond loading, prompt and answer; at least 0."""
        if self.total_s is None or self.prompt_eval_s is None or self.eval_s is None:
            return None
        return max(0.0, self.total_s - (self.load_s or 0.0) - self.prompt_eval_s - self.eval_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """An answer is whole: the backend itself said so."""

    # When, by the same clock as `Spoke.at_ns`.
    at_ns: int
    finish_reason: FinishReason
    # The backend's own word.
    finish_reason_raw: str = ""
    # The model that answered, as the backend names it.
    model: str = ""
    usage: Usage = field(default_factory=Usage)
    durations: Durations = field(default_factory=Durations)
    # For embeddings: one vector a text, as 32-bit floats (`array("f")`, an eighth of a tuple's memory); read only.
    embeddings: tuple[Vector, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an item was answered with."""

    model: str
    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = FinishReason.UNKNOWN
    finish_reason_raw: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    embeddings: tuple[Vector, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where an item's time went, in seconds; None where it was not measured."""

    # From acceptance to release.
    queued_s: float | None = None
    # From release until it had a slot.
    slot_wait_s: float | None = None
    load_s: float | None = None
    prompt_eval_s: float | None = None
    eval_s: float | None = None
    # From release to the first token.
    first_token_s: float | None = None
    # From release to the end.
    total_s: float | None = None
