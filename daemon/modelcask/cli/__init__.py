"""The command line: one module a group of commands, each imported when one of its commands runs."""
