"""When a turn starts: room for its prefill and decode, a place in line, or a refusal."""
