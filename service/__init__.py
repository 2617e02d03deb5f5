"""The service: command line, gRPC front end, engine process and what lies between them."""
