"""Attention, seen and changed: `probe` is the one seam, `store` remembers, `heatmap` draws and measures."""
