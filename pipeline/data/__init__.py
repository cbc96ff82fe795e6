"""Data sets and the images of numbered views."""
