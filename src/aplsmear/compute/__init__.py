"""Where work is done: this machine, Dask workers, TensorFlow."""
