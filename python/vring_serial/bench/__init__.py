"""The measurements of ``vring bench``, with the parts of a port in separate processes."""
