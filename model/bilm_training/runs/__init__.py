"""The folder of a run: its files, its logs, and what can be read from several of them."""
