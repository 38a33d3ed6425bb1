"""The mathematics of bilm-serve: the biLM itself, its weights, its training. Knows torch, no gRPC."""
