"""What all packages need of the operating system; imports nothing of the project, and the standard library alone."""
