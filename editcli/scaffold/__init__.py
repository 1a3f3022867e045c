"""What ``editcli plugins new`` writes."""
