"""Text -> tokens with their places in it, for the server and in process."""
