"""Proof that a packed folder holds what was packed.

verify      verify_packed
findings    what is wrong, counted and listed
files       the files against the manifest
cohorts     the order of packs with cohorts
packs       the packs by themselves, and every source row once
source      every value against the source
"""
