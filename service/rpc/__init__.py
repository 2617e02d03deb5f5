"""The gRPC services: validation, errors, credentials and streams. Meets the engine only in messages."""
