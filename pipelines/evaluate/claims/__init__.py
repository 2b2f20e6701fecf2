"""The claims of the five systems, one file each, found by looking in this folder."""
