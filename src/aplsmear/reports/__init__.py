"""Pages and model cards."""
