"""Our own widgets, on gr.HTML: Python writes escaped markup, a little script next to it reports clicks."""
