"""Memory of a training run, estimated before anything is loaded."""
