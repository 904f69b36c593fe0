"""What ICaRus costs and saves."""
