"""`bilm-embed`: turns a text file into a file of vectors. Needs the extra `files`."""
