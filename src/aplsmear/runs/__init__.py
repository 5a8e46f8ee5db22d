"""How a stage starts, is logged, and is put right after a kill."""
