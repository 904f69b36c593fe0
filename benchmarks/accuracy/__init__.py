"""What sharing costs in right answers."""
