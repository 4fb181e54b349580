"""Values passed between the other packages: objects and label maps."""
