"""Internal: see vring._pump."""
