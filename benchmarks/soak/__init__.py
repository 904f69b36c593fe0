"""A long campaign: everything that clients do, while everything that can fail does, drawn from a seed."""
