"""The foundation of both packages: errors, files, configs, processes, progress."""
