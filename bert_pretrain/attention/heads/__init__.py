"""One attention mechanism a file: this folder is the catalogue."""
