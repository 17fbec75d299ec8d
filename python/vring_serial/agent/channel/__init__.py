"""What both ends of a SPICE agent channel do: messages, clipboards, files."""
