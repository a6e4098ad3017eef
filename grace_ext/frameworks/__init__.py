"""The worlds that the parts run in: array libraries, transports, and the places where gradients appear."""
