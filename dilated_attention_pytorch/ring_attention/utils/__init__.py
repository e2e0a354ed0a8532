"""What the ring modules are built from."""
