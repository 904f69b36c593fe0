"""Decides when a turn starts: it gets room for its prefill and decode, waits in line, or is refused."""
