"""What a biLM's vectors know: part of speech, by layer; how much of it survives typos; senses of ambiguous words."""
