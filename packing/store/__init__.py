"""A folder with packs in it, here or at a URL: written, resumed and loaded.

dataset_files  the files that load_from_disk reads, and the one writer of them
shards      what one shard holds, and the function that writes it
manifest    what a folder was made from, and what its files must hold
writing     where packs are written
info        what a packed dataset knows about its making
loading     load_packed
engines     who writes the shards: one process or several
cluster     a Ray cluster
"""
