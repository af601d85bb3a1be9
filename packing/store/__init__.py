"""A folder with packs in it, here or at a URL: written, resumed and loaded.

info            PackedInfo: what a packed dataset knows about its making
dataset_files   the files that load_from_disk reads, and the one writer of them
shards          what one shard holds, and the function that writes it
contents        Packing: what a packed dataset will hold, decided before it is written
manifest        what a folder was made from, and what its files must hold
engines         who reads the source and writes the shards: one process, several, or a cluster
cluster         a Ray cluster
writing         packings -> a folder: started or resumed, written, finished
loading         load_packed

Others import Packing and plan_packing, write_packings, check_output, opened_engine, load_packed, PackedInfo,
packed_info, and for verifying what the manifest and its shards are.
"""
