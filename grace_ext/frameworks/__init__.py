"""Connects the parts to torch, TensorFlow with Keras, and numpy: array operations, transports, and wrappers where gradients appear."""
