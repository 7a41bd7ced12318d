"""The command line: parse, build a value, call one verb, print."""
