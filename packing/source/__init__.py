"""What rows come from -> datasets with one sequence a row, and where each row's tokens lie.

open              SOURCE of a command -> {split: Dataset}
formats           FORMATS: one row a file format
text_files        documents of .txt files, in blocks
json_rows         JSON -> Arrow, every value as it is written
text              texts -> tokens
lengths           source -> histogram
rows              which columns hold a value per token, where each row's tokens lie, and what is padding
token_column      token columns in Arrow memory
token_ids         ids that no model has, refused
sequences         rows that are too long: refused, truncated, split or dropped
ranges            a source read by ranges of rows, in any process
fingerprint       what a dataset holds, as a number
source_files      whether a source's files have changed
exact             Python values -> Arrow, unchanged
"""
