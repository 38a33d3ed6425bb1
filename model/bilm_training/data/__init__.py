"""Text as streams of words, and the vocabulary that they are predicted from."""
