"""The command line: one module per command group. Knows flags and terminals; decides nothing."""
