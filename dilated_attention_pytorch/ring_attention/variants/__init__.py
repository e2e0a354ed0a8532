"""Ways to compute a rank's share."""
