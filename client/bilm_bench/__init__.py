"""`bilm-bench`: puts a server under load and says what came of it. Needs the extra `files`; pages need `bench`."""
