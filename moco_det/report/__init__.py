"""Reports of finished runs: tables, curves and one page."""
