"""numpy: the reference implementation of the array protocol."""
