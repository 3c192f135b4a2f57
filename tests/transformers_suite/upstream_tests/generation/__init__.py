"""Stand-ins for upstream's generation tests, which the source distribution does not hold."""
