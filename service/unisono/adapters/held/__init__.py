"""Requests that are sent but for their last byte, and released together.

Theory of operation: an inference server starts to work when a request's body is whole. So each request gets an
HTTP/1.1 connection of its own (`connect.py`), on which everything but the final `}` of its JSON body is sent
(`exchange.py`); when all requests of a wave are that far, one loop without any waiting writes the missing bytes,
straight into the sockets (`exchange.release`). h11 writes the request and reads the answer; the bytes go over a
stream of ours (`stream.py`). httpcore does the HTTP of plain requests, over the same stream.

The last byte must be the `}`: a JSON decoder that stops at the end of the value would start early if it were a
blank or a newline. Source: Ollama 0.32 decodes with Go's encoding/json.
"""

from unisono.adapters.held.call import ExchangeCall
from unisono.adapters.held.embeddings import WholeReader
from unisono.adapters.held.endpoint import Endpoint, parse_endpoint
from unisono.adapters.held.errors import translated
from unisono.adapters.held.exchange import HeldExchange, release
from unisono.adapters.held.forwarded import ForwardedCall, StreamReader, WholeBodyReader
from unisono.adapters.held.lines import LineSplitter, TooLongError
from unisono.adapters.held.plain import read_all
from unisono.adapters.held.transport import HeldTransport

__all__ = [
    "Endpoint",
    "ExchangeCall",
    "ForwardedCall",
    "HeldExchange",
    "HeldTransport",
    "LineSplitter",
    "StreamReader",
    "TooLongError",
    "WholeBodyReader",
    "WholeReader",
    "parse_endpoint",
    "read_all",
    "release",
    "translated",
]
