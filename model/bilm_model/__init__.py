"""The mathematics of bilm-serve: the biLM itself, its weights, the engine that runs it. Knows torch, no gRPC."""
