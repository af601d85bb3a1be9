"""The two published histograms, and small ones for hypothesis."""

from hypothesis import strategies as st

from packing import length_histogram
from packing.source.lengths import published_histogram

WIKIPEDIA, SQUAD = published_histogram("wikipedia"), published_histogram("squad")
histograms = st.integers(1, 40).flatmap(
    lambda longest: st.lists(st.integers(1, longest), min_size=1, max_size=60).map(
        lambda lengths: length_histogram(lengths, longest)
    )
)
