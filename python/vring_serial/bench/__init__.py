"""What ``vring bench`` measures and how: the parts of a port as processes of their own."""
