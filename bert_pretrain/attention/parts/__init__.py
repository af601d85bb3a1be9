"""What several attention heads are made of.

pattern            softmax over a fixed pattern of positions
blocks             which blocks of a pack FlexAttention looks at
windows            a chunk and its neighbours
fold               a sequence folded into a table
global_tokens      tokens that see all, and are seen by all
projections        linear layers of a head's own, and how they start
distances          scores of relative positions
pieces             whole sequences side by side, or in chunks, and sums over the chunks of each
whole_sequences    sums and projections over whole sequences
all_scores         weights made of all scores of a sequence, by other rules than a softmax
choices            what was chosen going forward, for the pass that computes it again
"""
