"""The command line: one file per command; `--help` imports neither torch nor numpy."""
