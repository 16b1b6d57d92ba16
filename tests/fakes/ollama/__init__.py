"""A stand-in for Ollama that behaves as a real one was measured and recorded to behave."""

from tests.fakes.ollama.answers import Answer
from tests.fakes.ollama.faults import Fault, FaultKind
from tests.fakes.ollama.foreign import Foreign
from tests.fakes.ollama.log import Outcome, PassRecord, RequestRecord
from tests.fakes.ollama.models import DEFAULT_MODELS, FakeModel, RunnerOptions
from tests.fakes.ollama.server import FakeOllama

__all__ = [
    "DEFAULT_MODELS",
    "Answer",
    "FakeModel",
    "FakeOllama",
    "Fault",
    "FaultKind",
    "Foreign",
    "Outcome",
    "PassRecord",
    "RequestRecord",
    "RunnerOptions",
]
