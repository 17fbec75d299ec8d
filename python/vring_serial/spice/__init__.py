"""The real SPICE server, libspice-server, with the device's ports as its char devices.

Nothing here needs the library until :class:`.server.SpiceServer` is made; options alone do not.
"""
