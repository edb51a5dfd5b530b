"""A folder of another layout becomes a catalog: what is stated is drafted, what is not is asked."""
