"""Every packer on one histogram, before anything is packed.

compare    the numbers
page       a page or a picture of them
"""
