"""The pass map of a batch, asked for and drawn."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import batch_inference_pb2_grpc
from unisono.edge.cli.passmap import MapPass, draw_pass_map
from unisono.edge.cli.terminal import can_write

_PASSES_A_PAGE = 10_000
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """The forward passes of a batch so far."""

    passes: list[MapPass]
    # Counted, but too many to be told one by one.
    unmapped: int


async def ask_passes(stub: batch_inference_pb2_grpc.BatchInferenceStub, batch_id: str) -> Passes:
    """Page by page. Raises grpc.aio.AioRpcError; NOT_FOUND where no process knows the batch's passes any more."""
    passes: list[MapPass] = []
    token = ""
    while True:
        request = rpc.ListPassesRequest(batch_id=batch_id, page_size=_PASSES_A_PAGE, page_token=token)
        page = await stub.ListPasses(request, timeout=_PATIENCE_S)
        # Arrays of numbers: a long batch has millions of participations.
        passes += [MapPass(group=each.group, items=array("L", each.item_indexes)) for each in page.passes]
        token = page.next_page_token
        if not token:
            return Passes(passes=passes, unmapped=page.unmapped_passes)


def draw_passes(
    found: Passes, names: Mapping[int, str], console: Console, *, headings: Mapping[int, str], rows: int | None
) -> list[str]:
    """The map with its heading, as wide as the console; no lines where there was no pass."""
    lines = draw_pass_map(
        found.passes,
        names,
        console.width,
        unicode=can_write(console, "█▓▒░·│└─…¾½¼"),
        headings=headings,
        rows=rows,
    )
    if found.unmapped:
        lines.append(f"{found.unmapped:,} more passes were counted, but are too many to be drawn.")
    return ["Forward passes", *lines, ""] if lines else []
