"""Stand-ins for upstream's export tests, which the source distribution does not hold."""
