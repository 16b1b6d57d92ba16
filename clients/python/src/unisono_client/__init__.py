"""Whole batches of conversations through a Unisono service: async here, and without an event loop in `.sync`."""

from unisono_client.client import Client
from unisono_client.config import BatchConfig, Deltas, Options, Release, RunnerOptions
from unisono_client.errors import (
    BatchLostError,
    ClosedError,
    FieldViolation,
    ItemError,
    RefusedError,
    UnisonoError,
    UnreachableError,
)
from unisono_client.items import Chat, Embed, Generate, Item, Message, Tool, ToolCall
from unisono_client.results import Delta, Report, Result, State, Timings, Usage
from unisono_client.rolling import RollingSession
from unisono_client.run import OnProgress, Run
from unisono_client.scripts import BenchmarkRun, ModelBenchmark, batch_benchmark, batch_generate
from unisono_client.session import Session

__all__ = [
    "BatchConfig",
    "BatchLostError",
    "BenchmarkRun",
    "Chat",
    "Client",
    "ClosedError",
    "Delta",
    "Deltas",
    "Embed",
    "FieldViolation",
    "Generate",
    "Item",
    "ItemError",
    "Message",
    "ModelBenchmark",
    "OnProgress",
    "Options",
    "RefusedError",
    "Release",
    "Report",
    "Result",
    "RollingSession",
    "Run",
    "RunnerOptions",
    "Session",
    "State",
    "Timings",
    "Tool",
    "ToolCall",
    "UnisonoError",
    "UnreachableError",
    "Usage",
    "batch_benchmark",
    "batch_generate",
]
