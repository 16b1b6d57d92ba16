"""The gRPC service: messages in, values to the application, values out, messages back; nothing is decided here."""
