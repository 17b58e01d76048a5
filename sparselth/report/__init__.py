"""What a run says: statistics, tables and figures drawn from its folder alone."""
