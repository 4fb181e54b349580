"""Contact sheets of what the network sees."""
