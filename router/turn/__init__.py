"""One turn over token ids, from its admission to its end, whatever fails meanwhile."""
