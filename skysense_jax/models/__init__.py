"""The networks: how modules are wired, what they take and give, and the table of them."""
