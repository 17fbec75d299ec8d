"""QMP: the monitor that looks at the service and changes it, in a process of its own."""
