"""The command line: one file per command, each parsing, calling the library once and rendering."""
