"""The ways in: gRPC, HTTP and the command line. They parse, convert and answer; decisions are made further in."""
