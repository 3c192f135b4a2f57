"""Ground floor: helpers that every part of the package may use, and that use none of its parts."""
