"""What rows come from -> datasets with one sequence a row, and where each row's tokens lie.

open              SOURCE of a command -> {split: Dataset}
formats           FORMATS: one row a file format
text_files        documents of .txt files, in blocks
json_rows         JSON -> Arrow, every value as it is written
text              texts -> tokens
lengths           source -> histogram
rows              which columns hold a value per token, and where each row's tokens lie
padding           padding, trimmed or refused
token_column      token columns in Arrow memory
sequences         rows that are too long: refused, truncated, split or dropped
ranges            a source read by ranges of rows, in any process
fingerprint       what a dataset holds, as a number
source_files      whether a source's files have changed
exact             Python values -> Arrow, unchanged
"""
