"""The command line: one file per command, which loads what is heavy only when it runs."""
