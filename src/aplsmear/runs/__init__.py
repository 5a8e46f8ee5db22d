"""How a stage starts, works, is logged, and is put right after a kill."""
