"""What may be said of a whole batch on the command line, and the contract's config of it."""

from __future__ import annotations

from dataclasses import dataclass

from unisono._generated.unisono.v1 import batch_inference_pb2 as rpc
from unisono._generated.unisono.v1 import item_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTerms:
    """What applies to all items of a batch; None: as the service has it."""

    # The model of items that name none.
    model: str | None = None
    num_predict: int | None = None
    temperature: float | None = None
    seed: int | None = None
    # For the whole batch, and for the silence of an item that has begun to speak.
    timeout_s: float | None = None
    item_timeout_s: float | None = None
    # How the batch is run: names of the contract's enums without their beginnings, in small letters; None: as usual.
    co_scheduling: str | None = None
    priority: str | None = None
    # At the backends at one time, released in a second, and the share beside other batches.
    max_concurrency: int | None = None
    items_per_second: float | None = None
    weight: int | None = None


def config_of(terms: BatchTerms) -> rpc.BatchConfig:
    """The config; a malformed item costs only itself."""
    config = rpc.BatchConfig(model=terms.model or "", validation=rpc.VALIDATION_MODE_PER_ITEM)
    defaults = item_pb2.Options(num_predict=terms.num_predict, temperature=terms.temperature, seed=terms.seed)
    if defaults.ByteSize():
        config.options.CopyFrom(defaults)
    if terms.co_scheduling is not None:
        config.co_scheduling = rpc.CoScheduling.Value(f"CO_SCHEDULING_{terms.co_scheduling.upper()}")
    if terms.priority is not None:
        config.priority = rpc.Priority.Value(f"PRIORITY_{terms.priority.upper()}")
    for name in ("max_concurrency", "items_per_second", "weight"):
        if (value := getattr(terms, name)) is not None:
            setattr(config, name, value)
    if terms.timeout_s is not None:
        config.batch_deadline.FromNanoseconds(round(terms.timeout_s * 1e9))
    if terms.item_timeout_s is not None:
        config.item_timeout.FromNanoseconds(round(terms.item_timeout_s * 1e9))
    return config
