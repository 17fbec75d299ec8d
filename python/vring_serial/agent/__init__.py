"""Both ends of the SPICE agent channel, and one agent shared by several clients."""
