"""The tabs: one file each, `build(studio, page)`, layout and wiring only."""
