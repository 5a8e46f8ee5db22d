"""Where partitions are done, and TensorFlow started."""
