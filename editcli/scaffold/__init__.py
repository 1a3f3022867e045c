"""The package that ``editcli plugins new`` writes."""
