"""New patients."""
