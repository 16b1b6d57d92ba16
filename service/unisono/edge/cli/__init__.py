"""The command line: a client of the service, and a way to start it."""

import os

# gRPC's core writes lines of its own to standard error ("Got goaway"). What matters reaches us as a status.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
