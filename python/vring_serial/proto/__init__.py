"""Wire protocols without input or output: bytes in, events and bytes out."""
