"""Virtqueues over guest memory, both sides of them: see vring.SplitQueue and vring.GuestMemory."""
