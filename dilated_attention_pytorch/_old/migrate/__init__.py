"""The command `migrate`: lists old names in a code base, and rewrites those whose calls stay as they are."""
