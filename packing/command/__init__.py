"""The subcommands of pack-dataset, one a file. `packing.cli` finds the right one and prints errors in one line.

parser     the parser of every subcommand; what a subcommand is
sources    SOURCE and the options that say how to read it -> splits, or histograms
pack       SOURCE TARGET: write packs
plan       SOURCE: print how well it would pack
compare    SOURCE: print every packer at several depths; a report with pictures
verify     PACKED: prove that it holds what was packed
unpack     PACKED TARGET: write the rows again
"""
