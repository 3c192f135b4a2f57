"""Stand-ins for upstream's tests of utilities, which the source distribution does not hold."""
