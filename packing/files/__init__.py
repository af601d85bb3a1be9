"""Files and folders, here or at a URL, whatever they hold: whole or not there, and read with care.

paths         a path or a URL that fsspec knows
hashed        files that appear when they are whole, hashed as they are written
folder        folders that appear when they are whole
locks         a lock that ends with its holder
names         names that lead out of a folder, refused
metadata      JSON that programs wrote, checked
saved         folders of save_to_disk, looked at before they are opened
cache         files that are made once and kept
local_copy    files at a URL, copied into the cache
errors        what is wrong and where, which numbers may be, what the user meant
processes     the pool of processes
progress      a bar in a terminal, lines in a log
collector     seldom garbage collection in a command
"""
