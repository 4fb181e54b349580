"""Contact sheets of photographs, views and filters."""
