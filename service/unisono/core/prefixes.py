"""Which items begin alike: prompts → families that share a leading part, and what two leading parts have in common.

Theory of operation. A slot that has computed a prompt keeps it, and of the next prompt in that slot it computes only
what comes after the part that both begin with. So it matters which items begin alike, and how far.

A prompt becomes a chain of steps, in the order in which templates write it: what chooses the template, tools, then
each message: its pictures, its text in full blocks of 256 bytes, and a closing step with the rest of it. So long
common text inside one message counts, in blocks; and a message that is common as a whole counts exactly. A step's
digest covers all steps before it: two chains have a step in common only if they are alike up to there. Hence no tree
need be built. How many chains hold a digest says how many items share all that leads to it, and that number can only
fall along a chain.

Where it falls, items part: such a step is a *node*. From the front, a node founds a family if it adds at least 256
bytes to the family before it, so that a few words in common by accident split nothing; an item's family is the
deepest one on its way. Digests depend on the text alone: the same leading part has the same key in every batch
and every process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from unisono.core.model import ChatRequest, EmbedRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from unisono.core.model import GenerateRequest, Item, Message, Tool, ToolCall

# What a family must share, and a family within a family more than that. About 64 tokens: to compute these anew costs
# little more than a pass.
MIN_SHARED_BYTES = 256
# Text is compared in blocks of so many bytes,
_BLOCK_BYTES = 256
# up to so many steps: 256 KiB of prompt.
_MOST_STEPS = 1024
# A picture counts as so much text: some hundred tokens in most models.
_PICTURE_BYTES = 1024
_DIGEST_BYTES = 8

_What = TypeVar("_What")


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The leading part that a family's prompts have in common."""

    # Names it: equal for equal leading parts, also across batches and processes.
    key: int
    # Cumulative digests along the chain, one a step.
    digests: tuple[int, ...]
    # Cumulative bytes of text at each step.
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of text in all."""
        return self.sizes[-1] if self.sizes else 0


def families(items: Sequence[Item]) -> list[Prefix | None]:
    """For each item its family's leading part; None where it shares nothing worth it with another of these items.

    Items of one family get the same object.
    """
    writer = _Writer()
    chains = [writer.chain(item) for item in items]
    shared_by = Counter(chain.from_iterable(digests for digests, _ in chains))
    # What leads to a step is the same for all who share it, so the last shared step decides the family.
    family_of: dict[int, Prefix | None] = {}
    found: list[Prefix | None] = []
    for digests, sizes in chains:
        # The first that belongs to this item alone.
        shared = bisect_left(digests, x=True, key=lambda digest: shared_by[digest] < 2)
        if shared == 0:
            found.append(None)
            continue
        last = digests[shared - 1]
        if last not in family_of:
            family_of[last] = _deepest_family(digests[:shared], sizes, shared_by, family_of)
        found.append(family_of[last])
    return found


def _deepest_family(
    shared: list[int], sizes: list[int], shared_by: Counter[int], family_of: dict[int, Prefix | None]
) -> Prefix | None:
    """The deepest of the families along the steps that an item shares with others."""
    depth = 0
    base = 0
    for place, digest in enumerate(shared):
        is_node = place + 1 == len(shared) or shared_by[shared[place + 1]] < shared_by[digest]
        if is_node and sizes[place] - base >= MIN_SHARED_BYTES:
            depth, base = place + 1, sizes[place]
    if depth == 0:
        return None
    # Another way may have ended here before: its members are of the same family.
    known = family_of.get(shared[depth - 1])
    if known is None:
        known = Prefix(shared[depth - 1], tuple(shared[:depth]), tuple(sizes[:depth]))
        family_of[known.key] = known
    return known


def chain_of(item: Item) -> Prefix:
    """An item's whole prompt, so that what a slot holds afterwards can be remembered; empty for embeddings."""
    digests, sizes = _Writer().chain(item)
    return Prefix(digests[-1] if digests else 0, tuple(digests), tuple(sizes))


def lone_prefix(item: Item) -> Prefix | None:
    """The whole of an item that shares nothing with others of its batch: earlier ones may have begun like it.

    None where it is too short to matter.
    """
    whole = chain_of(item)
    return whole if whole.size >= MIN_SHARED_BYTES else None


def common_bytes(one: Prefix | None, other: Prefix | None) -> int:
    """Bytes of text that two leading parts have in common."""
    if one is None or other is None:
        return 0
    if one is other:
        return one.size
    steps = min(len(one.digests), len(other.digests))
    # A digest covers all before it: once they differ, they differ for good.
    alike = bisect_left(range(steps), x=True, key=lambda at: one.digests[at] != other.digests[at])
    return one.sizes[alike - 1] if alike else 0


# -- Prompts → chains ------------------------------------------------------------------------------------------


class _Chain:
    """A chain as it is written. `state` is the last digest: all that is written follows from it."""

    __slots__ = ("digests", "size", "sizes", "state")

    def __init__(self, seed: str) -> None:
        # No step yet: prompts that have only the seed in common share no text.
        self.state = _digest(seed.encode(errors="surrogatepass"))
        self.size = 0
        self.digests: list[int] = []
        self.sizes: list[int] = []

    def text(self, tag: bytes, text: str) -> None:
        """A text: its full blocks, then the rest of it. The tag says what kind of text it is."""
        data = text.encode(errors="surrogatepass")
        whole = len(data) - len(data) % _BLOCK_BYTES
        for start in range(0, min(whole, _MOST_STEPS * _BLOCK_BYTES), _BLOCK_BYTES):
            self.step(tag + b"\x00" + data[start : start + _BLOCK_BYTES], _BLOCK_BYTES)
        self.step(tag + b"\x01" + data[whole:], len(data) - whole)

    def step(self, content: bytes, size: int) -> None:
        """One step, unless there are as many as count."""
        if len(self.digests) < _MOST_STEPS:
            self.state = _digest(self.state + content)
            self.size += size
            self.digests.append(int.from_bytes(self.state, "big"))
            self.sizes.append(self.size)


class _Writer:
    """Writes chains; what many prompts begin with is digested once."""

    def __init__(self) -> None:
        # (the state before, what was written) → the state after, the size after, and the steps.
        self._known: dict[object, tuple[bytes, int, list[int], list[int]]] = {}
        self._pictures: dict[bytes, bytes] = {}

    def chain(self, item: Item) -> tuple[list[int], list[int]]:
        """Cumulative digests and sizes of an item's steps; none for embeddings."""
        match item.request:
            case EmbedRequest():
                return [], []
            case ChatRequest() as chat:
                written = self._chat(chat)
            case generate:
                written = self._generate(generate)
        return written.digests, written.sizes

    def _chat(self, chat: ChatRequest) -> _Chain:
        # How much a model thinks stands at the beginning of some templates.
        written = _Chain(f"chat {chat.think.value if chat.think else ''}")
        if chat.tools:
            self._once(written, chat.tools, _write_tools)
        last = len(chat.messages) - 1
        for place, message in enumerate(chat.messages):
            if place < last:
                self._once(written, message, self._write_message)
            else:
                # Mostly the item's own: not worth remembering.
                self._write_message(written, message)
        return written

    def _generate(self, asked: GenerateRequest) -> _Chain:
        # With a suffix, templates begin with a word of their own.
        think = asked.think.value if asked.think else ""
        written = _Chain(f"generate {think} {asked.raw} {bool(asked.suffix)}")
        if asked.template or asked.system:
            self._once(written, (asked.template, asked.system), _write_head)
        self._write_images(written, asked.images)
        written.text(b"prompt", asked.prompt)
        if asked.suffix:
            written.text(b"suffix", asked.suffix)
        return written

    def _once(self, written: _Chain, what: _What, write: Callable[[_Chain, _What], None]) -> None:
        """Writes something, or copies it where it was written after the same beginning before."""
        place = (written.state, what)
        known = self._known.get(place)
        if known is not None:
            written.state, written.size, digests, sizes = known
            written.digests += digests
            written.sizes += sizes
            return
        start = len(written.digests)
        write(written, what)
        self._known[place] = (written.state, written.size, written.digests[start:], written.sizes[start:])

    def _write_message(self, written: _Chain, message: Message) -> None:
        role = message.role.value.encode()
        self._write_images(written, message.images)
        if message.thinking:
            written.text(role + b" thinking", message.thinking)
        written.text(role, message.content)
        if message.tool_calls:
            written.text(role + b" calls", "".join(map(_call_text, message.tool_calls)))
        if message.tool_name or message.tool_call_id:
            written.text(role + b" of", f"{message.tool_name}\0{message.tool_call_id}")

    def _write_images(self, written: _Chain, images: Iterable[bytes]) -> None:
        for image in images:
            digest = self._pictures.get(image)
            if digest is None:
                digest = self._pictures[image] = _digest(image)
            written.step(b"picture\x01" + digest, _PICTURE_BYTES)


def _write_tools(written: _Chain, tools: Sequence[Tool]) -> None:
    for tool in tools:
        written.text(b"tool", f"{tool.name}\0{tool.description}\0{tool.parameters_json}")


def _write_head(written: _Chain, head: tuple[str, str]) -> None:
    for tag, text in zip((b"template", b"system"), head, strict=True):
        if text:
            written.text(tag, text)


def _call_text(call: ToolCall) -> str:
    return f"{call.id}\0{call.name}\0{call.arguments_json}\0"


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()
