"""What the router tells of itself: metrics for Prometheus and Ray, and the caller's trace continued."""
