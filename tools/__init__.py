"""The command lines. Each parses, sets up and launches; the work is done in the packages."""
