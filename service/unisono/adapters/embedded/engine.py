"""The child process: llama.cpp's own server, from the package xllamacpp. Run as a file, by `process.py`.

    python engine.py MODEL.gguf ALIAS SLOTS CONTEXT_OF_EACH THREADS

It prints one line, `listening URL`, when it is ready, and its log to standard error. It ends when its standard
input does, which the operating system closes with the parent, however that ends. UNISONO_ENGINE_KEY must be sent as
the bearer token of every request: other users of the machine have no business here.
"""

import os
import sys

import xllamacpp


def main() -> None:
    """Serves until the parent is gone."""
    model, alias, slots, context, threads = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {alias}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [os.environ["UNISONO_ENGINE_KEY"]]
    params.n_parallel = int(slots)
    params.n_ctx = int(slots) * int(context)
    # As Ollama starts it.
    params.n_batch = params.n_ubatch = 512
    params.use_jinja = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    # A cache of prompts beside the slots' own would hide what a slot keeps.
    params.cache_ram_mib = 0
    params.endpoint_slots = params.endpoint_metrics = True
    params.ui = False
    server = xllamacpp.Server(params)
    print("listening", server.listening_address, flush=True)  # noqa: T201 - what the parent waits for
    sys.stdin.buffer.read()
    # Without the server's own orderly end, which would wait for requests that nobody reads.
    os._exit(0)


if __name__ == "__main__":
    main()
