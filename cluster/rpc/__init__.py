"""Generated from `proto/` by `make proto`: do not edit. What uses it knows gRPC; nothing else needs it."""
