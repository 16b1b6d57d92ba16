"""The REST edge: OpenAI's Files and Batches, over the same kept batches as gRPC."""
