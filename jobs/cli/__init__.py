"""The command line: one module per family of commands, and the tables that they print."""
