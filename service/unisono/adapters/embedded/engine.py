"""The child process: llama.cpp's own server, from the package xllamacpp. Run as a file, by `process.py`.

    python -P engine.py MODEL.gguf ALIAS SLOTS CONTEXT_OF_EACH THREADS PARENT

It prints one line, `listening URL`, to standard output when it is ready, and everything else to standard error.
UNISONO_ENGINE_KEY must be sent as the bearer token of every request: /slots shows prompts, and other users of the
machine have no business here.

It does not outlive its parent, however that ends: Linux kills it, and elsewhere it ends with its standard input, the
other end of which is closed with the parent.
"""

import ctypes
import os
import signal
import sys
import threading

import xllamacpp

# Source: man 2 prctl.
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves until the parent is gone."""
    model, alias, slots, context, threads, parent = sys.argv[1:]
    end_with_parent(int(parent))
    # Only the line below belongs to standard output: llama.cpp's own log goes where errors go.
    out = os.dup(1)
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = model
    # Without an alias it calls itself by the file's path.
    params.model_alias = {alias}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [os.environ["UNISONO_ENGINE_KEY"]]
    params.n_parallel = int(slots)
    # Shared out evenly: each slot has its own part, and no item can take another's room.
    params.n_ctx = int(slots) * int(context)
    params.kv_unified = False
    # As Ollama starts it.
    params.n_batch = params.n_ubatch = 512
    params.use_jinja = True
    if int(threads):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    # A held request keeps one of the server's threads: as many as are in flight, as many that are held, and some.
    params.n_threads_http = 4 * int(slots) + 16
    # By default up to 8 GiB of old prompts would be kept beside the slots' own.
    params.cache_ram_mib = 0
    params.endpoint_slots = params.endpoint_metrics = True
    params.ui = False
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        # What went wrong stands in the log above; a traceback would push it out of sight.
        sys.exit(str(error))
    os.write(out, f"listening {server.listening_address}\n".encode())
    os.close(out)
    threading.Event().wait()


def end_with_parent(parent: int) -> None:
    """From now on this process ends when the process with that id does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the line above
            os._exit(0)
    threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    # Without the server's own orderly end, which would wait for requests that nobody reads.
    os._exit(0)


if __name__ == "__main__":
    main()
