"""One SPICE agent shared by several clients."""
