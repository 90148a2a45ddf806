"""What the four methods share. Knows no method; `core/README.md` states the conventions."""
