"""Reports: the run folder, the console, tables."""
