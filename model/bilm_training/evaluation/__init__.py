"""What a model has learnt: perplexity, and probes of its vectors."""
