"""The host peer of the SPICE agent: capabilities, clipboard, monitors."""
